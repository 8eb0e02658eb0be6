"""`tinsmith serve` with settings that its command line does not offer: for tests of what they change.

Arguments: a JSON object of server settings, one of control settings, base models.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.observe.logs import configure_logging
from tinsmith.runtime.process import ProcessEngine
from tinsmith.server.app import create_app
from tinsmith.server.run import allow_many_connections, bind, run_app, url_of
from tinsmith.server.settings import ServerSettings
from tinsmith.types.engine_options import EngineOptions, ModelSource


def main() -> None:
    configure_logging()
    server, control = (json.loads(text) for text in sys.argv[1:3])
    listener = bind("127.0.0.1", 0)
    allow_many_connections()
    engines = [ProcessEngine(ModelSource.parse(text), EngineOptions(dtype="float32")) for text in sys.argv[3:]]
    settings = ControlSettings(data_dir=Path(os.environ["TINSMITH_DATA_DIR"]), **control)
    app = create_app(Control(settings, engines), ServerSettings(loopback_hosts_only=True, **server))
    url = url_of(listener)
    ready = f"Serving at {url}  TINKER_BASE_URL={url} TINKER_API_KEY=tml-local"
    run_app(app, listener, on_ready=lambda: print(ready, flush=True))


if __name__ == "__main__":
    main()
