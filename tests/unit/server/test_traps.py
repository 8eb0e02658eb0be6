"""The traps of the Tinker protocol that a server can fall into, by their numbers."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import uvicorn

from tests.unit.server.tinker_client import Client, OpenServer, datum, train_body
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FAKE_CARD
from tinsmith.server import ServerSettings
from tinsmith.types import TensorData
from tinsmith.types.errors import StorageError
from tinsmith.types.operations import OptimStep, SaveAdapter, TrainItem
from tinsmith.wire import tinker_pb2 as pb
from tinsmith.wire.compression import compress
from tinsmith.wire.tinker_proto import CONTENT_TYPE, decode_forward_backward_output, decode_sample_response

pytestmark = pytest.mark.anyio

ADAM = {
    "learning_rate": 0.001,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 0.0,
}


def optim(model_id: str, seq_id: int, **changes: float) -> dict[str, object]:
    return {"model_id": model_id, "seq_id": seq_id, "adam_params": ADAM | changes, "type": "optim_step"}


async def test_t01_bad_data_is_a_receipt_and_a_failed_future(client: Client) -> None:
    model_id = await client.model()
    message = pb.ForwardBackwardRequest.FromString(train_body(model_id, 1))
    message.data[0].loss_fn_inputs["weights"].dtype = 9
    receipt = await client.send_train(message.SerializeToString())
    failed = await client.result(receipt)
    assert failed["category"] == "user"
    assert "data[0].loss_fn_inputs['weights']" in failed["error"]
    assert "9" in failed["error"]
    fine = await client.result(await client.train(model_id, 2))
    assert fine["metrics"]["loss:sum"] > 0


@pytest.mark.parametrize("cut", [1, 5, 40])
async def test_t01_a_damaged_body_that_names_its_model_is_a_failed_future(client: Client, cut: int) -> None:
    model_id = await client.model()
    failed = await client.result(await client.send_train(train_body(model_id, 1)[:-cut]))
    assert failed["category"] == "user"
    assert "ForwardBackwardRequest" in failed["error"]
    assert "error" not in await client.result(await client.train(model_id, 2))


async def test_t01_a_zstd_bomb_is_a_failed_future(open_server: OpenServer) -> None:
    async with open_server(max_expanded_bytes=100_000) as client:
        model_id = await client.model()
        message = pb.ForwardBackwardRequest.FromString(train_body(model_id, 1))
        message.data[0].model_input[0].encoded_text.tokens = b"\0" * 10_000_000
        body = compress(message.SerializeToString())
        assert len(body) < 10_000
        failed = await client.result(await client.send_train(body, content_encoding="zstd"))
        assert failed["category"] == "user"
        assert "100000 bytes" in failed["error"]
        assert "error" not in await client.result(await client.train(model_id, 2))


async def test_t01_no_data_at_all_is_a_failed_future(client: Client) -> None:
    model_id = await client.model()
    failed = await client.result(await client.train(model_id, 1, data=()))
    assert failed["category"] == "user"
    assert "empty" in failed["error"]


async def test_a_full_disk_fails_the_save_and_nothing_else(client: Client) -> None:
    model_id = await client.model()
    client.engine.fail_next(SaveAdapter, StorageError("no space left on the disk"))
    save = {"model_id": model_id, "path": "a"}
    failed = await client.result(await client.post("save_weights", save | {"seq_id": 1}))
    assert failed["category"] == "server"
    assert "no space left" in failed["error"]
    assert "error" not in await client.result(await client.train(model_id, 2))
    assert "error" not in await client.result(await client.post("save_weights", save | {"seq_id": 3}))


async def test_t01_an_unknown_model_is_a_failed_future(client: Client) -> None:
    failed = await client.result(await client.train("sess-none:train:0", 1))
    assert failed["category"] == "user"
    assert "sess-none:train:0" in failed["error"]


async def test_t02_later_chunks_are_answered_before_the_first_has_come(client: Client) -> None:
    model_id = await client.model()
    late = [await client.train(model_id, seq, data=(datum([seq, seq]),)) for seq in (3, 2)]
    assert [r.status_code for r in late] == [200, 200]
    first = await client.train(model_id, 1, data=(datum([1, 1]),))
    for receipt in (first, *late):
        assert "error" not in await client.result(receipt)
    order = [
        operation.data[0].model_input.to_ints()[0]
        for operation in client.engine.operations
        if isinstance(operation, TrainItem)
    ]
    assert order == [1, 2, 3]


async def test_t03_a_poll_without_result_is_held(open_server: OpenServer) -> None:
    async with open_server(poll_hold_s=0.3) as client:
        model_id = await client.model()
        receipt = await client.train(model_id, 2)
        started = time.perf_counter()
        answer = await client.poll(receipt)
        assert time.perf_counter() - started >= 0.29
        assert answer.status_code == 408
        assert answer.json()["type"] == "try_again"
        assert answer.json()["request_id"] == receipt.json()["request_id"]
        assert answer.json()["queue_state"] in ("active", "paused_capacity", "paused_rate_limit")
        assert int(answer.headers["content-length"]) == len(answer.content)


async def test_t03_a_held_poll_ends_with_the_result(client: Client) -> None:
    model_id = await client.model()
    receipt = await client.train(model_id, 2)
    poll = asyncio.create_task(client.poll(receipt))
    await asyncio.sleep(0.05)
    await client.train(model_id, 1)
    answer = await asyncio.wait_for(poll, 2.0)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("forward_backward", b"\xff\xff no protobuf"),
        ("asample", b"{"),
        ("create_session", b"[1]"),
        ("optim_step", b'{"type": "optim_step"}'),
        ("create_model", b'{"session_id": 1}'),
    ],
)
async def test_t04_a_400_has_a_content_length(client: Client, path: str, body: bytes) -> None:
    kind = CONTENT_TYPE if path == "forward_backward" else "application/json"
    answer = await client.http.post(f"/api/v1/{path}", content=body, headers={"content-type": kind})
    assert answer.status_code == 400
    assert int(answer.headers["content-length"]) == len(answer.content) > 0
    assert answer.json()["detail"]


async def test_t05_a_name_clash_is_a_failed_future_not_409(client: Client) -> None:
    model_id = await client.model()
    save = {"model_id": model_id, "path": "once", "overwrite": False, "type": "save_weights"}
    assert (await client.result(await client.post("save_weights", save | {"seq_id": 1})))["path"].endswith("/once")
    clash = await client.post("save_weights", save | {"seq_id": 2})
    failed = await client.result(clash)
    assert failed["category"] == "user"
    assert "once" in failed["error"]


async def test_t05_publishing_twice_is_not_409(client: Client) -> None:
    model_id = await client.model()
    await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "a"}))
    url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/a/publish"
    for _ in range(2):
        assert (await client.http.post(url)).status_code == 204
    assert (await client.get(f"training_runs/{model_id}/checkpoints")).json()["checkpoints"][0]["public"] is True
    for _ in range(2):
        assert (await client.http.delete(url)).status_code == 204


async def test_t06_arrays_are_protobuf_for_those_who_ask(client: Client) -> None:
    model_id = await client.model()
    answer = await client.poll(await client.train(model_id, 1), accept=CONTENT_TYPE)
    assert CONTENT_TYPE in answer.headers["content-type"]
    output = decode_forward_backward_output(answer.content)
    assert output.loss_fn_outputs[0]["logprobs"].shape == [3]
    receipt = await client.sample(await client.sampler())
    answer = await client.poll(receipt, accept=CONTENT_TYPE)
    assert CONTENT_TYPE in answer.headers["content-type"]
    response = decode_sample_response(answer.content, receipt.json()["sample_sequence_ids"])
    assert len(response.sequences[0].tokens) == len(response.sequences[0].logprobs or []) == 4


async def test_t07_a_sample_receipt_names_its_sequences(client: Client) -> None:
    receipt = await client.sample(await client.sampler(), num_samples=3)
    ids = receipt.json()["sample_sequence_ids"]
    assert len(set(ids)) == 3
    assert len((await client.result(receipt))["sequences"]) == 3


async def test_t08_every_metric_name_has_one_colon(client: Client) -> None:
    model_id = await client.model()
    metrics = (await client.result(await client.train(model_id, 1)))["metrics"]
    assert "loss:sum" in metrics
    assert {name.count(":") for name in metrics} == {1}


def test_t09_a_poll_is_held_for_less_than_the_sdk_waits() -> None:
    assert ServerSettings().poll_hold_s <= 30
    with pytest.raises(ValueError, match="poll_hold_s"):
        ServerSettings(poll_hold_s=45)


async def test_t10_model_ids_are_what_the_sdk_assumes(client: Client) -> None:
    session_id = await client.session()
    assert await client.model(session_id, 0) == f"{session_id}:train:0"
    saved = await client.result(
        await client.post("save_weights", {"model_id": f"{session_id}:train:0", "seq_id": 1, "path": "a"})
    )
    load = {"session_id": session_id, "model_seq_id": 1, "path": saved["path"], "optimizer": True}
    loaded = await client.result(await client.post("load_weights", load))
    assert "error" not in loaded
    info = await client.post("get_info", {"model_id": f"{session_id}:train:1"})
    assert info.json()["model_id"] == f"{session_id}:train:1"
    assert (await client.get(f"training_runs/{session_id}:train:1")).status_code == 200


@pytest.mark.parametrize("name", ["a", "publish", "ttl", "external_weights_urls", "v1.2:x@y"])
async def test_t11_a_checkpoint_id_has_a_slash(client: Client, name: str) -> None:
    model_id = await client.model()
    await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": name}))
    base = f"training_runs/{model_id}/checkpoints"
    assert [c["checkpoint_id"] for c in (await client.get(base)).json()["checkpoints"]] == [f"weights/{name}"]
    ttl = await client.http.put(f"/api/v1/{base}/weights/{name}/ttl", json={"ttl_seconds": 7200})
    assert ttl.status_code == 204
    assert "expires_at" in (await client.get(base)).json()["checkpoints"][0]
    ttl = await client.http.put(f"/api/v1/{base}/weights/{name}/ttl", json={"ttl_seconds": None})
    assert "expires_at" not in (await client.get(base)).json()["checkpoints"][0]
    assert (await client.http.delete(f"/api/v1/{base}/weights/{name}")).status_code == 204
    assert (await client.get(base)).json()["checkpoints"] == []
    assert (await client.http.delete(f"/api/v1/{base}/weights/{name}")).status_code == 404


async def test_t12_the_same_request_again_is_the_same_future(client: Client) -> None:
    model_id = await client.model()
    body = train_body(model_id, 1)
    receipts = [await client.send_train(body, x_idempotency_key=key) for key in ("one", "two")]
    assert receipts[0].json() == receipts[1].json()
    steps = [await client.post("optim_step", optim(model_id, 2)) for _ in range(2)]
    assert steps[0].json() == steps[1].json()
    await client.result(steps[0])
    again = await client.post("optim_step", optim(model_id, 2))
    assert again.json() == steps[0].json()
    assert sum(isinstance(operation, OptimStep) for operation in client.engine.operations) == 1


async def test_t12_another_payload_under_a_used_number_is_a_user_failure(client: Client) -> None:
    model_id = await client.model()
    first = await client.post("optim_step", optim(model_id, 1))
    other = await client.post("optim_step", optim(model_id, 1, learning_rate=0.5))
    assert "error" not in await client.result(first)
    assert (await client.result(other))["category"] == "user"


async def test_t12_an_unnamed_sampler_asked_for_again_under_another_number_is_the_same_request(client: Client) -> None:
    """The official SDK counts on whenever it sends this request, again after a lost reply too."""
    model_id = await client.model()
    body = {"model_id": model_id, "seq_id": 1, "sampling_session_seq_id": 0}
    first = await client.post("save_weights_for_sampler", body)
    again = await client.post("save_weights_for_sampler", body | {"sampling_session_seq_id": 1})
    assert again.json() == first.json()
    assert (await client.result(again))["sampling_session_id"].endswith(":sample:0")
    other = await client.post("save_weights_for_sampler", body | {"sampling_session_seq_id": 2, "kind": "inflight"})
    assert "another payload" in str(await client.result(other))


async def test_t12_a_compressed_retry_is_the_same_payload(client: Client) -> None:
    model_id = await client.model()
    body = train_body(model_id, 1)
    plain = await client.send_train(body)
    squeezed = await client.send_train(compress(body), content_encoding="zstd")
    assert plain.json() == squeezed.json()


async def test_t12_sampling_is_idempotent_on_its_number(client: Client) -> None:
    sampler = await client.sampler()
    first, again = [await client.sample(sampler, 5) for _ in range(2)]
    assert first.json() == again.json()


async def test_t13_client_config_is_there_and_complete(client: Client) -> None:
    config = (await client.post("client/config", {"sdk_version": "0.38.0"})).json()
    assert config["proto_compress_fwdbwd"] is True
    assert None not in config.values()
    assert (await client.post("client/dynamic_config", {"sdk_version": "0.38.0"})).json()[
        "sample_cancel_enabled"
    ] is True


async def test_t14_expired_is_410_and_never_existed_is_404(open_server: OpenServer) -> None:
    async with open_server(control={"future_ttl_s": 0.05, "sweep_interval_s": 0.02}) as client:
        receipt = await client.sample(await client.sampler())
        assert "error" not in await client.result(receipt)
        await asyncio.sleep(0.3)
        assert (await client.poll(receipt)).status_code == 410
        assert (await client.poll_id("req-never")).status_code == 404
        assert "req-never" in (await client.poll_id("req-never")).json()["detail"]


async def test_t14_a_result_can_be_fetched_again(client: Client) -> None:
    receipt = await client.sample(await client.sampler())
    assert await client.result(receipt) == await client.result(receipt)


@pytest.mark.parametrize(
    "path", ["get_server_capabilities", "billing/usage/events", "billing/usage/checkpoints/current"]
)
async def test_t15_nothing_is_402(client: Client, path: str) -> None:
    assert (await client.get(path)).status_code in (200, 400)


async def test_t16_a_rejected_request_consumes_its_number(client: Client) -> None:
    model_id = await client.model()
    bad = await client.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {"learning_rate": "high"}})
    failed = await client.result(bad)
    assert failed["category"] == "user"
    assert "adam_params.learning_rate" in failed["error"]
    assert "'high'" in failed["error"]
    assert "error" not in await client.result(await client.train(model_id, 2))


async def test_t16_a_number_that_never_comes_fails_the_later_ones(open_server: OpenServer) -> None:
    async with open_server(control={"seq_gap_timeout_s": 0.1, "sweep_interval_s": 0.02}) as client:
        model_id = await client.model()
        failed = await client.result(await client.train(model_id, 3))
        assert failed["category"] == "user"
        assert "1" in failed["error"]
        assert "error" not in await client.result(await client.train(model_id, 4))


async def test_t17_length_is_said_explicitly(client: Client) -> None:
    sampler = await client.sampler()
    params = {"max_tokens": 4, "stop": [], "seed": 1}
    answer = await client.poll(await client.sample(sampler, 0, sampling_params=params), accept=CONTENT_TYPE)
    assert pb.SampleResponse.FromString(answer.content).sequences[0].stop_reason == pb.STOP_REASON_LENGTH
    params = {"max_tokens": 50, "stop": list(range(512)), "seed": 1}
    answer = await client.poll(await client.sample(sampler, 1, sampling_params=params), accept=CONTENT_TYPE)
    assert pb.SampleResponse.FromString(answer.content).sequences[0].stop_reason == pb.STOP_REASON_STOP


async def test_t18_get_info_says_where_the_tokenizer_is(client: Client) -> None:
    info = (await client.post("get_info", {"model_id": await client.model()})).json()
    assert info["model_data"]["tokenizer_id"] == FAKE_CARD.source
    assert info["model_data"]["model_name"] == info["model_name"] == FAKE_CARD.name
    assert info["is_lora"] is True
    assert info["lora_rank"] == 4


async def test_t18_a_model_with_a_name_of_its_own_says_where_its_tokenizer_is(open_server: OpenServer) -> None:
    async with open_server(card=replace(FAKE_CARD, name="mine", source="/models/somewhere/mine")) as client:
        info = (await client.post("get_info", {"model_id": await client.model()})).json()
        assert info["model_data"]["model_name"] == "mine"
        assert info["model_data"]["tokenizer_id"] == "/models/somewhere/mine"
        sampler = (await client.get(f"samplers/{await client.sampler()}")).json()
        assert (sampler["base_model"], sampler["tokenizer_id"]) == ("mine", "/models/somewhere/mine")


def claims_of(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


async def test_t19_a_token_has_what_whoami_reads(client: Client) -> None:
    assert (await client.post("client/config", {})).json()["pjwt_auth_enabled"] is True
    token = (await client.post("auth/token", {}, headers={"x-api-key": "tml-any"})).json()["jwt"]
    assert token.startswith("eyJ")
    claims = claims_of(token)
    assert claims["exp"] - claims["iat"] == 3600
    assert abs(claims["iat"] - time.time()) < 60
    assert (claims["sub"], claims["org_id"]) == ("tinsmith:user:local", "local")
    assert (await client.get("sessions", headers={"x-api-key": token})).status_code == 200


async def test_t19_our_own_client_is_not_sent_for_a_token(client: Client) -> None:
    config = await client.post("client/config", {}, headers={"user-agent": "tinsmith/0.1.0 Python/3.11"})
    assert config.json()["pjwt_auth_enabled"] is False


async def test_t20_a_thousand_polls_wait_without_delaying_anyone(client: Client) -> None:
    session_id = await client.session()
    sampler = await client.sampler(session_id)
    client.engine.pause()
    receipts = [await client.sample(sampler, seq) for seq in range(1000)]
    polls = [asyncio.create_task(client.poll(receipt)) for receipt in receipts]
    await asyncio.sleep(0.5)
    started = time.perf_counter()
    beat = await client.post("session_heartbeat", {"session_id": session_id, "type": "session_heartbeat"})
    assert beat.json() == {"type": "session_heartbeat"}
    assert time.perf_counter() - started < 0.1
    client.engine.resume()
    answers = await asyncio.gather(*polls)
    assert {answer.status_code for answer in answers} == {200}
    assert client.app.state.service.num_open_polls == 0


async def test_t21_an_empty_body_may_call_itself_json(client: Client) -> None:
    model_id = await client.model()
    await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "a"}))
    url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/a"
    headers = {"content-type": "application/json"}
    assert (await client.http.post(f"{url}/publish", content=b"", headers=headers)).status_code == 204
    assert (await client.http.request("DELETE", url, content=b"", headers=headers)).status_code == 204


async def test_t22_two_sparse_tensors_may_have_different_patterns(client: Client) -> None:
    model_id = await client.model()
    targets = torch.zeros(3, 20, dtype=torch.int64)
    targets[0, 1], targets[2, 0] = 5, 9
    weights = torch.zeros(3, 20)
    weights[1, 7], weights[2, 0] = 0.5, -2.0
    sparse = datum([1, 2, 3], target_tokens=targets, weights=weights)
    assert sparse.loss_fn_inputs["weights"].is_sparse
    assert sparse.loss_fn_inputs["target_tokens"].is_sparse
    answer = await client.poll(await client.train(model_id, 1, data=(sparse,)), accept=CONTENT_TYPE)
    logprobs: TensorData = decode_forward_backward_output(answer.content).loss_fn_outputs[0]["logprobs"]
    assert logprobs.shape == [3, 20]
    item = next(operation for operation in client.engine.operations if isinstance(operation, TrainItem))
    seen = item.data[0].loss_fn_inputs
    np.testing.assert_array_equal(seen["target_tokens"].to_numpy(), targets.numpy())
    np.testing.assert_array_equal(seen["weights"].to_numpy(), weights.numpy())


async def test_t23_zstd_bodies_are_read(client: Client) -> None:
    model_id = await client.model()
    data = tuple(datum([i % 500, 2, 3] * 50) for i in range(20))
    plain = await client.result(await client.train(model_id, 1, data=data))
    body = compress(train_body(model_id, 2, data=data))
    assert plain == await client.result(await client.send_train(body, content_encoding="zstd"))


async def test_t24_a_session_outlives_many_missed_heartbeats(client: Client) -> None:
    assert ControlSettings(data_dir=".").session_timeout_s >= 300
    session_id = await client.session()
    finished = await client.post(f"sessions/{session_id}/finish", {"reason": {"type": "success"}, "detail": None})
    assert finished.status_code == 200
    assert (await client.post("session_heartbeat", {"session_id": session_id})).status_code == 410
    assert (await client.post("session_heartbeat", {"session_id": "sess-none"})).status_code == 404


async def test_t25_no_success_has_an_error_key(client: Client) -> None:
    session_id = await client.session()
    model_id = await client.model(session_id)
    receipts = [
        await client.train(model_id, 1),
        await client.post("optim_step", optim(model_id, 2)),
        await client.post("save_weights", {"model_id": model_id, "seq_id": 3, "path": "a"}),
        await client.post("save_weights_for_sampler", {"model_id": model_id, "seq_id": 4, "path": "b"}),
        await client.post(
            "save_weights_for_sampler", {"model_id": model_id, "seq_id": 5, "sampling_session_seq_id": 3}
        ),
        await client.post(
            "load_weights",
            {"model_id": model_id, "seq_id": 6, "path": f"tinker://{model_id}/weights/a", "optimizer": True},
        ),
        await client.sample(await client.sampler(session_id)),
        await client.post("unload_model", {"model_id": model_id, "type": "unload_model"}),
    ]
    results = [await client.result(receipt) for receipt in receipts]
    assert [set(result) & {"error", "category"} for result in results] == [set()] * len(results)
    assert results[2]["path"] == f"tinker://{model_id}/weights/a"
    assert results[3]["path"] == f"tinker://{model_id}/sampler_weights/b"
    assert results[4]["sampling_session_id"] == f"{session_id}:sample:3"


async def test_t26_small_answers_are_not_delayed_by_nagle(client: Client) -> None:
    server = uvicorn.Server(uvicorn.Config(client.app, lifespan="off", port=0, log_level="error"))
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        times = []
        for _ in range(20):
            started = time.perf_counter()
            await http.post("/api/v1/session_heartbeat", json={"session_id": "sess-none"})
            times.append(time.perf_counter() - started)
    server.should_exit = True
    await running
    assert sorted(times)[10] < 0.02
