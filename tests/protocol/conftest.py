"""A real server in a process of its own, and the official SDK in its own environment."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.server.chat_server import hermes_folder
from tinsmith.data import Trajectory, read_trajectories

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    process: subprocess.Popen[str]
    ready_line: str
    url: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """For a program that uses this server; the variables are those of the ready line."""
        pairs = dict(word.split("=", 1) for word in self.ready_line.split() if word.startswith("TINKER_"))
        return {**os.environ, **pairs, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def serve_command(*options: str) -> list[str]:
    return [str(Path(sys.executable).with_name("tinsmith")), "serve", *options]


def serve_environment(data_dir: Path) -> dict[str, str]:
    return {**os.environ, "TINSMITH_DATA_DIR": str(data_dir), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def running_server(folder: Path, *options: str, command: list[str] | None = None) -> Iterator[Server]:
    """`tinsmith serve`, or another `command` of its manners, on a free port, ready; ended by SIGTERM, which it must
    obey cleanly."""
    log = folder / "serve.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command or serve_command("--port", "0", *options),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=serve_environment(folder / "data"),
        )
        try:
            line = _first_line(process, log)
            url = re.search(r"TINKER_BASE_URL=(\S+)", line)
            assert url is not None, line
            yield Server(process=process, ready_line=line, url=url.group(1), log=log)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(STOP_TIMEOUT_S)
            assert process.returncode == 0, log.read_text()
            assert process.stdout is not None
            assert process.stdout.read() == "", "only one line may be printed"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _first_line(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.2)[0]:
            line = process.stdout.readline()
            assert line, f"the server ended before it was ready:\n{log.read_text()}"
            return line.strip()
    raise AssertionError(f"the server was not ready after {START_TIMEOUT_S} s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server"), "--dtype", "float32") as running:
        yield running


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatServer:
    """A recording server with the shipped model, and with the same under a template that knows tools."""

    url: str
    records: Path
    plain: str
    with_tools: str

    def recorded(self, conversation_id: str) -> list[Trajectory]:
        return [one for one in read_trajectories(self.records) if one.conversation_id == conversation_id]


@pytest.fixture(scope="session")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    folder = tmp_path_factory.mktemp("chat")
    plain, with_tools = "tinsmith/tiny", "acme/private"
    model = f"{with_tools}={hermes_folder(folder / 'hermes')}"
    options = ["--dtype", "float32", "--base-model", plain, "--base-model", model]
    with running_server(folder, *options, "--record", str(folder / "records")) as running:
        yield ChatServer(url=running.url, records=folder / "records", plain=plain, with_tools=with_tools)


@pytest.fixture(scope="session")
def tinker_python() -> Path:
    """The interpreter that has the official SDK."""
    given = os.environ.get("TINSMITH_TINKER_PYTHON")
    python = Path(given) if given else ROOT / ".venv-tinker" / "bin" / "python"
    assert python.is_file(), (
        f"{python} does not exist; `make test` builds this environment with the official SDK, "
        "or set TINSMITH_TINKER_PYTHON to an interpreter that has `tinker`"
    )
    return python
