"""Futures: every way to wait, and none that waits for ever."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker, answer, until
from tinsmith import types
from tinsmith.client import (
    APIFuture,
    APIResponseValidationError,
    ClientClosedError,
    RequestFailedError,
    ServiceClient,
    TrainingClient,
    batches,
    polling,
    training,
)
from tinsmith.client.loop import LoopThread

DATA = [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2], "weights": [1.0]})]


def test_a_future_is_awaited_many_times_in_many_loops_with_the_same_value(training: TrainingClient) -> None:
    future = training.forward_backward(DATA, "cross_entropy")

    async def wait() -> list[object]:
        return [await future, await future.result_async(5), await future.coroutine(), await future]

    values = [*asyncio.run(wait()), *asyncio.run(wait()), future.result(5), future.future().result(5)]
    assert all(value is values[0] for value in values)


def test_a_failure_reaches_every_waiter(training: TrainingClient, server: FakeTinker) -> None:
    server.results["s:train:0:1"] = {"error": "no", "category": "user"}
    future = training.forward_backward(DATA, "cross_entropy")

    async def wait() -> list[BaseException | object]:
        return await asyncio.gather(future.coroutine(), future.coroutine(), return_exceptions=True)

    first, second = asyncio.run(wait())
    assert isinstance(first, RequestFailedError)
    assert first is second
    with pytest.raises(RequestFailedError):
        future.result(5)


def test_result_works_inside_a_running_loop(training: TrainingClient) -> None:
    async def cell() -> float:
        return training.forward_backward(DATA, "cross_entropy").result(5).metrics["loss:sum"]

    assert asyncio.run(cell()) == pytest.approx(0.3)


def test_a_timeout_leaves_the_work_running(training: TrainingClient, server: FakeTinker) -> None:
    gate = threading.Event()
    server.script("retrieve_future", until(gate))
    future = training.optim_step(types.AdamParams())
    with pytest.raises(TimeoutError):
        future.result(0.02)
    with pytest.raises(TimeoutError):
        asyncio.run(future.result_async(0.02))
    gate.set()
    assert future.result(5).metrics == {"step:sum": 1.0}


def test_cancelling_a_waiter_leaves_the_work_running(training: TrainingClient, server: FakeTinker) -> None:
    gate = threading.Event()
    server.script("retrieve_future", until(gate))
    future = training.optim_step(types.AdamParams())

    async def give_up() -> None:
        waiter = asyncio.ensure_future(future.coroutine())
        await asyncio.sleep(0.01)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    asyncio.run(give_up())
    assert not future.future().cancel()
    gate.set()
    assert future.result(5).metrics == {"step:sum": 1.0}


def test_result_on_the_clients_own_thread_is_an_error_and_no_deadlock(
    training: TrainingClient, server: FakeTinker
) -> None:
    gate = threading.Event()
    server.script("retrieve_future", until(gate))
    slow = training.forward_backward(DATA, "cross_entropy")
    caught: concurrent.futures.Future[BaseException] = concurrent.futures.Future()

    def callback(_: object) -> None:
        try:
            slow.result(5)
        except BaseException as error:  # noqa: BLE001
            caught.set_result(error)

    attached = threading.Event()

    async def end_once_attached() -> None:
        attached.wait(5)

    training._connection.begin(end_once_attached).add_done_callback(callback)
    attached.set()  # what is done already calls back in this thread
    error = caught.result(5)
    gate.set()
    assert isinstance(error, RuntimeError)
    assert "would wait for ever" in str(error)


async def nothing() -> None:
    await asyncio.sleep(0)


class Injected(Exception):
    pass


def explode(*_: object, **__: object) -> Any:
    raise Injected("injected")


def explode_later(*_: object, **__: object) -> Any:
    async def act() -> None:
        raise Injected("injected")

    return act()


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [
        (batches, "encode_train_request", explode),
        (training, "split", explode),
        ("http", "_exchange", explode_later),
        ("http", "_headers", explode),
        (training.TrainingClient, "_submit_chunk", explode_later),
        ("link", "result", explode_later),
        (polling.ResultPoller, "_call", explode),
        (polling.ResultPoller, "_read", explode),
        (training, "decode_forward_backward_output", explode),
        (training, "merge_outputs", explode),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_raise_at_any_stage_ends_the_future_within_a_second(
    training: TrainingClient,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    replacement: Callable[..., object],
) -> None:
    link = training._connection.link
    target = {"http": link.http, "link": link}.get(owner, owner) if isinstance(owner, str) else owner
    with monkeypatch.context() as patch:
        patch.setattr(target, name, replacement)
        started = time.monotonic()
        future = training.forward_backward(DATA, "cross_entropy")
        with pytest.raises(Injected):
            future.result(1)
        assert time.monotonic() - started < 1
    training.optim_step(types.AdamParams()).result(1)


def test_a_callback_that_raises_spoils_neither_the_future_nor_the_client(
    training: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    future = training.forward_backward(DATA, "cross_entropy")
    future.add_done_callback(explode)
    assert future.result(1).metrics["loss:sum"]
    assert training.optim_step(types.AdamParams()).result(1).metrics == {"step:sum": 1.0}
    assert "exception calling callback" in caplog.text


@pytest.mark.parametrize(
    "body",
    [b"not json", b"[1, 2]", {"metrics": {"a": "text"}}, {"status": "complete_metadata", "response_payload_size": -1}],
)
def test_a_malformed_result_is_a_validation_error(training: TrainingClient, server: FakeTinker, body: object) -> None:
    server.script("retrieve_future", answer(body))
    with pytest.raises(APIResponseValidationError, match="s:train:0:1"):
        training.optim_step(types.AdamParams()).result(1)


@pytest.mark.parametrize("body", [b"", b"{}", {"request_id": 7}, {}])
def test_a_malformed_acknowledgement_is_a_validation_error(
    training: TrainingClient, server: FakeTinker, body: object
) -> None:
    server.script("optim_step", answer(body))
    with pytest.raises(APIResponseValidationError, match="no valid UntypedAPIFuture"):
        training.optim_step(types.AdamParams()).result(1)


def test_json_where_protobuf_is_due_is_a_validation_error(training: TrainingClient, server: FakeTinker) -> None:
    server.script("retrieve_future", answer({"loss": 1.0}))
    with pytest.raises(APIResponseValidationError, match="JSON where the protocol asks for protobuf"):
        training.forward(DATA, "cross_entropy").result(1)


def test_even_system_exit_in_the_work_only_ends_its_own_future() -> None:
    loop = LoopThread("test")

    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        loop.run(leave()).result(1)
    loop.run(nothing()).result(1)
    loop.stop()
    loop.join(1)


def test_stopping_settles_what_is_under_way_and_what_comes_after() -> None:
    loop = LoopThread("test")

    async def for_ever() -> None:
        await asyncio.Event().wait()

    outcomes = [loop.run(for_ever()) for _ in range(20)]
    loop.stop()
    outcomes += [loop.run(for_ever()) for _ in range(20)]
    for outcome in outcomes:
        with pytest.raises(ClientClosedError):
            outcome.result(3)
    loop.join(3)


def test_cancelling_work_before_its_first_step_settles_it() -> None:
    loop = LoopThread("test")
    release = threading.Event()

    async def block() -> None:
        release.wait(2)

    blocking = loop.run(block())
    outcome = loop.run(nothing())
    loop.cancel(outcome)
    release.set()
    blocking.result(2)
    with pytest.raises(concurrent.futures.CancelledError):
        outcome.result(2)
    loop.stop()
    loop.join(2)


def _use_in_child(client: ServiceClient, pipe: Any) -> None:
    try:
        client.create_lora_training_client("m").result(2)
    except ClientClosedError as error:
        pipe.send(str(error))


def test_a_forked_child_gets_a_clear_error_instead_of_a_hang(service: ServiceClient) -> None:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is what is tested
        child = context.Process(target=_use_in_child, args=(service, theirs))
        child.start()
    assert mine.poll(10)
    assert "before the process forked" in mine.recv()
    child.join(10)


def test_waiting_in_a_forked_child_for_what_its_parent_began_is_refused(
    training: TrainingClient, server: FakeTinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    server.script("retrieve_future", until(gate))
    future = training.optim_step(types.AdamParams())

    async def wait() -> None:
        await future

    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        for waits in (future.result, future.exception, lambda: asyncio.run(wait())):
            with pytest.raises(ClientClosedError, match="before the process forked"):
                waits()
    gate.set()
    assert future.exception(5) is None


def test_a_client_future_is_awaited_and_also_used_as_the_client_itself(service: ServiceClient) -> None:
    future = service.create_lora_training_client("m")
    assert isinstance(future, APIFuture)
    with pytest.warns(FutureWarning, match=r"before using \.forward_backward"):
        result = future.forward_backward(DATA, "cross_entropy").result(5)
    assert result.metrics["loss:sum"] == pytest.approx(0.3)
    assert future.result(5).model_id == "s:train:0"
    with pytest.raises(AttributeError):
        future.no_such_method()

    async def wait() -> TrainingClient:
        return await future

    assert asyncio.run(wait()) is future.result(5)


def test_async_twins_warn_and_work(service: ServiceClient) -> None:
    async def script() -> float:
        client = await service.create_lora_training_client_async(base_model="m", rank=4)
        future = await client.forward_backward_async(DATA, "cross_entropy")
        step = await client.optim_step_async(types.AdamParams())
        await step
        sampler = await client.save_weights_and_get_sampling_client_async("x")
        prompt = types.ModelInput.from_ints([1])
        await sampler.sample_async(prompt=prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=1))
        return (await future).metrics["loss:sum"]

    with pytest.warns(FutureWarning) as seen:
        assert asyncio.run(script()) == pytest.approx(0.3)
    assert sorted({str(one.message).partition("(")[0] for one in seen}) == [
        "create_lora_training_client_async",
        "forward_backward_async",
        "optim_step_async",
        "sample_async",
        "save_weights_and_get_sampling_client_async",
    ]
    assert {one.filename for one in seen} == {__file__}


def test_many_clients_leave_no_threads_behind(server: FakeTinker) -> None:
    before = threading.active_count()
    for _ in range(100):
        with ServiceClient(base_url="http://fake.test", api_key="k", timing=FAST, transport=server):
            pass
    for _ in range(100):
        ServiceClient(base_url="http://fake.test", api_key="k", timing=FAST, transport=server)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
