"""`tinsmith serve` as a program: its one line, its refusals, its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.protocol.conftest import running_server, serve_command, serve_environment
from tinsmith.models import tiny_folder


def refused(folder: Path, *options: str) -> str:
    """Stderr of a server that must not start."""
    done = subprocess.run(
        serve_command(*options), capture_output=True, text=True, timeout=90, env=serve_environment(folder), check=False
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused(tmp_path, "--port", str(port))


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(tmp_path, "--port", "0", "--base-model", f"mine={empty}")


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no-such-architecture"}')
    assert "broken" in refused(tmp_path, "--port", "0", "--base-model", f"broken={broken}")


def test_a_signal_ends_a_busy_server_cleanly(tmp_path: Path) -> None:
    """Polls in flight are answered, the engine's process goes with the server, the data folder is free again."""
    model = f"my-model={tiny_folder()}"
    with running_server(tmp_path, "--base-model", model, "--dtype", "float32") as server:
        assert "my-model" in server.ready_line
        with httpx2.Client(base_url=f"{server.url}/api/v1/", timeout=60) as http:
            session_id = http.post("create_session", json={}).json()["session_id"]
            body = {"session_id": session_id, "model_seq_id": 0, "base_model": "my-model", "lora_config": {"rank": 2}}
            receipt = http.post("create_model", json=body).json()
            for _ in range(5):
                if http.post("retrieve_future", json={"request_id": receipt["request_id"]}).status_code == 200:
                    break
            info = http.post("get_info", json={"model_id": f"{session_id}:train:0"}).json()
            assert info["model_data"]["tokenizer_id"] == str(tiny_folder())
            waiting = {"model_id": f"{session_id}:train:0", "seq_id": 7, "path": "never"}
            stuck = {"request_id": http.post("save_weights", json=waiting).json()["request_id"]}
            statuses: list[int] = []
            poll = threading.Thread(
                target=lambda: statuses.append(http.post("retrieve_future", json=stuck).status_code), daemon=True
            )
            poll.start()
            time.sleep(0.5)
            children = psutil.Process(server.process.pid).children(recursive=True)
            assert children
            started = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(20) == 0
            assert time.monotonic() - started < 15
            poll.join(5)
            assert statuses == [408]
        gone, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, [process.cmdline() for process in alive]
        assert len(gone) == len(children)
        assert complaints(server.log.read_text()) == []


@pytest.mark.skipif(not hasattr(os, "getpgid"), reason="process groups")
def test_ctrl_c_in_a_terminal_reaches_server_and_engine_and_ends_quietly(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole process group; the engine must leave the ending to its server."""
    process = subprocess.Popen(
        serve_command("--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=serve_environment(tmp_path),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert "TINKER_BASE_URL=" in process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert complaints(errors) == []
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def complaints(log: str) -> list[str]:
    """What a server says on stderr beside what each engine loaded, and its end."""
    lines = log.splitlines()
    told = [line for line in lines if re.match(r"\S+ INFO +engine: base model ", line)]
    assert len(told) == 1
    ending = [line for line in lines if line.startswith(("Stopping:", "Stopped"))]
    assert len(ending) == 2
    return [line for line in lines if line not in told and line not in ending]
