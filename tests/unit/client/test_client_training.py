"""Order, chunks and failures of training requests."""

from __future__ import annotations

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker, after, lose_reply, only_for, status, until
from tinsmith import types
from tinsmith.client import (
    BadRequestError,
    ClientClosedError,
    NotFoundError,
    RequestFailedError,
    ServiceClient,
    TrainingClient,
)


def datum(*targets: int, weight: float = 1.0) -> types.Datum:
    return types.Datum(
        types.ModelInput.from_ints([1] * len(targets)),
        {"target_tokens": list(targets), "weights": [weight] * len(targets)},
    )


def client_of(server: FakeTinker) -> ServiceClient:
    return ServiceClient(base_url="http://fake.test", api_key="tml-secret", timing=FAST, transport=server)


def test_creating_a_client_asks_for_what_the_protocol_says_and_in_its_order(
    service: ServiceClient, server: FakeTinker
) -> None:
    client = service.create_lora_training_client("tinsmith/tiny", rank=8, seed=3, train_attn=False).result(5)
    assert [seen.path for seen in server.seen] == [
        "client/config", "client/dynamic_config", "create_session", "create_model", "retrieve_future", "get_info"
    ]  # fmt: skip
    assert client.model_id == "s:train:0"
    assert server.of("create_model")[0].body == {
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": "tinsmith/tiny",
        "lora_config": {"rank": 8, "seed": 3, "train_unembed": True, "train_mlp": True, "train_attn": False},
        "optimizer_config": {"type": "adamw"},
        "type": "create_model",
    }


def test_service_client_sends_nothing_before_its_first_call(server: FakeTinker) -> None:
    client_of(server).close().result(5)
    assert server.seen == []


def test_losses_are_summed_and_outputs_keep_the_order_of_the_data(training: TrainingClient) -> None:
    result = training.forward_backward([datum(0, 1), datum(2, weight=2.0)], "cross_entropy").result(5)
    assert result.metrics["loss:sum"] == pytest.approx(0.1 + 0.2 + 2 * 0.3)
    assert [t.tolist() for t in result.logprobs] == [pytest.approx([-0.1, -0.2]), pytest.approx([-0.3])]


@pytest.mark.parametrize(("num_datums", "sizes"), [(1, [1]), (1024, [1024]), (1025, [1024, 1])])
def test_a_call_is_split_after_1024_datums(
    training: TrainingClient, server: FakeTinker, num_datums: int, sizes: list[int]
) -> None:
    result = training.forward_backward([datum(i % 16) for i in range(num_datums)], "cross_entropy").result(20)
    requests = sorted((seen.body["request"] for seen in server.of("forward_backward")), key=lambda r: r.seq_id)
    assert [len(request.data) for request in requests] == sizes
    assert [output["logprobs"].tolist()[0] for output in result.loss_fn_outputs] == pytest.approx(
        [-(i % 16 + 1) / 10 for i in range(num_datums)]
    )


def test_empty_data_is_an_error_that_uses_no_number(training: TrainingClient, server: FakeTinker) -> None:
    with pytest.raises(ValueError, match="data is empty"):
        training.forward_backward([], "cross_entropy").result(5)
    training.optim_step(types.AdamParams()).result(5)
    assert server.submitted() == [1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"target_tokens": np.ones(2, np.float32)}, r"data\[1\].loss_fn_inputs\['target_tokens'\] must be int64"),
        ({"target_tokens": [1, 2], "weights": np.array([0, 1])}, r"\['weights'\] must be float32, not int64"),
        ({"target_tokens": [1, 2, 3]}, r"\['target_tokens'\] has 3 rows for a model_input of 2 tokens"),
    ],
)
def test_bad_loss_inputs_fail_before_anything_is_sent(
    training: TrainingClient, server: FakeTinker, inputs: dict[str, object], message: str
) -> None:
    bad = types.Datum(types.ModelInput.from_ints([1, 2]), inputs)
    with pytest.raises(ValueError, match=message):
        training.forward_backward([datum(1), bad], "cross_entropy").result(5)
    assert server.seen == []


def test_a_number_json_cannot_hold_is_named_and_uses_no_sequence_number(
    training: TrainingClient, server: FakeTinker
) -> None:
    with pytest.raises(ValueError, match=r"adam_params.learning_rate = nan must be a finite number"):
        training.optim_step(types.AdamParams(learning_rate=float("nan"))).result(5)
    training.optim_step(types.AdamParams()).result(5)
    assert server.submitted() == [1]


