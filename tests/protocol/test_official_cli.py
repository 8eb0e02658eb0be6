"""The official command line, `tinker`, against `tinsmith serve`."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.protocol.conftest import Server

Tinker = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tinker(server: Server, tinker_python: Path) -> Tinker:
    """Run `tinker` with arguments; `ok=False` expects it to fail."""

    def run(
        *arguments: str, ok: bool = True, home: Path | None = None, stdin: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        if home is not None:
            variables["HOME"] = str(home)
        done = subprocess.run(
            [str(tinker_python.with_name("tinker")), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**server.environment, "COLUMNS": "200", **variables},
            input=stdin,
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


def _saved(server: Server, run_id: str, operation: str, name: str) -> str:
    """The path of a new checkpoint of the run, whatever was saved before."""
    with httpx2.Client(base_url=f"{server.url}/api/v1/", timeout=60) as http:
        for seq in range(4, 40):
            saved = _result(http, http.post(operation, json={"model_id": run_id, "seq_id": seq, "path": name}))
            if "path" in saved:
                path: str = saved["path"]
                return path
            assert "seq" in saved["error"], saved
    raise AssertionError("no free number")


class Hub:
    """As much of a model hub as an upload needs: every file comes inside the commit."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200 if "whoami" in self.path else 404, {"name": "me", "type": "user", "auth": {}})

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if "/preupload/" in self.path:
                    names = [file["path"] for file in json.loads(body)["files"]]
                    answer = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                    self._answer(200, {"files": answer})
                elif "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    files = [line["value"] for line in lines if line["key"] == "file"]
                    hub.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
                    self._answer(200, {"commitUrl": f"{hub.url}/me/adapter/commit/1", "commitOid": "1"})
                else:
                    self._answer(200, {"url": f"{hub.url}/me/adapter"})

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


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


def test_the_caller_has_an_identity(tinker: Tinker) -> None:
    whoami = json.loads(tinker("-f", "json", "auth", "whoami").stdout)
    assert whoami["user_urn"] == "tinsmith:user:local"
    assert whoami["org_urn"] == "tml:organization:local"


def test_a_key_is_stored_after_the_server_has_taken_it(tinker: Tinker, tmp_path: Path) -> None:
    tinker("auth", "login", home=tmp_path, stdin="tml-pasted\n")
    stored = tmp_path / ".tinker" / "credentials.json"
    assert "tml-pasted" in stored.read_text()
    tinker("auth", "logout", home=tmp_path)
    assert "tml-pasted" not in stored.read_text()


def test_a_model_that_is_not_there_is_said_not_to_be(tinker: Tinker) -> None:
    assert "tml:organization:local" in tinker("model", "list", "no-such-model", ok=False).stderr


def test_the_version_is_that_of_the_sdk(tinker: Tinker) -> None:
    assert re.search(r"\d+\.\d+", tinker("version").stdout)


def test_a_training_checkpoint_is_downloaded(tinker: Tinker, server: Server, run_id: str, tmp_path: Path) -> None:
    path = _saved(server, run_id, "save_weights", "for-download")
    tinker("checkpoint", "download", path, "--output", str(tmp_path))
    config = next(tmp_path.rglob("adapter_config.json"))
    assert json.loads(config.read_text())["r"] == 2
    assert config.with_name("adapter_model.safetensors").stat().st_size > 1000
    runs = json.loads(tinker("-f", "json", "checkpoint", "list").stdout)["checkpoints"]
    assert not [c for c in runs if c["checkpoint_type"] == "external"], "the export it made was not deleted"


def test_an_external_checkpoint_is_downloaded(tinker: Tinker, server: Server, run_id: str, tmp_path: Path) -> None:
    path = _saved(server, run_id, "save_weights_external", "export")
    tinker("checkpoint", "download", path, "--output", str(tmp_path))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.rglob("*")}
    tinker("checkpoint", "delete", path, "-y")


def test_a_sampler_checkpoint_is_refused_by_the_command_itself(tinker: Tinker, server: Server, run_id: str) -> None:
    path = _saved(server, run_id, "save_weights_for_sampler", "sampled")
    assert "Traceback" not in tinker("checkpoint", "download", path, ok=False).stderr


def test_a_checkpoint_is_pushed_to_a_hub(tinker: Tinker, server: Server, run_id: str, hub: Hub) -> None:
    path = _saved(server, run_id, "save_weights", "for-hub")
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_any", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    tinker("checkpoint", "push-hf", path, "--repo", "me/adapter", "--no-model-card", **variables)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files.keys()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "tinsmith/tiny"


def test_a_trace_is_exported(tinker: Tinker, run_id: str, tmp_path: Path) -> None:
    session_id = run_id.split(":")[0]
    target = tmp_path / "trace.pftrace"
    tinker("session", "export-trace", session_id, "--output", str(target))
    events = json.loads(target.read_bytes())["traceEvents"]
    assert {"CreateModel", "SaveWeights"} <= {event["name"] for event in events}
    url = tinker("session", "export-trace", session_id, "--url-only").stdout.strip()
    assert httpx2.get(url).status_code == 200
    assert "sess-none" in tinker("session", "export-trace", "sess-none", ok=False).stderr


def test_usage_and_storage_are_reported(tinker: Tinker, run_id: str) -> None:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    span = [moment.strftime("%Y-%m-%dT%H:%M:%SZ") for moment in (today, today + timedelta(days=1))]
    usage = json.loads(tinker("-f", "json", "billing", "usage", *span).stdout)
    kinds = {event["event_info"]["type"] for event in usage["data"] if event["session_id"] == run_id.split(":")[0]}
    assert {"checkpoint", "storage"} <= kinds
    storage = json.loads(tinker("-f", "json", "billing", "checkpoint-storage").stdout)
    assert storage["data"][0]["size_bytes"] > 0
