"""Waiting for results: what the server may answer, and how fast it is asked again."""

from __future__ import annotations

import time

import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker, after, answer, no_connection, status
from tinsmith import types
from tinsmith.client import (
    APIConnectionError,
    APITimeoutError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    PromiseExpiredError,
    RequestFailedError,
    SamplingClient,
    ServiceClient,
    Timing,
    TrainingClient,
)
from tinsmith.client.budget import ByteBudget
from tinsmith.client.polling import QueueStateLog

TRY_AGAIN = {"type": "try_again", "request_id": "x", "queue_state": "active"}


def step(client: TrainingClient) -> dict[str, float] | None:
    return client.optim_step(types.AdamParams()).result(5).metrics


@pytest.mark.parametrize("not_yet", [status(408, {"queue_state": "active"}), answer(TRY_AGAIN)])
def test_a_server_that_does_not_hold_polls_is_asked_with_growing_pauses(
    training: TrainingClient, server: FakeTinker, not_yet: object
) -> None:
    server.script("retrieve_future", *[not_yet] * 4)
    started = time.monotonic()
    step(training)
    assert time.monotonic() - started >= 0.01 + 0.02 + 0.04 + 0.05
    iterations = [seen.headers["x-tinker-request-iteration"] for seen in server.of("retrieve_future")]
    assert iterations == ["0", "1", "2", "3", "4"]


def test_a_server_that_holds_polls_is_asked_again_at_once(server: FakeTinker) -> None:
    timing = Timing(poll_held=0.02, poll_pause_initial=5.0, poll_pause_max=5.0)
    with ServiceClient(base_url="http://fake.test", api_key="k", timing=timing, transport=server) as service:
        training = service.create_lora_training_client("m").result(5)

        async def held(fake: FakeTinker, seen: object) -> object:
            await after(0.03)(fake, seen)  # type: ignore[arg-type]
            return await status(408)(fake, seen)  # type: ignore[arg-type]

        server.script("retrieve_future", *[held] * 3)  # type: ignore[list-item]
        started = time.monotonic()
        step(training)
        assert time.monotonic() - started < 2


def test_results_are_first_announced_and_then_fetched(training: TrainingClient, server: FakeTinker) -> None:
    server.script("retrieve_future", answer({"status": "complete_metadata", "response_payload_size": 1000}))
    step(training)
    assert [seen.body["allow_metadata_only"] for seen in server.of("retrieve_future")] == [True, False]


def test_server_errors_and_lost_connections_are_polled_through(training: TrainingClient, server: FakeTinker) -> None:
    server.script("retrieve_future", status(503), no_connection(), status(500), no_connection())
    assert step(training) == {"step:sum": 1.0}
    assert len(server.of("retrieve_future")) == 5


def test_polls_that_keep_failing_end_in_the_last_error(training: TrainingClient, server: FakeTinker) -> None:
    server.always["retrieve_future"] = status(503, {"detail": "engine died"})
    with pytest.raises(InternalServerError, match="engine died") as failure:
        step(training)
    assert failure.value.retryable
    assert len(server.of("retrieve_future")) >= 10
    server.always["retrieve_future"] = no_connection()
    with pytest.raises(APIConnectionError, match="connection refused"):
        step(training)


def test_a_poll_nobody_answers_is_a_failed_poll(server: FakeTinker) -> None:
    timing = Timing(poll_timeout=0.02, poll_give_up=0.1, poll_retry_initial=0.005)
    with ServiceClient(base_url="http://fake.test", api_key="k", timing=timing, transport=server) as service:
        server.script("retrieve_future", after(5))
        training = service.create_lora_training_client("m").result(5)
        server.always["retrieve_future"] = after(5)
        with pytest.raises(APITimeoutError, match=r"retrieve_future had no answer within 0\.02 s"):
            step(training)


def test_rate_limits_are_waited_out_as_long_as_they_ask(training: TrainingClient, server: FakeTinker) -> None:
    server.script("retrieve_future", status(429, **{"retry-after-ms": "80"}), status(429, **{"retry-after": "0.08"}))
    started = time.monotonic()
    step(training)
    assert time.monotonic() - started >= 0.16


def test_a_bad_request_is_tried_three_times_more(training: TrainingClient, server: FakeTinker) -> None:
    server.script("retrieve_future", *[status(400)] * 3)
    step(training)
    server.always["retrieve_future"] = status(400, {"detail": "garbled"})
    server.rewind()
    with pytest.raises(BadRequestError, match="garbled"):
        step(training)
    assert len(server.of("retrieve_future")) == 4


def test_unknown_and_expired_results_of_training_are_errors(training: TrainingClient, server: FakeTinker) -> None:
    server.script("retrieve_future", status(404))
    with pytest.raises(NotFoundError):
        step(training)
    server.script("retrieve_future", status(410))
    with pytest.raises(PromiseExpiredError):
        step(training)


def test_failures_carry_who_is_to_blame(training: TrainingClient, server: FakeTinker) -> None:
    server.script("retrieve_future", answer({"error": "out of memory", "category": "server"}))
    with pytest.raises(RequestFailedError) as failure:
        step(training)
    error = failure.value
    assert (error.message, error.request_id, error.category) == ("out of memory", "s:train:0:1", "server")
    assert (error.type, error.status, error.retryable) == ("request_failed", None, True)
    server.script("retrieve_future", answer({"error": "odd", "category": "weird"}))
    with pytest.raises(RequestFailedError) as failure:
        step(training)
    assert failure.value.category == types.RequestErrorCategory.Unknown


def test_an_expired_sample_is_sent_anew_under_a_new_number(sampling: SamplingClient, server: FakeTinker) -> None:
    server.script("retrieve_future", status(410))
    response = sampling.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=3)).result(5)
    assert [seen.body["seq_id"] for seen in server.of("asample")] == [0, 1]
    assert response.sequences[0].sequence_id == "s:sample:0:1:0"


def test_samples_that_always_expire_end_in_an_error(sampling: SamplingClient, server: FakeTinker) -> None:
    sampling._retry = type(sampling._retry)(retry_delay_base=0.001)
    server.always["retrieve_future"] = status(410)
    with pytest.raises(PromiseExpiredError):
        sampling.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=3)).result(5)
    assert len(server.of("asample")) == 9


def test_the_reason_of_a_pause_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    log = QueueStateLog("sampling from x")
    log("active", None)
    log("paused_capacity", "the engine is full")
    log("paused_capacity", "the engine is full")
    assert [record.getMessage() for record in caplog.records] == [
        "sampling from x waits: the server says paused_capacity (the engine is full)"
    ]


def test_the_timing_of_tests_is_not_the_timing_of_users() -> None:
    assert (Timing().poll_timeout, Timing().heartbeat_every) == (45.0, 10.0)
    assert FAST.poll_timeout < 5


async def _held(budget: ByteBudget, num_bytes: int) -> None:
    async with budget.reserve(num_bytes):
        pass


def test_a_byte_budget_lets_waiters_in_by_their_order_and_forgets_cancelled_ones() -> None:
    import asyncio

    async def scenario() -> list[str]:
        budget, order = ByteBudget(10), []

        async def use(name: str, num_bytes: int) -> None:
            async with budget.reserve(num_bytes):
                order.append(name)
                await asyncio.sleep(0.005)

        tasks = [asyncio.create_task(use(name, size)) for name, size in (("a", 6), ("b", 6), ("c", 100), ("d", 1))]
        await asyncio.sleep(0.001)
        assert order == ["a"]
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(_held(budget, 10), 1)
        return order

    assert asyncio.run(scenario()) == ["a", "c", "d"]
