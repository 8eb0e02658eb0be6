"""A whole server with a ledger over the fake engine, on a port of its own, in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FakeEngine
from tinsmith.server import ServerSettings, create_app
from tinsmith.server.run import bind, serve_app, url_of
from tinsmith.types.operations import OptimStep, TrainItem


@dataclass(frozen=True, slots=True)
class FakeServer:
    url: str
    engine: FakeEngine
    control: Control

    @property
    def trained(self) -> list[int]:
        """First tokens of the datums that the engine was given, in their order."""
        items = [operation for operation in self.engine.operations if isinstance(operation, TrainItem)]
        return [datum.model_input.to_ints()[0] for item in items for datum in item.data]

    @property
    def num_stepped(self) -> int:
        return sum(isinstance(operation, OptimStep) for operation in self.engine.operations)


@contextmanager
def fake_server(data_dir: Path, **settings: Any) -> Iterator[FakeServer]:
    """Ends in order, as by a signal."""
    engine, ready = FakeEngine(), threading.Event()
    control = Control(ControlSettings(data_dir=data_dir, ledger=True, **settings), [engine])
    app = create_app(control, ServerSettings(poll_hold_s=5.0))
    listener = bind("127.0.0.1", 0)
    loop = asyncio.new_event_loop()
    main = loop.create_task(serve_app(app, listener, on_ready=ready.set))

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(main)
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield FakeServer(url_of(listener), engine, control)
    finally:
        loop.call_soon_threadsafe(control.on_fatal)
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
