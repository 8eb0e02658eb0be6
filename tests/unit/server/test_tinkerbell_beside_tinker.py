"""Two dialects on the same paths, the same futures and the same models: rows 1, 2, 7 and 25 of the requirements."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.server.test_tinkerbell import ADAM, CARD, CHAT, Bell
from tests.unit.server.tinker_client import PROTOBUF, OpenServer, sample_body, train_body
from tinsmith.data import load_tokenizer
from tinsmith.server.tinkerbell.dialect import HEADER, dialect_of
from tinsmith.wire.tinker_proto import CONTENT_TYPE, decode_forward_backward_output

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bell(open_server: OpenServer) -> AsyncIterator[Bell]:
    async with open_server(card=CARD) as client:
        yield Bell(client)


# ---- row 1: one store of futures, two ways to fetch ----


async def test_a_future_of_tinker_is_fetched_in_the_other_dialect(bell: Bell) -> None:
    tinker = bell.tinker
    model_id = await tinker.model()
    receipts = {
        "train": await tinker.train(model_id, 1),
        "step": await tinker.post("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {}}),
        "save": await tinker.post("save_weights", {"model_id": model_id, "seq_id": 3, "path": "w"}),
        "sample": await tinker.sample(await tinker.sampler()),
    }
    told = {name: await bell.result(receipt.json()) for name, receipt in receipts.items()}
    assert told["train"]["loss"] == pytest.approx(told["train"]["loss_sum"] / 3)
    assert (told["train"]["num_samples"], told["train"]["model_id"]) == (1, model_id)
    assert told["step"]["metrics"]["step_applied"] == 1.0
    assert told["save"]["path"] == f"tinker://{model_id}/weights/w"
    tokens = told["sample"]["sequences"][0]["tokens"]
    assert told["sample"]["completions"] == [load_tokenizer("tinsmith/tiny").decode(tokens, skip_special_tokens=True)]


async def test_a_future_of_tinkerbell_is_fetched_through_tinker(bell: Bell) -> None:
    model_id = await bell.lora()
    receipt = await bell.ok("/api/v1/forward_backward_async", model_id=model_id, data=[CHAT])
    loss = (await bell.result(receipt))["loss_sum"]
    as_json = (await bell.tinker.poll_id(receipt["request_id"])).json()
    assert as_json["metrics"]["loss:sum"] == pytest.approx(loss)
    as_protobuf = await bell.tinker.poll_id(receipt["request_id"], accept=CONTENT_TYPE)
    assert decode_forward_backward_output(as_protobuf.content).metrics["loss:sum"] == pytest.approx(loss)
    sampled = await bell.ok("/api/v1/asample", model_id=model_id, prompts=["a", "b"], sampling_params={"max_tokens": 2})
    assert len((await bell.result(sampled))["sequences"]) == 2
    assert len((await bell.tinker.poll_id(sampled["request_id"])).json()["sequences"]) == 2


async def test_a_failed_future_is_200_for_tinker_and_500_for_tinkerbell(bell: Bell) -> None:
    receipt = await bell.ok("/load_weights", model_id=await bell.lora(), path="nowhere")
    failed = await bell.end(receipt)
    assert failed.status_code == 500
    through_tinker = await bell.tinker.poll_id(receipt["request_id"])
    assert through_tinker.status_code == 200
    assert through_tinker.json()["category"] == "user"
    assert failed.json() == {"detail": f"Job failed: {through_tinker.json()['error']}"}


# ---- row 2: whose request it is ----


@pytest.mark.parametrize(
    ("fields", "dialect"),
    [
        ({"model_id": "m", "data": []}, "tinkerbell"),
        ({"model_id": "m", "adam_params": {}}, "tinkerbell"),
        ({"model_id": "m", "prompts": ["x"]}, "tinkerbell"),
        ({"model_id": "m", "loss_fn_inputs": {}}, "tinkerbell"),
        ({"model_id": "m", "adam_params": {}, "seq_id": 1}, "tinker"),
        ({"model_id": "m", "adam_params": {}, "type": "optim_step"}, "tinker"),
        ({"model_id": "m", "data": [], "seq_id": 0}, "tinker"),
        ({"forward_backward_input": {}}, "tinker"),
        ({"forward_input": {}}, "tinker"),
        ({"sampling_session_id": "s", "prompts": ["x"]}, "tinker"),
        ({"optimizer_params": {"type": "dimuon"}}, "tinker"),
        ({"model_id": "m", "adam_params": {}, "seq_id": None}, "tinkerbell"),
        ({"model_id": "m"}, None),
        ({}, None),
    ],
)
def test_the_body_decides_whose_request_it_is(fields: dict[str, Any], dialect: str | None) -> None:
    assert dialect_of(fields) == dialect


SHARED = ("forward", "forward_backward", "optim_step", "asample")


@pytest.mark.parametrize("path", SHARED)
async def test_a_body_of_neither_dialect_is_422_and_both_are_explained(bell: Bell, path: str) -> None:
    answer = await bell.post(f"/api/v1/{path}", model_id="m")
    assert answer.status_code == 422
    for word in ("seq_id", "data", "prompts", "adam_params", HEADER):
        assert word in answer.json()["detail"]


async def test_both_dialects_train_through_the_same_paths(bell: Bell) -> None:
    tinker = bell.tinker
    theirs, ours = await tinker.model(), await bell.lora()
    protobuf = await tinker.result(await tinker.train(theirs, 1))
    old = {"data": [tinker_json_datum()], "loss_fn": "cross_entropy"}
    as_json = await tinker.post("forward_backward", {"model_id": theirs, "seq_id": 2, "forward_backward_input": old})
    assert (await tinker.result(as_json))["metrics"] == protobuf["metrics"]
    forward = await tinker.post("forward", {"model_id": theirs, "seq_id": 3, "forward_input": old})
    assert (await tinker.result(forward))["metrics"] == protobuf["metrics"]
    stepped = await tinker.post("optim_step", {"model_id": theirs, "seq_id": 4, "adam_params": {}})
    assert set(stepped.json()) == {"request_id", "model_id"}
    assert (await tinker.result(stepped))["metrics"]["step_applied"] == 1.0
    sample = await tinker.post("asample", sample_body(await tinker.sampler()))
    assert "sample_sequence_ids" in sample.json()
    for path, body in {
        "forward": {"data": [CHAT]},
        "forward_backward": {"data": [CHAT]},
        "optim_step": ADAM,
    }.items():
        answer = await bell.ok(f"/api/v1/{path}", model_id=ours, **body)
        assert answer["model_id"] == ours
        assert "request_id" not in answer
    assert set(await bell.ok("/api/v1/asample", model_id=ours, prompts=["x"])) == {"request_id", "model_id"}


def tinker_json_datum() -> dict[str, Any]:
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
            "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
        },
    }


async def test_a_header_pins_the_dialect(bell: Bell) -> None:
    body = {"model_id": "m", "adam_params": {}}
    pinned = await bell.http.post("/api/v1/optim_step", json=body, headers={HEADER: "tinker"})
    assert pinned.status_code == 400
    assert "seq_id is missing" in pinned.json()["detail"]
    numbered = {"model_id": "m", "seq_id": 1, "data": [CHAT]}
    pinned = await bell.http.post("/api/v1/forward", json=numbered, headers={HEADER: "tinkerbell"})
    assert pinned.status_code == 400
    assert "seq_id = 1" in pinned.json()["detail"]
    unknown = await bell.http.post("/api/v1/forward", json=body, headers={HEADER: "esperanto"})
    assert unknown.status_code == 400
    assert "'esperanto'" in unknown.json()["detail"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"'])
@pytest.mark.parametrize("path", ["/api/v1/forward", "/api/v1/forward_async", "/retrieve_future", "/get_info"])
async def test_what_is_no_json_object_is_refused(bell: Bell, path: str, content: bytes) -> None:
    answer = await bell.http.post(path, content=content)
    assert answer.status_code == 400
    assert answer.json()["detail"]


async def test_the_dialect_can_be_switched_off(open_server: OpenServer) -> None:
    async with open_server(card=CARD, dialects=["tinker"]) as client:
        assert (await client.http.post("/retrieve_future", json={"request_id": "x"})).status_code == 404
        assert (await client.http.post("/api/v1/add_lora", json={})).status_code == 404
        answer = await client.http.post("/api/v1/optim_step", json={"model_id": "m", "adam_params": {}})
        assert answer.status_code == 400
        assert (await client.http.get("/")).json()["endpoints"] == {}
        model_id = await client.model()
        assert (await client.result(await client.train(model_id, 1)))["metrics"]["loss:sum"] > 0


# ---- row 7: one model, one dialect ----


async def test_a_model_of_one_dialect_is_refused_to_the_other_by_name(bell: Bell) -> None:
    ours, theirs = await bell.lora(), await bell.tinker.model()
    refused = await bell.tinker.result(await bell.tinker.train(ours, 1))
    assert refused["category"] == "user"
    assert ours in refused["error"]
    assert "add_lora" in refused["error"]
    answer = await bell.post("/api/v1/forward_backward", model_id=theirs, data=[CHAT])
    assert answer.status_code == 400
    assert theirs in answer.json()["detail"]
    assert "one API" in answer.json()["detail"]
    assert (await bell.train(ours))["loss"] > 0
    assert "error" not in await bell.tinker.result(await bell.tinker.train(theirs, 1))


async def test_a_tinker_body_that_is_protobuf_never_reaches_the_other_dialect(bell: Bell) -> None:
    content = train_body(await bell.tinker.model(), 1)
    answer = await bell.http.post("/api/v1/forward_backward", content=content, headers=PROTOBUF)
    assert set(answer.json()) == {"request_id", "model_id"}


# ---- row 25: keys ----


async def test_both_dialects_take_the_same_header_and_none(bell: Bell) -> None:
    for headers in ({}, {"x-api-key": "tml-local"}, {"authorization": "Bearer tml-local"}):
        answer = await bell.http.post("/api/v1/add_lora", json={}, headers=headers)
        assert answer.status_code == 200
        session = await bell.http.post("/api/v1/create_session", json={}, headers=headers)
        assert session.status_code == 200


async def test_a_key_does_not_find_the_adapters_of_another(bell: Bell) -> None:
    body: dict[str, Any] = {"model_id": await bell.lora(), "data": [CHAT]}
    answer = await bell.http.post("/api/v1/forward", json=body, headers={"x-api-key": "tml-other"})
    assert answer.status_code == 400
    assert "under this key" in answer.json()["detail"]


async def test_a_loss_that_is_no_number_fails_the_request(bell: Bell, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinsmith.runtime import fake

    forward = fake.forward

    def broken(item: Any, factor: float) -> Any:
        output = forward(item, factor)
        return replace(output, metrics={**output.metrics, "loss:sum": float("nan")})

    monkeypatch.setattr(fake, "forward", broken)
    answer = await bell.post("/api/v1/forward", model_id="m", data=[CHAT])
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("Job failed: loss is nan")
