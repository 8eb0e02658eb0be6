"""System calls of the ledger that fail, or at which the process is killed: what was told to be on disk is there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.faults.conftest import at_length
from tests.faults.killing import daemon
from tinsmith.control.ledger import Ledger

WRITER = Path(__file__).with_name("ledger_writer.py")
SEED = 20261122
NUM_ENTRIES = 150
"""Enough for the log to be moved into the database several times."""


@dataclass(frozen=True, slots=True)
class Written:
    code: int
    told: set[str]
    refused: list[str]
    found: set[str]
    hit: str
    """The call that went wrong."""

    @property
    def is_of_ledger(self) -> bool:
        """SQLite ignores errors of directories."""
        return "ledger.sqlite3" in self.hit


def written_with(folder: Path, injection: str) -> Written:
    """What becomes of some entries if system calls go wrong as `injection` says, in the words of strace."""
    path = folder / "ledger.sqlite3"
    command = ["strace", "-f", "-y", "-o", str(folder / "trace"), "-e", f"inject={injection}"]
    command += ["-e", f"trace={injection.partition(':')[0]}", sys.executable, str(WRITER), str(path), str(NUM_ENTRIES)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = run.stdout.splitlines()
    trace = (folder / "trace").read_text().splitlines()
    return Written(
        code=run.returncode,
        told={line.split()[1] for line in lines if line.startswith("told ")},
        refused=[line for line in lines if line.startswith("refused ")],
        hit=next((line for line in trace if "INJECTED" in line or "= ?" in line), ""),
        found={entry.name for entry in Ledger(path).read()} if "open" in lines else set(),
    )


def moments(highest: int, count: int) -> list[int]:
    """The first ones, where most kinds of writes are, and some drawn from all."""
    first = list(range(1, count // 2))
    return first + sorted(random.Random(SEED).sample(range(count // 2, highest), count - len(first)))


@at_length
@pytest.mark.timeout(600)
def test_a_sync_that_fails_is_for_good(tmp_path: Path) -> None:
    codes = set()
    for number in moments(150, 24):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = written_with(folder, f"fdatasync:error=EIO:when={number}")
        assert ended.told <= ended.found, number
        assert ended.code != 0 or not ended.is_of_ledger, (number, ended.hit)
        assert len(ended.refused) <= 1, "nothing may be tried again"
        codes.add(ended.code)
    assert {1, 3} <= codes, "some while it opens, some while it writes"


@at_length
@pytest.mark.timeout(600)
def test_a_write_that_finds_no_room_is_refused_and_the_next_is_taken(tmp_path: Path) -> None:
    num_refused = 0
    for number in moments(1200, 24):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = written_with(folder, f"pwrite64:error=ENOSPC:when={number}")
        assert ended.told <= ended.found, number
        assert ended.code in (0, 1), number
        if ended.code == 0:
            assert len(ended.told) + len(ended.refused) == NUM_ENTRIES
            num_refused += len(ended.refused)
    assert num_refused >= 3


@at_length
@pytest.mark.timeout(600)
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync"])
def test_a_process_killed_in_a_system_call_has_told_no_lie(tmp_path: Path, call: str) -> None:
    for number in moments({"pwrite64": 1200, "fdatasync": 150}[call], 24):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = written_with(folder, f"{call}:signal=SIGKILL:when={number}")
        assert ended.code == -signal.SIGKILL, (number, ended.hit)
        assert ended.told <= ended.found, number


@at_length
@pytest.mark.timeout(300)
def test_a_server_whose_disk_breaks_ends_and_its_successor_goes_on(tmp_path: Path) -> None:
    """Nothing is retried after a failed sync: the process ends with an error, and the next one reads what is there."""
    asked = {"base_model": "tinsmith/tiny", "model_seq_id": 0, "lora_config": {"rank": 4}}
    with daemon(tmp_path) as server, httpx2.Client(base_url=server.url, timeout=30) as http:
        session_id = http.post("/api/v1/create_session", json={"tags": []}).json()["session_id"]
        receipt = http.post("/api/v1/create_model", json=asked | {"session_id": session_id})
        assert receipt.status_code == 200
        first = server.process
        command = ["strace", "-f", "-o", str(tmp_path / "trace"), "-p", str(first.pid)]
        with subprocess.Popen([*command, "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO"]) as tracer:
            time.sleep(2)
            with suppress(httpx2.TransportError):  # the answer may be lost with the server
                refused = http.post("/api/v1/create_model", json=asked | {"session_id": session_id, "model_seq_id": 1})
                assert refused.status_code == 507
            assert first.wait(90) == 1
            tracer.wait(30)
        server.wait_ready()
        assert server.num_starts == 2
        assert "nothing more is taken" in server.log()
        body = {"request_id": receipt.json()["request_id"]}
        assert http.post("/api/v1/retrieve_future", json=body).json()["model_id"] == receipt.json()["model_id"]
