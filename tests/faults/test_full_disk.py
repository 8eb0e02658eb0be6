"""A full disk: reads go on, writes are refused with a reason, readiness ends, and all that passes by itself."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import numpy as np
import pytest

from tests.faults.conftest import at_length
from tests.faults.fake_server import fake_server
from tests.faults.killing import Ended, daemon, run_script
from tests.faults.test_broken_disk import WRITER
from tests.unit.server.tinker_client import PROTOBUF, datum, train_body
from tinsmith.control import ledger as module
from tinsmith.control.ledger import Ledger

WAIT_S = 30.0


def becomes(http: httpx2.Client, status: int) -> httpx2.Response:
    """The readiness that a server comes to."""
    deadline = time.monotonic() + WAIT_S
    while (answer := http.get("/readyz")).status_code != status and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answer.status_code == status, answer.text
    return answer


@pytest.mark.timeout(120)
def test_a_full_ledger_refuses_writes_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PREALLOCATED_BYTES", 4096)
    with fake_server(tmp_path, sweep_interval_s=0.1) as server, httpx2.Client(base_url=server.url) as http:
        ledger = server.control._ledger
        assert ledger is not None
        session_id = http.post("/api/v1/create_session", json={"tags": []}).json()["session_id"]
        asked = {"session_id": session_id, "model_seq_id": 0, "base_model": "tinsmith/fake"}
        model_id = http.post("/api/v1/create_model", json=asked | {"lora_config": {"rank": 4}}).json()["model_id"]
        limit(ledger, 1)
        noise = np.random.default_rng(0)
        data = tuple(datum(list(range(1, 200)), weights=noise.random(199).tolist()) for _ in range(500))
        large = train_body(model_id, 1, data=data)
        refused = http.post("/api/v1/forward_backward", content=large, headers=PROTOBUF)
        assert refused.status_code == 507, refused.text
        assert "disk is full" in refused.json()["detail"]
        assert refused.headers["x-should-retry"] == "true"
        assert http.get(f"/api/v1/training_runs/{model_id}").status_code == 200
        assert http.post("/api/v1/session_heartbeat", json={"session_id": session_id}).status_code == 200
        assert "full" in becomes(http, 503).json()["reason"]
        assert not server.trained
        limit(ledger, 2**30)
        becomes(http, 200)
        assert http.post("/api/v1/forward_backward", content=large, headers=PROTOBUF).status_code == 200


def limit(ledger: Ledger, max_pages: int) -> None:
    """As if the disk had no more room than this; at least what is there."""
    written = threading.Event()

    def work(connection: object) -> int:
        connection.execute(f"PRAGMA max_page_count={max_pages}")  # type: ignore[attr-defined]
        return 0

    ledger.post([work], lambda error: written.set())
    assert written.wait(WAIT_S)


@at_length
def test_a_process_that_may_not_have_larger_files_is_refused_and_not_broken(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    bound = 400_000

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bound, bound))

    run = subprocess.run(
        [sys.executable, str(WRITER), str(path), "100"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=small_files,
    )
    assert run.returncode == 4, run.stdout + run.stderr
    told = {line.split()[1] for line in run.stdout.splitlines() if line.startswith("told ")}
    assert told
    assert told == {entry.name for entry in Ledger(path).read()}


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Until there is no room left."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (65536, 512, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return ballast


@at_length
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sdk", ["tinsmith", "tinker"])
def test_a_run_waits_while_the_disk_is_full(
    sdk: str, undisturbed: dict[int, Ended], tmp_path: Path, tinker_python: str
) -> None:
    python = sys.executable if sdk == "tinsmith" else tinker_python
    refusals: list[str] = []

    with small_disk(tmp_path / "disk", 160) as disk, daemon(disk) as server, httpx2.Client(base_url=server.url) as http:

        def free(ballast: Path) -> None:
            refusals.append(becomes(http, 503).json()["reason"])
            ballast.unlink()

        def on_line(line: str) -> None:
            if line == "step 2":
                threading.Thread(target=free, args=(fill(disk),)).start()

        assert run_script(server, python, sdk, 6, on_line) == undisturbed[6]
        becomes(http, 200)
        assert server.num_starts == 1
    assert "full" in refusals[0]
