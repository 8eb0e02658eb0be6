"""Send generated requests to every operation of `GET /openapi.json` and compare the answers with the document.

    python scripts/fuzz_api.py                     # a server of its own; all phases
    python scripts/fuzz_api.py --phases coverage   # options go to schemathesis

The server asks for keys, and the requests have one of a user who is no admin. Fails if an answer is a fault, is not
documented, or given without a key, or if the server logged an error.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).with_name("schemathesis.toml")
DEFAULTS = ("--max-examples", "20", "--max-time", "300", "--seed", "1")
START_TIMEOUT_S = 90


def make_key(data_dir: Path) -> str:
    """Of a user of the server on this data folder, from now on the only one who may use it."""
    admin = [str(Path(sys.executable).with_name("tinsmith")), "admin"]
    for words in (["users", "create", "fuzz"], ["keys", "create", "fuzz"]):
        done = subprocess.run(
            [*admin, *words, "--data-dir", str(data_dir)], stdout=subprocess.PIPE, text=True, check=True
        )
    return done.stdout.strip()


def fuzz(url: str, *options: str, folder: Path, key: str) -> subprocess.CompletedProcess[str]:
    """Run schemathesis against a server at `url`; its files go to `folder`."""
    command = [str(Path(sys.executable).with_name("st")), "--config-file", str(CONFIG), "run", f"{url}/openapi.json"]
    fixed = ["--continue-on-failure", "--request-timeout", "150", "--suppress-health-check", "all", "--warnings", "off"]
    fixed += ["--header", f"X-API-Key: {key}"]
    return subprocess.run(
        [*command, *fixed, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def num_cases(output: str) -> int:
    found = re.search(r"(\d+) generated", output)
    return int(found[1]) if found else 0


def logged_errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.match(r"(\S+ )?(ERROR|CRITICAL|Traceback)", line)]


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log, key = folder / "serve.log", make_key(folder / "data")
        with log.open("w") as errors:
            server = subprocess.Popen(
                [str(Path(sys.executable).with_name("tinsmith")), "serve", "--port", "0", "--dtype", "float32"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TINSMITH_DATA_DIR": str(folder / "data"), "HF_HUB_OFFLINE": "1"},
            )
        try:
            done = fuzz(_url_of(server, log), *DEFAULTS, *sys.argv[1:], folder=folder, key=key)
        finally:
            server.terminate()
            server.wait(timeout=60)
        faults = logged_errors(log.read_text())
        print(done.stdout, *faults, sep="\n")
        return 1 if faults else done.returncode


def _url_of(server: subprocess.Popen[str], log: Path) -> str:
    assert server.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if select.select([server.stdout], [], [], 0.5)[0]:
            if found := re.search(r"TINKER_BASE_URL=(\S+)", server.stdout.readline()):
                return found[1]
            break
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


if __name__ == "__main__":
    sys.exit(main())
