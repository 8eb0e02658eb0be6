"""The application around the routes: errors, health, documents, polls that end early."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.server.tinker_client import Client, OpenServer, datum
from tinsmith import __version__
from tinsmith.control.futures import Outcome
from tinsmith.embedded import parse_local_url
from tinsmith.server.assemble import default_data_dir, open_control
from tinsmith.server.errors import is_loopback, status_of
from tinsmith.server.run import bind, serve_app, url_of
from tinsmith.server.tinker.results import encode_failure, encode_result
from tinsmith.types import ForwardBackwardOutput, SampledSequence, SampleResponse, TensorData, TopkLogprobs
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import (
    AlreadyExists,
    InvalidInput,
    NotFound,
    Overloaded,
    PayloadConflict,
    StorageError,
    Unsupported,
)
from tinsmith.wire.tinker_proto import CONTENT_TYPE, decode_sample_response

pytestmark = pytest.mark.anyio


# ---- errors ----


async def test_an_unknown_path_is_404_and_named(client: Client) -> None:
    answer = await client.get("no/such/thing")
    assert answer.status_code == 404
    assert "GET /api/v1/no/such/thing" in answer.json()["detail"]
    answer = await client.get("asample")
    assert answer.status_code == 405
    assert "/api/v1/asample" in answer.json()["detail"]
    answer = await client.http.request("OPTIONS", "/api/v1/sessions/search")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_a_key_is_described_and_cannot_be_revoked(client: Client) -> None:
    described = (await client.get("auth/apikey/me", headers={"x-api-key": "tml-any"})).json()
    assert described["details"] == {"org_details": {"name": "local"}, "user_details": {"email": "local"}}
    assert type(described["key_id"]) is int
    refused = await client.http.delete("/api/v1/auth/apikey/me")
    assert refused.status_code == 400
    assert "no keys" in refused.json()["detail"]


@pytest.mark.parametrize(
    "path",
    [
        "training_runs/none",
        "training_runs/none/checkpoints",
        "sessions/none",
        "samplers/none",
    ],
)
async def test_what_does_not_exist_is_404(client: Client, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert "none" in answer.json()["detail"]


async def test_get_info_of_an_unknown_model_is_404(client: Client) -> None:
    assert (await client.post("get_info", {"model_id": "none"})).status_code == 404


async def test_a_path_that_is_no_checkpoint_path_is_400(client: Client) -> None:
    answer = await client.post("weights_info", {"tinker_path": "/etc/passwd"})
    assert answer.status_code == 400
    assert "'/etc/passwd'" in answer.json()["detail"]
    answer = await client.post("weights_info", {"tinker_path": "tinker://none/weights/none"})
    assert answer.status_code == 404


def test_no_permanent_error_has_a_status_that_is_sent_again() -> None:
    for error in (InvalidInput("x"), NotFound("x"), AlreadyExists("x"), PayloadConflict("x"), Unsupported("x")):
        assert status_of(error) in (400, 404)
    assert status_of(Overloaded("x")) == 429
    assert status_of(StorageError("x")) == 500


async def test_an_unforeseen_error_is_logged_under_a_number_and_tells_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the secret plan")

    monkeypatch.setattr(client.app.state.service.control.library, "list_sessions", broken)
    answer = await client.get("sessions", headers={"x-api-key": "tml-secret-key"})
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    detail = answer.json()["detail"]
    assert "secret" not in detail
    incident = detail.split()[2].rstrip(";")
    assert incident in caplog.text
    assert "the secret plan" in caplog.text
    assert "tml-secret-key" not in caplog.text


async def test_a_fault_while_reading_a_training_body_is_a_failed_future(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = await client.model()
    monkeypatch.setattr("tinsmith.server.tinker.decode.decode_train_request", lambda body: 1 / 0)
    failed = await client.result(await client.train(model_id, 1))
    assert failed["category"] == "server"
    assert "internal error" in failed["error"]


async def test_a_fault_while_encoding_a_result_is_a_failed_future(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = await client.sample(await client.sampler())
    monkeypatch.setattr("tinsmith.server.tinker.futures.encode_result", lambda *_: 1 / 0)
    failed = await client.result(receipt)
    assert failed["category"] == "server"
    assert "internal error" in failed["error"]


async def test_a_full_sample_queue_is_429_that_asks_to_come_again(open_server: OpenServer) -> None:
    async with open_server(control={"max_pending_samples": 3}) as client:
        sampler = await client.sampler()
        client.engine.pause()
        answers = [await client.sample(sampler, seq) for seq in range(8)]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        assert {answer.status_code for answer in refused} == {429}
        assert refused[0].headers["x-should-retry"] == "true"
        assert float(refused[0].headers["retry-after"]) > 0
        client.engine.resume()
        for answer in answers:
            if answer.status_code == 200:
                assert "error" not in await client.result(answer)
        assert "error" not in await client.result(await client.sample(sampler, 7))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
        ({"host": "[evil"}, 403),
    ],
)
async def test_a_server_without_keys_answers_under_its_own_name_only(
    open_server: OpenServer, headers: dict[str, str], status: int
) -> None:
    async with open_server(loopback_hosts_only=True) as client:
        answer = await client.get("sessions", headers=headers)
        assert answer.status_code == status
        if status == 403:
            assert "evil" in answer.json()["detail"] or "null" in answer.json()["detail"]


# ---- polls ----


def scope_of(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "server": ("test", 80),
        "client": ("test", 1),
    }


async def test_an_upload_that_breaks_off_is_no_error_of_ours(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    await inbox.put({"type": "http.request", "body": b"{", "more_body": True})
    await inbox.put({"type": "http.disconnect"})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await client.app(scope_of("/api/v1/asample"), inbox.get, send)
    assert sent[0]["status"] == 499
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_that_leaves_frees_its_poll(client: Client) -> None:
    client.engine.pause()
    receipt = await client.sample(await client.sampler())
    body = json.dumps({"request_id": receipt.json()["request_id"]}).encode()
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = scope_of("/api/v1/retrieve_future")
    await inbox.put({"type": "http.request", "body": body, "more_body": False})
    poll = asyncio.create_task(client.app(scope, inbox.get, send))
    await asyncio.sleep(0.05)
    service = client.app.state.service
    assert service.num_open_polls == 1
    await inbox.put({"type": "http.disconnect"})
    await asyncio.wait_for(poll, 1.0)
    assert service.num_open_polls == 0


async def test_draining_answers_every_poll_with_still_pending(client: Client) -> None:
    client.engine.pause()
    sampler = await client.sampler()
    receipts = [await client.sample(sampler, seq) for seq in range(5)]
    polls = [asyncio.create_task(client.poll(receipt)) for receipt in receipts]
    await asyncio.sleep(0.05)
    client.app.state.service.drain()
    answers = await asyncio.wait_for(asyncio.gather(*polls), 1.0)
    assert {answer.status_code for answer in answers} == {408}
    late = await asyncio.wait_for(client.poll(receipts[0]), 1.0)
    assert late.status_code == 408


async def test_a_large_result_is_announced_first_to_those_who_ask(open_server: OpenServer) -> None:
    async with open_server(metadata_only_bytes=500) as client:
        model_id = await client.model()
        small, large = await client.train(model_id, 1), await client.train(model_id, 2, data=(datum([1] * 200),))
        assert (await client.poll(small, accept=CONTENT_TYPE, metadata_only=True)).headers[
            "content-type"
        ] == CONTENT_TYPE
        announced = (await client.poll(large, accept=CONTENT_TYPE, metadata_only=True)).json()
        assert announced["status"] == "complete_metadata"
        full = await client.poll(large, accept=CONTENT_TYPE)
        assert full.headers["content-type"] == CONTENT_TYPE
        assert announced["response_payload_size"] == len(full.content)


async def test_cancelling_a_sample_fails_it_and_is_idempotent(client: Client) -> None:
    client.engine.pause()
    receipt = await client.sample(await client.sampler())
    for _ in range(2):
        assert (await client.post("cancel_future", {"request_id": receipt.json()["request_id"]})).status_code == 200
    client.engine.resume()
    assert (await client.result(receipt))["category"] == "user"


# ---- results ----


def test_a_sample_in_json_has_null_where_there_is_no_number() -> None:
    response = SampleResponse(
        sequences=[
            SampledSequence(
                stop_reason="length", tokens_np=np.array([5, 6]), logprobs_np=np.array([-1.5, -2.5], np.float32)
            )
        ],
        prompt_logprobs_np=np.array([np.nan, -0.5], np.float32),
        topk_prompt_logprobs_np=TopkLogprobs(np.array([[0, 0], [3, 4]]), np.array([[-99999.0] * 2, [-1.0, -2.0]])),
    )
    outcome = Outcome(request_type="Sample", result=response)
    content_type, body = encode_result(outcome, "application/json")
    assert content_type == "application/json"
    decoded = json.loads(body)
    assert decoded["type"] == "sample"
    assert decoded["prompt_logprobs"] == [None, -0.5]
    assert decoded["topk_prompt_logprobs"] == [None, [[3, -1.0], [4, -2.0]]]
    sequence = decoded["sequences"][0]
    assert (sequence["stop_reason"], sequence["tokens"], sequence["logprobs"]) == ("length", [5, 6], [-1.5, -2.5])
    content_type, body = encode_result(outcome, CONTENT_TYPE)
    assert decode_sample_response(body, ["id"]).sequences[0].tokens == [5, 6]
    assert set(outcome.encoded) == {"application/json", CONTENT_TYPE}


def test_a_metric_that_is_no_number_is_left_out_of_json() -> None:
    outcome = Outcome(request_type="OptimStep", result={"grad_norm": float("nan"), "step_applied": 1.0})
    assert json.loads(encode_result(outcome, "application/json")[1]) == {"metrics": {"step_applied": 1.0}}


def test_a_sparse_output_is_dense_in_json() -> None:
    sparse = TensorData([5.0], "float32", [2, 2], [0, 0, 1], [1])
    output = ForwardBackwardOutput("ArrayRecord", [{"logprobs": sparse}], {"loss:sum": 1.0})
    decoded = json.loads(encode_result(Outcome(request_type="ForwardBackward", result=output), "")[1])
    assert decoded["loss_fn_outputs"] == [
        {"logprobs": {"data": [0.0, 0.0, 0.0, 5.0], "dtype": "float32", "shape": [2, 2]}}
    ]


def test_a_failure_without_text_still_says_something() -> None:
    failed = json.loads(encode_failure(Outcome(request_type="Sample", error=StorageError())))
    assert failed == {"error": "StorageError()", "category": "server"}


# ---- the rest of the application ----


async def test_health_readiness_and_the_front_page(client: Client) -> None:
    for path in ("/healthz", "/api/v1/healthz"):
        assert (await client.http.get(path)).json() == {"status": "ok"}
    assert (await client.http.get("/readyz")).json() == {"status": "ready"}
    page = (await client.http.get("/")).json()
    assert (page["name"], page["version"], page["models"]) == ("tinsmith", __version__, ["tinsmith/fake"])


async def test_a_dead_engine_is_not_ready_but_healthy(open_server: OpenServer) -> None:
    async with open_server(control={"sweep_interval_s": 0.02}) as client:
        client.engine.die("killed")
        await asyncio.sleep(0.1)
        answer = await client.http.get("/readyz")
        assert answer.status_code == 503
        assert "killed" in answer.json()["reason"] or "died" in answer.json()["reason"]
        assert (await client.http.get("/healthz")).status_code == 200


async def test_telemetry_is_accepted_and_neither_logged_nor_kept(
    client: Client, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    event = {"event": "GENERIC_EVENT", "event_data": {"request_headers": {"x-api-key": "tml-leaked"}}}
    with caplog.at_level(logging.DEBUG):
        assert (await client.post("telemetry", {"events": [event]})).json() == {"status": "accepted"}
        answer = await client.http.post("/api/v1/telemetry", content=b"tml-leaked, and no JSON")
        assert answer.json() == {"status": "accepted"}
    assert "tml-leaked" not in caplog.text
    assert not files_holding(b"tml-leaked", tmp_path)


def files_holding(text: bytes, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]


async def test_the_openapi_document_has_the_raw_routes_too(client: Client) -> None:
    document = (await client.http.get("/openapi.json")).json()
    paths = document["paths"]
    for path in ("retrieve_future", "forward_backward", "asample", "create_session", "training_runs/{run_id}"):
        assert f"/api/v1/{path}" in paths
    content = paths["/api/v1/forward_backward"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", CONTENT_TYPE}
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]


async def test_lists_are_paged_and_newest_first(client: Client) -> None:
    session_id = await client.session()
    models = [await client.model(session_id, number) for number in range(3)]
    for number, model_id in enumerate(models):
        body = {"model_id": model_id, "seq_id": 1, "path": f"c{number}"}
        await client.result(await client.post("save_weights", body))
    listed = (await client.get("training_runs", params={"limit": 2, "offset": 0})).json()
    assert listed["cursor"] == {"offset": 0, "limit": 2, "total_count": 3}
    rest = (await client.get("training_runs", params={"limit": 2, "offset": 2})).json()
    ids = [run["training_run_id"] for run in listed["training_runs"] + rest["training_runs"]]
    assert sorted(ids) == sorted(models)
    checkpoints = (await client.get("checkpoints")).json()
    assert [c["checkpoint_id"] for c in checkpoints["checkpoints"]] == [f"weights/c{n}" for n in (2, 1, 0)]
    assert checkpoints["cursor"]["total_count"] == 3
    session = (await client.get(f"sessions/{session_id}")).json()
    assert session["training_run_ids"] == models
    assert (await client.get("sessions")).json()["sessions"] == [session_id]


async def test_a_query_that_makes_no_sense_is_named(client: Client) -> None:
    answer = await client.get("training_runs", params={"limit": "many"})
    assert answer.status_code == 400
    assert "limit" in answer.json()["detail"]
    assert "'many'" in answer.json()["detail"]


async def test_joining_a_sampling_session_gives_numbers_of_ones_own(client: Client) -> None:
    sampler = await client.sampler()
    numbers = [
        (await client.post("join_sampling_session", {"sampling_session_id": sampler})).json()["client_counter"]
        for _ in range(3)
    ]
    assert numbers == [1, 2, 3]
    assert (await client.post("join_sampling_session", {"sampling_session_id": "none"})).status_code == 404


async def test_capabilities_name_the_models_and_their_context(client: Client) -> None:
    models = (await client.get("get_server_capabilities")).json()["supported_models"]
    assert models == [{"model_name": "tinsmith/fake", "max_context_length": 256, "trainable": True, "sampleable": True}]


async def test_weights_info_tells_the_shape_of_a_checkpoint(client: Client) -> None:
    model_id = await client.model()
    saved = await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "a"}))
    info = (await client.post("weights_info", {"tinker_path": saved["path"]})).json()
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == ("tinsmith/fake", True, 4)
    sampler = await client.sampler(base_model=None, model_path=saved["path"])
    described = (await client.get(f"samplers/{sampler}")).json()
    assert described == {
        "sampler_id": sampler,
        "base_model": "tinsmith/fake",
        "model_path": saved["path"],
        "tokenizer_id": "tinsmith/fake",
    }


# ---- starting a server ----


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("localhost", True),
        ("a.localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.example", False),
    ],
)
def test_loopback_addresses_are_told_from_others(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


async def test_other_addresses_are_not_served_without_asking_for_keys(client: Client) -> None:
    with bind("0.0.0.0", 0) as listener, pytest.raises(InvalidInput, match=r"0\.0\.0\.0.*keys"):
        await serve_app(client.app, listener, on_ready=lambda: None)


def test_a_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(InvalidInput, match=str(port)):
            bind("127.0.0.1", port)


def test_a_bound_port_refuses_connections_until_the_server_listens() -> None:
    with bind("127.0.0.1", 0) as listener, socket.socket() as probe:
        with pytest.raises(ConnectionRefusedError):
            probe.connect(listener.getsockname())


def test_a_model_name_given_twice_is_refused(tmp_path: Path) -> None:
    source = ModelSource(name="a", location="x")
    with pytest.raises(InvalidInput, match="'a' is given twice"):
        open_control([source, source], EngineOptions(), tmp_path)


def test_the_data_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINSMITH_DATA_DIR", str(tmp_path / "here"))
    assert default_data_dir() == tmp_path / "here"
    monkeypatch.delenv("TINSMITH_DATA_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "tinsmith"


def test_local_urls_carry_options() -> None:
    assert parse_local_url("local:") == {}
    assert parse_local_url("local://?dtype=float32") == {"dtype": ["float32"]}
    options = parse_local_url("local:?base_model=a%3D/x&base_model=b&data_dir=/tmp/y")
    assert options == {"base_model": ["a=/x", "b"], "data_dir": ["/tmp/y"]}


@pytest.mark.parametrize(
    "url", ["http:", "local:elsewhere", "local:?color=red", "local:?dtype=", "local:?dtype=a&dtype=b"]
)
def test_local_urls_of_another_form_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput):
        parse_local_url(url)