def test_parallel_chunks_send_the_first_chunk_last() -> None:
    server = FakeTinker(flags={"fwdbwd_max_chunk_len": 2})
    with client_of(server) as service:
        training = service.create_lora_training_client("m").result(5)
        server.rewind()
        server.script("forward_backward", after(0.03), after(0.03))
        training.forward_backward([datum(i) for i in range(5)], "cross_entropy").result(5)
    early, late, last = server.of("forward_backward")
    assert {early.body["seq_id"], late.body["seq_id"]} == {2, 3}
    assert late.started < early.done
    assert last.body["seq_id"] == 1
    assert last.started > max(early.done, late.done)


def test_serial_chunks_go_one_after_another_in_order() -> None:
    server = FakeTinker(flags={"fwdbwd_max_chunk_len": 2, "parallel_fwdbwd_chunks": False})
    with client_of(server) as service:
        training = service.create_lora_training_client("m").result(5)
        server.rewind()
        training.forward_backward([datum(i) for i in range(5)], "cross_entropy").result(5)
    seen = server.of("forward_backward")
    assert [one.body["seq_id"] for one in seen] == [1, 2, 3]
    assert all(first.done < second.started for first, second in itertools.pairwise(seen))


def test_bodies_are_compressed_where_the_server_asks_for_it() -> None:
    server = FakeTinker(flags={"proto_compress_fwdbwd": True})
    with client_of(server) as service:
        training = service.create_lora_training_client("m").result(5)
        result = training.forward([datum(i % 16) for i in range(200)], "cross_entropy").result(5)
    assert len(result.loss_fn_outputs) == 200
    assert server.of("forward_backward")[0].headers["content-encoding"] == "zstd"


def test_200_calls_from_threads_and_tasks_arrive_strictly_in_order(
    training: TrainingClient, server: FakeTinker
) -> None:
    def from_thread(i: int) -> object:
        if i % 2:
            return training.optim_step(types.AdamParams()).result(20)
        return training.forward_backward([datum(i % 16)], "cross_entropy").result(20)

    async def from_tasks() -> None:
        async def one() -> None:
            await training.optim_step(types.AdamParams())

        await asyncio.gather(*(one() for _ in range(100)))

    with ThreadPoolExecutor(20) as pool:
        work = [pool.submit(from_thread, i) for i in range(100)]
        asyncio.run(from_tasks())
        for one in work:
            one.result(20)
    posts = [seen for seen in server.seen if "seq_id" in seen.body]
    assert [seen.body["seq_id"] for seen in posts] == list(range(1, 201))
    assert all(first.done < second.started for first, second in itertools.pairwise(posts))


def test_the_next_call_waits_for_the_acknowledgement_not_for_the_result(
    training: TrainingClient, server: FakeTinker
) -> None:
    gate = threading.Event()
    server.always["retrieve_future"] = only_for("s:train:0:1", until(gate))
    first = training.forward_backward([datum(1)], "cross_entropy")
    second = training.optim_step(types.AdamParams())
    assert second.result(5).metrics == {"step:sum": 1.0}
    assert not first.done()
    gate.set()
    first.result(5)


def test_one_failed_chunk_fails_one_future_and_is_named() -> None:
    server = FakeTinker(flags={"fwdbwd_max_chunk_len": 2})
    with client_of(server) as service:
        training = service.create_lora_training_client("m").result(5)
        server.results["s:train:0:2"] = {"error": "token 99 is out of range", "category": "user"}
        with pytest.raises(RequestFailedError) as failure:
            training.forward_backward([datum(i) for i in range(5)], "cross_entropy").result(5)
        assert str(failure.value) == "chunk 2 of 3 (data[2..3], seq 2): token 99 is out of range"
        assert failure.value.category == types.RequestErrorCategory.User
        assert failure.value.request_id == "s:train:0:2"
        training.optim_step(types.AdamParams()).result(5)
    assert sorted(server.submitted()) == [1, 2, 3, 4]


def test_a_rejected_chunk_does_not_keep_the_others_from_being_sent() -> None:
    """Else their numbers would never come, and the server would wait for them."""
    server = FakeTinker(flags={"fwdbwd_max_chunk_len": 2})
    with client_of(server) as service:
        training = service.create_lora_training_client("m").result(5)
        server.rewind()
        server.script("forward_backward", status(400))
        with pytest.raises(BadRequestError, match=r"chunk [23] of 3"):
            training.forward_backward([datum(i) for i in range(5)], "cross_entropy").result(5)
        training.optim_step(types.AdamParams()).result(5)
    assert sorted(server.submitted()) == [1, 2, 3, 4]


def test_a_rejected_call_lets_the_next_one_go(training: TrainingClient, server: FakeTinker) -> None:
    server.script("optim_step", status(400, {"detail": "no"}))
    first, second = training.optim_step(types.AdamParams()), training.optim_step(types.AdamParams())
    with pytest.raises(BadRequestError, match="no"):
        first.result(5)
    assert second.result(5).metrics == {"step:sum": 1.0}
    assert server.submitted() == [1, 2]


