"""A server that is started again whenever it dies, a script that must not notice, and what the script left on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("training_run.py")
START_S = 120.0
RUN_S = 1400.0


class Daemon:
    """`tinsmith serve` on one port and one folder, started again as a service manager would."""

    def __init__(
        self, folder: Path, *, snapshot_requests: int = 7, crash_at: str | None = None, more: Sequence[str] = ()
    ) -> None:
        """`more` are options of the command."""
        self.data_dir = folder / "data"
        self.num_starts = 0
        self._log = (folder / "serve.log").open("a")
        self._port = _free_port()
        self._snapshot_requests = snapshot_requests
        self._more = more
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if crash_at is not None:
            self._environment["TINSMITH_CRASH_AT"] = f"{crash_at}:{folder / 'crashed'}"
        self._is_closing = False
        self.process = self._spawn()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _spawn(self) -> subprocess.Popen[str]:
        self.num_starts += 1
        command = [
            sys.executable, "-c", "from tinsmith.cli import main; main()", "serve", "--port", str(self._port),
            "--data-dir", str(self.data_dir), "--dtype", "float32", "--deterministic",
            "--snapshot-requests", str(self._snapshot_requests), *self._more,
        ]  # fmt: skip
        return subprocess.Popen(command, stdout=self._log, stderr=self._log, text=True, env=self._environment)

    def _keep(self) -> None:
        while not self._is_closing:
            self.process.wait()
            if not self._is_closing:
                self.process = self._spawn()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError(f"no server after {START_S} s; see {self._log.name}")

    def kill_server(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def kill_engine(self) -> None:
        for child in psutil.Process(self.process.pid).children():
            child.send_signal(signal.SIGKILL)

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def close(self) -> None:
        self._is_closing = True
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


@contextmanager
def daemon(folder: Path, **options: Any) -> Iterator[Daemon]:
    folder.mkdir(parents=True, exist_ok=True)
    running = Daemon(folder, **options)
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


@dataclass(frozen=True)
class Ended:
    """What a run left: hashes of its last checkpoint's files, its losses, what it drew."""

    files: dict[str, str]
    losses: list[float]
    drawn: list[list[int]]


def run_script(
    server: Daemon,
    python: str,
    module: str,
    steps: int,
    on_line: Callable[[str], None] = lambda line: None,
    url: str | None = None,
) -> Ended:
    """Run the script to its end; `on_line` hears what it says, as it says it. Fails if it fails or says a word.

    `url` is where the script finds the server, if not at its own address."""
    environment = {
        **os.environ,
        "TINKER_BASE_URL": url or server.url,
        "TINKER_API_KEY": "tml-local",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    script = subprocess.Popen(
        [python, str(SCRIPT), module, str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    last = ""
    deadline = time.monotonic() + RUN_S
    assert script.stdout is not None
    assert script.stderr is not None
    try:
        while time.monotonic() < deadline:
            if not select.select([script.stdout], [], [], 1.0)[0]:
                continue
            line = script.stdout.readline()
            if not line:
                break
            last = line.strip()
            on_line(last)
        script.wait(30)
        errors = script.stderr.read()
        # threads that the official SDK leaves behind abort some of its exits, after all is done and said
        aborted = module == "tinker" and last.startswith("end ") and script.returncode == -signal.SIGABRT
        assert script.returncode == 0 or aborted, (
            f"after {last!r}:\n{errors[-4000:]}\n--- server:\n{server.log()[-3000:]}"
        )
    finally:
        if script.poll() is None:
            script.kill()
            script.wait()
        script.stdout.close()
        script.stderr.close()
    found = re.match(r"end (.*)", last)
    assert found, last
    report = json.loads(found[1])
    return Ended(_hashes(server.data_dir, report["path"]), report["losses"], report["drawn"])


def _hashes(data_dir: Path, path: str) -> dict[str, str]:
    run_id, kind, name = path.removeprefix("tinker://").split("/")
    cache = data_dir / "checkpoint-cache"  # of a server that keeps them in a bucket
    root = cache if cache.exists() else data_dir
    folders = list((root / "checkpoints" / run_id.replace(":", "~") / kind / name).iterdir())
    assert len(folders) == 1, folders
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folders[0].glob("*.safetensors")}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
