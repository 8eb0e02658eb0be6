from __future__ import annotations

import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

STARTUP_S_MAX = 60


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `tinsmith serve` on a free port: one for all tests, as each makes models and names of its own."""
    with _serving(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="session")
def deterministic_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same, of one whose numbers are bitwise those of an embedded engine with `deterministic`."""
    with _serving(tmp_path_factory.mktemp("server"), "--deterministic", "--dtype", "float32", "--threads", "1") as url:
        yield url


@contextmanager
def _serving(folder: Path, *options: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", "from tinsmith.cli import main; main()", "serve", "--port", "0",
         "--data-dir", str(folder), *options],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield _ready_url(process)
    finally:
        process.terminate()
        process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()


def _ready_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + STARTUP_S_MAX
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 1.0)[0]:
            line = process.stdout.readline()
            if found := re.search(r"TINKER_BASE_URL=(\S+)", line):
                return found[1]
            if not line:
                break
    pytest.fail(f"tinsmith serve was not ready after {STARTUP_S_MAX} s")