def test_a_lost_reply_is_asked_for_again_with_the_same_number_and_key(
    training: TrainingClient, server: FakeTinker
) -> None:
    server.script("forward_backward", lose_reply())
    training.forward_backward([datum(3)], "cross_entropy").result(5)
    first, again = server.of("forward_backward")
    assert first.body["seq_id"] == again.body["seq_id"] == 1
    assert first.headers["x-idempotency-key"] == again.headers["x-idempotency-key"]
    assert [first.headers["x-stainless-retry-count"], again.headers["x-stainless-retry-count"]] == ["0", "1"]
    assert server.gradient[3] == -1.0


def test_optim_step_takes_exactly_one_set_of_parameters(training: TrainingClient, server: FakeTinker) -> None:
    training.optim_step(adam_params=types.AdamParams(learning_rate=0.5)).result(5)
    training.optim_step(types.DimuonParams(learning_rate=0.5)).result(5)
    first, second = (seen.body for seen in server.of("optim_step"))
    assert first["adam_params"]["learning_rate"] == 0.5
    assert set(first["adam_params"]) == {
        "learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"
    }  # fmt: skip
    assert second["optimizer_params"]["type"] == "dimuon"
    with pytest.raises(ValueError, match="exactly one"):
        training.optim_step(types.AdamParams(), adam_params=types.AdamParams()).result(5)


def test_saves_and_loads_carry_the_fields_of_the_protocol(training: TrainingClient, server: FakeTinker) -> None:
    saved = training.save_state("a", ttl_seconds=3600, user_metadata={"k": "v"}).result(5)
    assert saved.path == "tinker://s:train:0/weights/a"
    assert training.save_weights_for_sampler("b").result(5).path == "tinker://s:train:0/sampler_weights/b"
    with pytest.warns(FutureWarning, match="deprecated"):
        training.load_state_with_optimizer(saved.path).result(5)
    assert server.of("save_weights")[0].body == {
        "path": "a", "ttl_seconds": 3600, "overwrite": False, "user_metadata": {"k": "v"},
        "model_id": "s:train:0", "seq_id": 1, "type": "save_weights",
    }  # fmt: skip
    assert server.of("save_weights_for_sampler")[0].body == {
        "path": "b", "kind": "snapshot", "model_id": "s:train:0", "seq_id": 2, "type": "save_weights_for_sampler"
    }  # fmt: skip
    assert server.of("load_weights")[0].body == {
        "path": saved.path, "optimizer": True, "model_id": "s:train:0", "seq_id": 3, "type": "load_weights"
    }  # fmt: skip


def test_a_client_from_a_checkpoint_is_created_by_loading(service: ServiceClient, server: FakeTinker) -> None:
    path = "tinker://old:train:0/weights/a"
    client = service.create_training_client_from_state_with_optimizer(path).result(5)
    other = service.create_training_client_from_state(path).result(5)
    assert [client.model_id, other.model_id] == ["s:train:0", "s:train:1"]
    assert server.of("load_weights")[0].body == {
        "session_id": "s", "model_seq_id": 0, "path": path, "optimizer": True, "type": "load_weights"
    }  # fmt: skip
    assert server.of("load_weights")[1].body["optimizer"] is False
    client.optim_step(types.AdamParams()).result(5)
    assert server.of("optim_step")[0].body["seq_id"] == 1
    with pytest.raises(ValueError, match="not a checkpoint path: 'a/b'"):
        service.create_training_client_from_state("a/b").result(5)


def test_creation_failures_name_what_the_server_said(service: ServiceClient, server: FakeTinker) -> None:
    server.script("create_model", status(404, {"detail": "no base model 'x'"}))
    with pytest.raises(NotFoundError, match="no base model 'x'"):
        service.create_lora_training_client("x").result(5)
    for rank in (0, True):
        with pytest.raises(ValueError, match=f"rank must be at least 1, not {rank}"):
            service.create_lora_training_client("x", rank=rank).result(5)
    with pytest.raises(ValueError, match=r"(?s)rank.*valid integer.*eight"):
        service.create_lora_training_client("x", rank="eight").result(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one of"):
        service.create_lora_training_client("x", train_mlp=False, train_attn=False, train_unembed=False).result(5)


def test_calls_on_a_closed_client_fail_at_once(training: TrainingClient, service: ServiceClient) -> None:
    service.close().result(5)
    with pytest.raises(ClientClosedError, match="closed"):
        training.forward_backward([datum(1)], "cross_entropy").result(1)


def test_the_tokenizer_is_that_of_the_shipped_model(training: TrainingClient) -> None:
    tokenizer = training.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
