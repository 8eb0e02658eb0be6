"""The Tinkerbell dialect over a fake engine, one test or more per requirement TB-01…TB-21."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.data import ChatTemplateRenderer, Conversation, load_tokenizer, to_datum
from tinsmith.runtime.fake import FAKE_CARD, FakeEngine
from tinsmith.server.tinkerbell import OPERATIONS
from tinsmith.types import AdamParams
from tinsmith.types.errors import InvalidInput, ServerError
from tinsmith.types.operations import CreateAdapter, OptimStep, PublishSnapshot, TrainItem

pytestmark = pytest.mark.anyio

CARD = replace(FAKE_CARD, source="tinsmith/tiny", vocab_size=8192)
CHAT = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there!"}]
ADAM = {"adam_params": {"learning_rate": 0.001}}


class Bell:
    """A script of the dialect, one method per call."""

    def __init__(self, client: Client) -> None:
        self.http = client.http
        self.engine: FakeEngine = client.engine
        self.tinker = client

    async def post(self, path: str, /, **body: Any) -> httpx2.Response:
        return await self.http.post(path, json=body)

    async def ok(self, path: str, /, **body: Any) -> Any:
        answer = await self.post(path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def lora(self, **body: Any) -> str:
        return (await self.ok("/api/v1/add_lora", **body))["model_id"]

    async def train(self, model_id: str, **body: Any) -> Any:
        fields = {"model_id": model_id, "data": [CHAT], "loss_fn": "cross_entropy"} | body
        return await self.ok("/api/v1/forward_backward", **fields)

    async def retrieve(self, request_id: str) -> httpx2.Response:
        return await self.post("/retrieve_future", request_id=request_id)

    async def result(self, receipt: Any) -> Any:
        answer = await self.end(receipt)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def end(self, receipt: Any) -> httpx2.Response:
        for _ in range(500):
            answer = await self.retrieve(receipt["request_id"])
            if answer.status_code != 202:
                return answer
            await asyncio.sleep(0.01)
        raise AssertionError("no result")

    @property
    def trained(self) -> list[TrainItem]:
        return [operation for operation in self.engine.operations if isinstance(operation, TrainItem)]


OpenBell = Callable[..., AbstractAsyncContextManager[Bell]]


@pytest.fixture
def open_bell(open_server: OpenServer) -> OpenBell:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def opened(**options: Any) -> AsyncIterator[Bell]:
        async with open_server(card=CARD, **options) as client:
            yield Bell(client)

    return opened


@pytest.fixture
async def bell(open_bell: OpenBell) -> AsyncIterator[Bell]:
    async with open_bell() as opened:
        yield opened


def body_of(operation: str, model_id: str) -> dict[str, Any]:
    """A body that the operation takes."""
    extra: dict[str, dict[str, Any]] = {
        "forward": {"data": [CHAT]},
        "forward_backward": {"data": [CHAT], "loss_fn": "cross_entropy"},
        "optim_step": ADAM,
        "sample": {"prompts": ["Once"], "sampling_params": {"max_tokens": 3}},
        "save_weights": {"path": "first"},
        "save_weights_for_sampler": {"path": "first"},
        "load_weights": {"path": "saved"},
    }
    if operation == "add_lora":
        return {"base_model": "base", "rank": 16, "alpha": 32}
    return {"model_id": model_id} | extra.get(operation, {})


PAIRS = [operation for operation in OPERATIONS if operation.sync]


@pytest.mark.parametrize("operation", PAIRS, ids=lambda operation: operation.name)
async def test_TB_01_each_pair_answers_the_same_in_both_forms(bell: Bell, operation: Any) -> None:
    models = [await bell.lora(seed=1), await bell.lora(seed=1)]
    now = await bell.ok(operation.sync, **body_of(operation.name, models[0]))
    receipt = await bell.ok(operation.async_, **body_of(operation.name, models[1]))
    later = await bell.result(receipt)
    varying = {"model_id", "path"}
    assert set(now) == set(later)
    if operation.name != "sample":  # its seed is drawn
        assert {k: v for k, v in now.items() if k not in varying} == {
            k: v for k, v in later.items() if k not in varying
        }
    assert operation.sync == {"sample": "/api/v1/sample"}.get(operation.name, f"/api/v1/{operation.name}")
    assert operation.async_ == {"sample": "/api/v1/asample"}.get(operation.name, f"/api/v1/{operation.name}_async")


@pytest.mark.parametrize("name", ["save_weights", "save_weights_for_sampler", "load_weights"])
async def test_TB_02_weights_have_an_asynchronous_form_only(bell: Bell, name: str) -> None:
    model_id = await bell.lora()
    await bell.result(await bell.ok("/api/v1/save_weights_async", model_id=model_id, path="saved"))
    body = body_of(name, model_id)
    assert (await bell.result(await bell.ok(f"/api/v1/{name}_async", **body)))["path"].startswith("tinker://")
    synchronous = await bell.post(f"/api/v1/{name}", **body)  # the Tinker API's own path
    assert synchronous.status_code == 400
    assert "seq_id" in synchronous.json()["detail"]


async def test_TB_03_a_receipt_comes_at_once_while_the_engine_is_busy(bell: Bell) -> None:
    model_id = await bell.lora()
    await bell.train(model_id)  # the tokenizer is loaded
    bell.engine.pause()
    started = time.monotonic()
    receipt = await bell.ok("/api/v1/forward_backward_async", **body_of("forward_backward", model_id))
    assert time.monotonic() - started < 0.1
    assert set(receipt) == {"request_id", "model_id"}
    assert receipt["request_id"].startswith("future_")
    assert receipt["model_id"] == model_id
    bell.engine.resume()


async def test_TB_04_a_synchronous_request_waits_and_answers_the_bare_result(bell: Bell) -> None:
    model_id = await bell.lora()
    bell.engine.pause()
    waiting = asyncio.create_task(bell.train(model_id))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    bell.engine.resume()
    assert (await waiting)["loss"] > 0


async def test_TB_05_a_future_is_202_while_pending_and_200_with_the_result_itself(bell: Bell) -> None:
    model_id = await bell.lora()
    bell.engine.pause()
    receipt = await bell.ok("/api/v1/forward_backward_async", **body_of("forward_backward", model_id))
    pending = await bell.retrieve(receipt["request_id"])
    assert (pending.status_code, pending.json()) == (202, {"status": "pending"})
    bell.engine.resume()
    result = await bell.result(receipt)
    assert result["loss"] > 0
    assert result == await bell.result(receipt), "a result can be fetched again"


async def test_TB_05_a_failed_job_is_500_with_its_message(bell: Bell) -> None:
    model_id = await bell.lora()
    bell.engine.fail_items(model_id, ServerError("the device is on fire"))
    failed = await bell.end(await bell.ok("/fwdbwd", **body_of("forward_backward", model_id)))
    assert (failed.status_code, failed.json()) == (500, {"detail": "Job failed: the device is on fire"})


async def test_TB_05_an_unknown_future_is_404_and_a_missing_id_400(bell: Bell) -> None:
    unknown = await bell.retrieve("future_abc123")
    assert unknown.status_code == 404
    assert "future_abc123" in unknown.json()["detail"]
    missing = await bell.post("/retrieve_future")
    assert (missing.status_code, missing.json()) == (400, {"detail": "request_id is missing"})


async def test_TB_06_add_lora_makes_an_adapter_of_the_shape_it_is_given(bell: Bell) -> None:
    answer = await bell.ok("/api/v1/add_lora", base_model="base", rank=8, alpha=24)
    assert answer["model_id"]
    lora = next(operation for operation in bell.engine.operations if isinstance(operation, CreateAdapter)).lora
    assert (lora.rank, lora.alpha) == (8, 24.0)
    later = await bell.result(await bell.ok("/api/v1/add_lora_async", base_model=CARD.name, rank=4, alpha=32))
    assert later["model_id"] != answer["model_id"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 1000}, "rank 1000"),
        ({"alpha": 0}, "alpha must be finite and above 0, not 0"),
        ({"alpha": -1}, "-1"),
        ({"rank": "16"}, "rank should be a valid integer, not '16'"),
        ({"base_model": "nonsense"}, "'nonsense'"),
        ({"dropout": 0.1}, "dropout = 0.1"),
    ],
)
async def test_TB_06_a_bad_shape_is_refused_by_name(bell: Bell, body: dict[str, Any], named: str) -> None:
    answer = await bell.post("/api/v1/add_lora", **body)
    assert answer.status_code in (400, 404)
    assert named in answer.json()["detail"]


async def test_TB_07_chats_are_rendered_as_a_client_renders_them(bell: Bell) -> None:
    """Row 3: the datum of the server is the datum that our own renderer makes."""
    model_id = await bell.lora()
    await bell.train(model_id)
    renderer = ChatTemplateRenderer(load_tokenizer("tinsmith/tiny"))
    conversation = Conversation.of(("user", "Hello!"), ("assistant", "Hi there!"))
    rendered = renderer.render(conversation, "all_assistant_messages")
    expected, (given,) = to_datum(rendered.tokens, rendered.weights), bell.trained[-1].data
    assert given.model_input.to_ints() == expected.model_input.to_ints()
    for key in ("target_tokens", "weights"):
        assert given.loss_fn_inputs[key].tolist() == expected.loss_fn_inputs[key].tolist()
    assert 0 < sum(given.loss_fn_inputs["weights"].tolist()) < len(given.model_input.to_ints())


async def test_TB_07_a_user_only_conversation_is_trained_on_every_token(bell: Bell) -> None:
    model_id = await bell.lora()
    result = await bell.train(model_id, data=[[{"role": "user", "content": "test"}]])
    (given,) = bell.trained[-1].data
    assert set(given.loss_fn_inputs["weights"].tolist()) == {1.0}
    assert result["loss"] > 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"data": []}, "data"),
        ({"data": [[]]}, "data.0"),
        ({"data": [[{"role": "user"}]]}, "data.0.0.content is missing"),
        ({"data": [[{"role": "robot", "content": "x"}]]}, "'robot'"),
        ({"data": [[{"role": "user", "content": 7}]]}, "data.0.0.content should be a valid string, not 7"),
        ({"data": [[{"role": "user", "content": "x", "name": "Bo"}]]}, "name = 'Bo'"),
        ({"data": "text"}, "not 'text'"),
        ({"loss_fn": "hinge"}, "'hinge'"),
        ({"learning_rate": 0.1}, "learning_rate = 0.1"),
        ({"loss_fn_inputs": {"rewards": [1.0]}}, "loss_fn_inputs"),
        ({"loss_fn": "importance_sampling"}, "loss_fn_inputs is missing"),
        ({"model_id": ""}, "model_id"),
        ({"model_id": None}, "model_id is missing"),
    ],
)
@pytest.mark.parametrize("path", ["/api/v1/forward_backward", "/api/v1/forward_async", "/fwdbwd"])
async def test_TB_07_bad_data_is_refused_by_field_and_value(
    bell: Bell, path: str, body: dict[str, Any], named: str
) -> None:
    fields = {"model_id": "m", "data": [CHAT], "loss_fn": "cross_entropy"} | body
    answer = await bell.post(path, **fields)
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["detail"]
    assert not bell.trained


async def test_TB_07_what_only_the_tokenizer_finds_fails_the_future_and_the_next_request_goes_on(bell: Bell) -> None:
    model_id = await bell.lora()
    long = [[{"role": "user", "content": "word " * 400}]]
    synchronous = await bell.post("/api/v1/forward_backward", model_id=model_id, data=long)
    assert synchronous.status_code == 400
    assert "data[0]" in synchronous.json()["detail"]
    assert "256" in synchronous.json()["detail"]
    assert synchronous.json()["request_id"].startswith("future_")
    failed = await bell.end(await bell.ok("/api/v1/forward_backward_async", model_id=model_id, data=long))
    assert failed.status_code == 500
    assert failed.json()["detail"].startswith("Job failed: data[0]")
    assert (await bell.train(model_id))["loss"] > 0


async def test_TB_08_an_unknown_model_is_made_on_first_use_and_the_answer_says_so(bell: Bell) -> None:
    receipt = await bell.ok("/api/v1/forward_backward_async", model_id="test", data=[CHAT], loss_fn="cross_entropy")
    assert receipt["model_id"] == "test"
    assert receipt["created"] is True
    result = await bell.result(receipt)
    assert (result["model_id"], result["created"]) == ("test", True)
    again = await bell.train("test")
    assert "created" not in again
    assert sum(isinstance(operation, CreateAdapter) for operation in bell.engine.operations) == 1


async def test_TB_08_creation_on_first_use_can_be_switched_off(open_bell: OpenBell) -> None:
    async with open_bell(tinkerbell={"auto_create": False}) as bell:
        answer = await bell.post("/api/v1/forward_backward", model_id="test", data=[CHAT])
        assert answer.status_code == 404
        assert "'test'" in answer.json()["detail"]
        assert "add_lora" in answer.json()["detail"]


async def test_TB_08_a_key_has_a_limit_and_what_is_unused_makes_room(open_bell: OpenBell) -> None:
    async with open_bell(tinkerbell={"max_adapters_per_key": 2, "idle_s": 1000}) as bell:
        for name in ("one", "two"):
            await bell.train(name)
        refused = await bell.post("/api/v1/forward_backward", model_id="three", data=[CHAT])
        assert refused.status_code == 429
        assert "remove_lora" in refused.json()["detail"]
        other_key = await bell.http.post(
            "/api/v1/forward_backward", json={"model_id": "one", "data": [CHAT]}, headers={"x-api-key": "tml-other"}
        )
        assert other_key.json()["created"] is True, "another key's adapters are its own"
    async with open_bell(tinkerbell={"max_adapters_per_key": 2, "idle_s": 0}) as bell:
        for name in ("one", "two", "three"):
            await bell.train(name)
        gone = await bell.post("/api/v1/forward_backward", model_id="one", data=[CHAT])
        assert gone.status_code == 400
        assert "made room" in gone.json()["detail"], "a name that had weights is never made anew in silence"


@pytest.mark.parametrize("name", ["base", CARD.name, "sess-0:train:9"])
async def test_TB_08_what_cannot_be_an_adapters_name_is_refused(bell: Bell, name: str) -> None:
    answer = await bell.post("/api/v1/forward_backward", model_id=name, data=[CHAT])
    assert answer.status_code in (400, 404)
    assert name in answer.json()["detail"]


@pytest.mark.parametrize("path", ["remove_lora", "save_weights_async", "save_weights_for_sampler_async"])
async def test_TB_08_nothing_is_made_only_to_be_saved_or_removed(bell: Bell, path: str) -> None:
    body = {"model_id": "typo"} | ({} if path == "remove_lora" else {"path": "w"})
    answer = await bell.post(f"/api/v1/{path}", **body)
    assert answer.status_code == 404
    assert "'typo'" in answer.json()["detail"]


async def test_TB_09_the_step_uses_the_rate_it_is_given_and_tinkers_defaults(bell: Bell) -> None:
    """Row 12."""
    model_id = await bell.lora()
    await bell.train(model_id)
    answer = await bell.ok("/api/v1/optim_step", model_id=model_id, adam_params={"learning_rate": 0.0123})
    step = next(operation for operation in bell.engine.operations if isinstance(operation, OptimStep))
    assert step.params == AdamParams(learning_rate=0.0123)
    assert (step.params.beta1, step.params.beta2, step.params.eps) == (0.9, 0.95, 1e-12)
    assert answer["metrics"]["step_applied"] == 1.0


async def test_TB_09_a_step_without_gradients_succeeds_and_moves_nothing(bell: Bell) -> None:
    """Row 14."""
    model_id = await bell.lora()
    before = await bell.train(model_id)
    assert (await bell.ok("/api/v1/optim_step", model_id=model_id, **ADAM))["metrics"]["step_applied"] == 1.0
    stepped = await bell.train(model_id)
    await bell.ok("/api/v1/optim_step", model_id=model_id, adam_params={"learning_rate": 0.0})
    for _ in range(4):
        answer = await bell.ok("/api/v1/optim_step", model_id=model_id, **ADAM)
        assert answer["metrics"]["step_applied"] == 0.0
    assert (await bell.train(model_id))["loss"] == stepped["loss"] < before["loss"]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": "fast"}, "'fast'"),
        ({"learning_rate": 0.1, "momentum": 0.9}, "momentum = 0.9"),
        ({"beta1": 1.5}, "1.5"),
    ],
)
async def test_TB_09_bad_optimizer_numbers_are_refused_by_name(bell: Bell, params: dict[str, Any], named: str) -> None:
    answer = await bell.post("/api/v1/optim_step", model_id=await bell.lora(), adam_params=params)
    assert answer.status_code == 400
    assert named in answer.json()["detail"]


async def test_TB_10_jobs_of_one_model_keep_their_order(bell: Bell) -> None:
    """Row 7: submission is concurrent, execution in the order of arrival, however long a request takes to prepare."""
    model_id = await bell.lora()
    bell.engine.operations.clear()
    receipts = []
    for index in range(6):
        path, body = "/api/v1/optim_step_async", {"model_id": model_id, **ADAM}
        if index % 2 == 0:
            path = "/api/v1/forward_backward_async"
            body = {"model_id": model_id, "data": [CHAT] * (30 if index == 0 else 1)}
        receipts.append(await bell.ok(path, **body))
    losses = [(await bell.result(receipt)).get("loss") for receipt in receipts]
    kinds = [type(operation).__name__ for operation in bell.engine.operations]
    assert kinds == ["TrainItem", "OptimStep"] * 3
    assert losses[0] > losses[2] > losses[4]


async def test_TB_11_five_submits_return_before_the_first_is_done(bell: Bell) -> None:
    model_id = await bell.lora()
    bell.engine.pause()
    receipts = [
        await bell.ok("/api/v1/forward_backward_async", **body_of("forward_backward", model_id)) for _ in range(5)
    ]
    assert [(await bell.retrieve(receipt["request_id"])).status_code for receipt in receipts] == [202] * 5
    bell.engine.resume()
    assert all([(await bell.result(receipt))["loss"] > 0 for receipt in receipts])


async def test_TB_12_a_poll_never_waits_for_the_engine(bell: Bell) -> None:
    model_id = await bell.lora()
    await bell.train(model_id)
    bell.engine.pause()
    receipt = await bell.ok("/api/v1/forward_backward_async", **body_of("forward_backward", model_id))
    started = time.monotonic()
    for _ in range(20):
        assert (await bell.retrieve(receipt["request_id"])).status_code == 202
    assert time.monotonic() - started < 1.0
    bell.engine.resume()


LEGACY = [operation for operation in OPERATIONS if operation.legacy]


@pytest.mark.parametrize("operation", LEGACY, ids=lambda operation: operation.legacy)
async def test_TB_13_a_legacy_path_is_the_asynchronous_one(bell: Bell, operation: Any) -> None:
    model_id = await bell.lora()
    await bell.result(await bell.ok("/save_weights", model_id=model_id, path="saved"))
    assert operation.legacy is not None
    receipt = await bell.ok(operation.legacy, **body_of(operation.name, model_id))
    assert receipt["request_id"].startswith("future_")
    assert "model_id" in await bell.result(receipt)


def test_TB_13_the_legacy_paths_are_those_of_the_guide() -> None:
    paths = {operation.legacy for operation in LEGACY}
    assert paths >= {"/fwd", "/fwdbwd", "/optim_step", "/add_lora", "/remove_lora", "/load_weights", "/save_weights"}


async def test_TB_14_the_root_lists_every_path_and_each_exists(bell: Bell) -> None:
    endpoints = (await bell.http.get("/")).json()["endpoints"]
    for kind in ("sync", "async", "legacy", "futures"):
        for path in endpoints[kind].values():
            assert (await bell.http.get(path)).status_code == 405, path
    for path in endpoints["about"].values():
        assert (await bell.http.get(path)).status_code in (200, 405), path
    assert len(endpoints["sync"]) == 6
    assert len(endpoints["async"]) == 9


async def test_TB_16_a_result_counts_samples_and_names_model_and_backend(bell: Bell) -> None:
    """Row 4: the loss is the mean over weighted tokens."""
    model_id = await bell.lora()
    result = await bell.train(model_id, data=[CHAT, CHAT, [{"role": "user", "content": "x"}]])
    assert (result["num_samples"], result["model_id"], result["backend"]) == (3, model_id, "tinsmith-cpu")
    assert result["loss"] == pytest.approx(result["loss_sum"] / result["weight_sum"])
    weights = [sum(datum.loss_fn_inputs["weights"].tolist()) for datum in bell.trained[-1].data]
    assert result["weight_sum"] == sum(weights)
    assert result["num_tokens"] == sum(datum.model_input.length for datum in bell.trained[-1].data)
    assert [len(row) for row in result["logprobs"]] == [datum.model_input.length for datum in bell.trained[-1].data]


async def test_TB_17_saved_weights_are_loaded_again(bell: Bell) -> None:
    model_id = await bell.lora(seed=3)
    await bell.train(model_id)
    await bell.ok("/api/v1/optim_step", model_id=model_id, **ADAM)
    saved = await bell.result(await bell.ok("/api/v1/save_weights_async", model_id=model_id, path="good"))
    good = (await bell.train(model_id))["loss"]
    await bell.ok("/api/v1/optim_step", model_id=model_id, **ADAM)
    assert (await bell.train(model_id))["loss"] < good
    for path in ("good", saved["path"]):
        loaded = await bell.result(await bell.ok("/api/v1/load_weights_async", model_id=model_id, path=path))
        assert loaded["path"] == saved["path"]
        assert (await bell.train(model_id))["loss"] == good
    fresh = await bell.ok("/load_weights", model_id="another", path=saved["path"])
    assert (await bell.result(fresh))["created"] is True
    assert (await bell.train("another"))["loss"] == good


async def test_TB_17_a_checkpoint_that_does_not_exist_fails_by_name(bell: Bell) -> None:
    model_id = await bell.lora()
    failed = await bell.end(await bell.ok("/load_weights", model_id=model_id, path="nowhere"))
    assert failed.status_code == 500
    assert "nowhere" in failed.json()["detail"]
    failed = await bell.end(await bell.ok("/save_weights", model_id=model_id, path="../up"))
    assert "../up" in failed.json()["detail"]


async def test_TB_18_health_capabilities_info_and_losses(bell: Bell) -> None:
    assert (await bell.http.get("/healthz")).json() == {"status": "ok"}
    capabilities = (await bell.http.get("/get_server_capabilities")).json()
    assert [model["model_name"] for model in capabilities["supported_models"]] == [CARD.name]
    await bell.train("mine")
    info = await bell.ok("/get_info", model_id="mine")
    assert (info["model_id"], info["lora_rank"], info["model_name"]) == ("mine", 16, CARD.name)
    assert (await bell.post("/get_info", model_id="nobody")).status_code == 404
    losses = (await bell.http.get("/list_loss_functions")).json()["available_loss_functions"]
    assert losses == ["cross_entropy", "importance_sampling"]


async def test_TB_19_samples_of_several_prompts_come_with_text_tokens_and_logprobs(bell: Bell) -> None:
    """Row 24."""
    model_id = await bell.lora()
    body = {
        "model_id": model_id,
        "prompts": ["Once upon", "The sea"],
        "sampling_params": {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 11},
        "num_samples": 2,
    }
    answer = await bell.ok("/api/v1/sample", **body)
    assert len(answer["sequences"]) == len(answer["completions"]) == 4
    tokenizer = load_tokenizer("tinsmith/tiny")
    for sequence, completion in zip(answer["sequences"], answer["completions"], strict=True):
        assert sequence["stop_reason"] in ("length", "stop")
        assert len(sequence["tokens"]) == len(sequence["logprobs"]) <= 5
        assert tokenizer.decode(sequence["tokens"], skip_special_tokens=True) == completion
    assert answer["prompt_logprobs"] is None
    later = await bell.result(await bell.ok("/api/v1/asample", **body, prompt_logprobs=True))
    assert later["sequences"] == answer["sequences"], "a seed draws the same"
    assert [len(row) for row in later["prompt_logprobs"]] == [
        len(tokenizer(prompt)["input_ids"]) for prompt in body["prompts"]
    ]


async def test_TB_19_sampling_sees_all_training_that_was_asked_for_before(bell: Bell) -> None:
    model_id = await bell.lora(seed=1)
    body = {"model_id": model_id, "prompts": ["Go"], "sampling_params": {"max_tokens": 4, "temperature": 0.0}}
    before = await bell.ok("/api/v1/sample", **body)
    assert await bell.ok("/api/v1/sample", **body) == before
    assert sum(isinstance(operation, PublishSnapshot) for operation in bell.engine.operations) == 1
    receipts = [
        await bell.ok("/api/v1/forward_backward_async", **body_of("forward_backward", model_id)),
        await bell.ok("/api/v1/optim_step_async", model_id=model_id, **ADAM),
        await bell.ok("/api/v1/asample", **body),
    ]
    after = await bell.result(receipts[2])
    assert after["sequences"][0]["logprobs"] != before["sequences"][0]["logprobs"]


async def test_TB_19_a_base_model_and_a_checkpoint_can_be_sampled(bell: Bell) -> None:
    body = {"prompts": ["Go"], "sampling_params": {"max_tokens": 4, "temperature": 0.0}}
    base = await bell.ok("/api/v1/sample", model_id="base", **body)
    assert (await bell.ok("/api/v1/sample", base_model=CARD.name, **body))["sequences"] == base["sequences"]
    await bell.train("mine")
    await bell.ok("/api/v1/optim_step", model_id="mine", **ADAM)
    receipt = await bell.ok("/api/v1/save_weights_for_sampler_async", model_id="mine", path="v1")
    path = (await bell.result(receipt))["path"]
    saved, live = [(await bell.ok("/api/v1/sample", model_id=name, **body))["sequences"] for name in (path, "mine")]
    assert saved == live != base["sequences"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [7]}, "prompts.0"),
        ({"prompts": ["ok", ""]}, "prompts[1]"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens must be at least 1, not 0"),
        ({"sampling_params": {"temperature": -1.0}}, "temperature"),
        ({"sampling_params": {"best_of": 3}}, "best_of = 3"),
        ({"num_samples": 0}, "num_samples"),
        ({"model_id": None}, "base_model"),
        ({"base_model": "base"}, "either model_id"),
        ({"model_id": "tinker://nowhere/weights/x"}, "tinker://nowhere"),
    ],
)
async def test_TB_19_a_bad_sample_request_is_refused_by_name(bell: Bell, body: dict[str, Any], named: str) -> None:
    fields = {"model_id": "base", "prompts": ["Go"], "sampling_params": {"max_tokens": 2}} | body
    answer = await bell.post("/api/v1/sample", **fields)
    assert answer.status_code in (400, 404), answer.text
    assert named in answer.json()["detail"]


REWARDED = {"loss_fn": "importance_sampling", "data": [CHAT]}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "rewards is missing"),
        ({"rewards": [1.0, 2.0]}, "data has 1 entries, but loss_fn_inputs.rewards has 2"),
        ({"rewards": [float("nan")]}, "rewards.0"),
        ({"rewards": [1.0], "kl_coeff": -0.1}, "kl_coeff"),
        ({"rewards": [1.0], "prompts": ["Other"]}, "loss_fn_inputs.prompts[0] is 'Other'"),
        ({"rewards": [1.0], "completions": ["Other"]}, "loss_fn_inputs.completions[0] is 'Other'"),
        ({"rewards": [1.0], "advantages": [1.0]}, "advantages = [1.0]"),
    ],
)
async def test_TB_20_bad_rewards_are_refused_by_name(bell: Bell, given: dict[str, Any], named: str) -> None:
    import json

    content = json.dumps({"model_id": "m", **REWARDED, "loss_fn_inputs": given})
    answer = await bell.http.post("/api/v1/forward_backward", content=content)
    assert answer.status_code == 400
    assert named in answer.json()["detail"]


async def test_TB_20_logprobs_must_fit_the_completion(bell: Bell) -> None:
    given = {"rewards": [1.0], "logprobs": [[-1.0]]}
    answer = await bell.post("/api/v1/forward_backward", model_id="m", **REWARDED, loss_fn_inputs=given)
    assert answer.status_code == 400
    assert "logprobs of data[0] has 1 values" in answer.json()["detail"]


async def test_TB_21_a_synchronous_request_that_takes_too_long_is_504_and_can_be_fetched_later(
    open_bell: OpenBell,
) -> None:
    async with open_bell(tinkerbell={"forward_backward_timeout_s": 0.2}) as bell:
        model_id = await bell.lora()
        bell.engine.pause()
        late = await bell.post("/api/v1/forward_backward", model_id=model_id, data=[CHAT])
        assert late.status_code == 504
        assert "0.2 s" in late.json()["detail"]
        bell.engine.resume()
        assert (await bell.result(late.json()))["loss"] > 0


async def test_TB_21_the_times_are_those_of_the_original(bell: Bell) -> None:
    from tinsmith.server.settings import TinkerbellSettings

    settings = TinkerbellSettings()
    times = {operation.name: getattr(settings, operation.timeout) for operation in PAIRS}
    assert times == {
        "forward": 60,
        "forward_backward": 120,
        "optim_step": 60,
        "sample": 60,
        "add_lora": 30,
        "remove_lora": 30,
    }


async def test_TB_22_a_pickled_loss_is_refused(bell: Bell) -> None:
    answer = await bell.post("/register_custom_loss", loss_name="mine", loss_fn_serialized="gASV")
    assert answer.status_code == 400
    assert "pickled" in answer.json()["detail"]


# ---- the life of an adapter ----


async def test_a_removed_adapter_does_what_waits_and_then_nothing_more(bell: Bell) -> None:
    model_id = await bell.lora()
    first = await bell.ok("/api/v1/forward_backward_async", **body_of("forward_backward", model_id))
    removed = await bell.ok("/api/v1/remove_lora", model_id=model_id)
    assert (removed["status"], removed["model_id"]) == ("removed", model_id)
    assert (await bell.result(first))["loss"] > 0
    gone = await bell.post("/api/v1/forward_backward", model_id=model_id, data=[CHAT])
    assert gone.status_code == 400
    assert "remove_lora" in gone.json()["detail"]


async def test_a_key_keeps_its_session_however_silent_until_a_day_is_over(open_bell: OpenBell) -> None:
    """Row 5: the session of a key outlives the timeout of Tinker's sessions."""
    control = {"session_timeout_s": 0.05}
    async with open_bell(control=control) as bell:
        first, second = await bell.lora(), await bell.lora()
        assert first.split(":")[0] == second.split(":")[0]
        await asyncio.sleep(0.1)
        await bell.tinker.app.state.service.control.sweep()
        assert (await bell.train(first))["loss"] > 0
    async with open_bell(control=control, tinkerbell={"session_timeout_s": 0.05}) as bell:
        first = await bell.lora()
        await asyncio.sleep(0.1)
        await bell.tinker.app.state.service.control.sweep()
        gone = await bell.post("/api/v1/forward_backward", model_id=first, data=[CHAT])
        assert gone.status_code == 400
        assert first in gone.json()["detail"]
        assert (await bell.train(await bell.lora()))["loss"] > 0, "the key has a new session"


async def test_a_model_text_that_cannot_be_loaded_is_told(open_server: OpenServer) -> None:
    async with open_server(card=replace(CARD, source="/nowhere/at/all")) as client:
        answer = await client.http.post("/api/v1/forward_backward", json={"model_id": "m", "data": [CHAT]})
        assert answer.status_code == 400
        assert "/nowhere/at/all" in answer.json()["detail"]


async def test_an_error_of_a_user_keeps_its_status_in_the_synchronous_form(bell: Bell) -> None:
    """Row 16: one error, and each form its own status and shape."""
    model_id = await bell.lora()
    bell.engine.fail_items(model_id, InvalidInput("weights[3] is -1"))
    answer = await bell.post("/api/v1/forward_backward", model_id=model_id, data=[CHAT])
    assert (answer.status_code, answer.json()["detail"]) == (400, "weights[3] is -1")
    bell.engine.fail_items(model_id, ServerError("broken"))
    answer = await bell.post("/api/v1/forward_backward", model_id=model_id, data=[CHAT])
    assert (answer.status_code, answer.json()["detail"]) == (500, "Job failed: broken")
    assert answer.json()["request_id"].startswith("future_")
