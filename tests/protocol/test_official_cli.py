"""The official command line, `tinker`, against `tinsmith serve`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.protocol.conftest import Server

Tinker = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tinker(server: Server, tinker_python: Path) -> Tinker:
    """Run `tinker` with arguments; `ok=False` expects it to fail."""

    def run(*arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(tinker_python.with_name("tinker")), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**server.environment, "COLUMNS": "200"},
            check=False,
        )
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def run_id(server: Server) -> str:
    """A training run with the checkpoints `one`, `two` and `three`."""
    with httpx2.Client(base_url=f"{server.url}/api/v1/", timeout=60) as http:
        session_id = http.post("create_session", json={}).json()["session_id"]
        model = {"session_id": session_id, "model_seq_id": 0, "base_model": "tinsmith/tiny", "lora_config": {"rank": 2}}
        model_id: str = _result(http, http.post("create_model", json=model))["model_id"]
        for number, name in enumerate(("one", "two", "three"), start=1):
            body = {"model_id": model_id, "seq_id": number, "path": name, "user_metadata": {"number": str(number)}}
            assert "path" in _result(http, http.post("save_weights", json=body))
    return model_id


def _result(http: httpx2.Client, receipt: httpx2.Response) -> dict[str, Any]:
    for _ in range(5):
        answer = http.post("retrieve_future", json={"request_id": receipt.json()["request_id"]})
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
    raise AssertionError(answer.text)


def test_runs_are_listed_and_described(tinker: Tinker, run_id: str) -> None:
    runs = json.loads(tinker("-f", "json", "run", "list").stdout)["runs"]
    assert run_id in [run["training_run_id"] for run in runs]
    assert run_id in tinker("run", "list").stdout
    assert "Rank 2" in tinker("run", "info", run_id).stdout
    assert "nothing-here" in tinker("run", "info", "nothing-here", ok=False).stderr


def test_checkpoints_are_listed_and_described(tinker: Tinker, run_id: str) -> None:
    listed = json.loads(tinker("-f", "json", "checkpoint", "list", "--run-id", run_id).stdout)["checkpoints"]
    assert sorted(c["checkpoint_id"] for c in listed) == ["weights/one", "weights/three", "weights/two"]
    everything = json.loads(tinker("-f", "json", "checkpoint", "list").stdout)["checkpoints"]
    assert {c["tinker_path"] for c in listed} <= {c["tinker_path"] for c in everything}
    info = json.loads(tinker("-f", "json", "checkpoint", "info", f"tinker://{run_id}/weights/one").stdout)
    assert info["checkpoint_id"] == "weights/one"


def test_a_checkpoint_is_published_dated_and_deleted(tinker: Tinker, server: Server, run_id: str) -> None:
    path = f"tinker://{run_id}/weights/two"

    def stored() -> dict[str, Any] | None:
        answer = httpx2.get(f"{server.url}/api/v1/training_runs/{run_id}/checkpoints")
        return next((c for c in answer.json()["checkpoints"] if c["tinker_path"] == path), None)

    for command, field, expected in (
        (("publish", path), "public", True),
        (("unpublish", path), "public", False),
        (("set-ttl", path, "--remove"), "expires_at", None),
    ):
        tinker("checkpoint", *command)
        checkpoint = stored()
        assert checkpoint is not None
        assert checkpoint.get(field) == expected, command
    tinker("checkpoint", "set-ttl", path, "--ttl", "7200")
    checkpoint = stored()
    assert checkpoint is not None
    assert checkpoint["expires_at"]
    tinker("checkpoint", "delete", path, "-y")
    assert stored() is None
    assert path in tinker("checkpoint", "info", path, ok=False).stderr


def test_all_checkpoints_of_a_run_are_deleted_at_once(tinker: Tinker, run_id: str) -> None:
    tinker("checkpoint", "delete", "--run-id", run_id, "-y")
    assert json.loads(tinker("-f", "json", "checkpoint", "list", "--run-id", run_id).stdout)["checkpoints"] == []


def test_models_are_listed(tinker: Tinker) -> None:
    assert "tinsmith/tiny" in tinker("model", "list").stdout
    assert "tinsmith/tiny" in tinker("model", "list", "tiny").stdout


def test_the_key_of_the_ready_line_is_accepted(tinker: Tinker) -> None:
    assert "Tinker accessible: yes" in tinker("auth", "status").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("session", "export-trace", "sess-any"),
        ("billing", "checkpoint-storage"),
        ("checkpoint", "push-hf", "tinker://{run_id}/weights/one", "--repo", "a/b"),
    ],
)
def test_what_is_not_there_fails_at_once_and_says_why(tinker: Tinker, run_id: str, arguments: tuple[str, ...]) -> None:
    failed = tinker(*(argument.format(run_id=run_id) for argument in arguments), ok=False)
    assert failed.returncode == 1
    assert failed.stderr.strip()
    assert "Traceback" not in failed.stderr
