"""A real server whose engine is stopped, killed and hung: readiness says so within seconds, and comes back."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import psutil

from tests.protocol.conftest import Server, running_server

SERVE = Path(__file__).with_name("serve_with_settings.py")
WAIT_S = 60.0


def serving(folder: Path, **health: float) -> AbstractContextManager[Server]:
    control = {"ledger": True, "health": {"is_on": True, **health}}
    command = [sys.executable, str(SERVE), "{}", json.dumps(control), "tinsmith/tiny"]
    return running_server(folder, command=command)


def engine_of(server: Server) -> psutil.Process:
    (child,) = psutil.Process(server.process.pid).children()
    return child


def readiness(server: Server) -> str | None:
    """`None` if it is ready, else why not."""
    answer = httpx2.get(f"{server.url}/readyz", timeout=10)
    assert (answer.status_code == 200) == (answer.json()["status"] == "ready")
    return answer.json().get("reason")


def wait_for(server: Server, *, ready: bool) -> str | None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        reason = readiness(server)
        if (reason is None) == ready:
            return reason
        time.sleep(0.2)
    raise AssertionError(f"still {'not ' if ready else ''}ready after {WAIT_S} s: {reason}")


def test_a_stopped_engine_turns_readiness_off_and_a_continued_one_on(tmp_path: Path) -> None:
    with serving(tmp_path, probe_interval_s=1.0) as server:
        assert readiness(server) is None, "ready means that a token was drawn"
        engine = engine_of(server)
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            assert "no sign of life" in str(wait_for(server, ready=False))
            assert httpx2.get(f"{server.url}/healthz").json() == {"status": "ok"}
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        wait_for(server, ready=True)
        assert engine_of(server).pid == engine.pid


def test_a_hung_engine_is_ended_and_another_started(tmp_path: Path) -> None:
    with serving(tmp_path, silent_after_s=2.0, hung_after_s=5.0) as server:
        hung = engine_of(server)
        os.kill(hung.pid, signal.SIGSTOP)
        wait_for(server, ready=False)
        wait_for(server, ready=True)
        assert engine_of(server).pid != hung.pid
        assert "hangs (no sign of life" in server.log.read_text()


def test_a_full_disk_turns_readiness_off_with_its_reason(tmp_path: Path) -> None:
    with serving(tmp_path, min_free_bytes=2**60) as server:
        assert "is full" in str(wait_for(server, ready=False))
