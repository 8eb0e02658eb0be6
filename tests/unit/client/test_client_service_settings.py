"""Settings that a server sends and what a client does about them: one poll for many samples, cancelling, billing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker, no_connection, status, until
from tinsmith.client import (
    APIConnectionError,
    BillingError,
    CircuitOpenError,
    NotFoundError,
    RetryConfig,
    SamplingClient,
    ServiceClient,
    TrainingClient,
)
from tinsmith.client.breaker import Breaker
from tinsmith.client.budget import SampleGate
from tinsmith.types import AdamParams, ModelInput, SamplingParams

PROMPT = ModelInput.from_ints([1, 2, 3])
PARAMS = SamplingParams(max_tokens=3)


class Polled(FakeTinker):
    """Announces every sample as ended with the next poll of its session."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.flags["sample_use_retrieve_futures"] = True
        self.announced: set[str] = set()
        self.cursor = 0

    def do_retrieve_futures(self, _: Any) -> httpx2.Response:
        ended = sorted({str(i) for i in self.executed.values()} - self.announced)
        self.announced.update(ended)
        self.cursor += len(ended)
        completions = [{"state": "finished", "request_id": i, "response_payload_uncompressed_size": 100} for i in ended]
        return httpx2.Response(200, json={"completions": completions, "cursor": self.cursor})


def service_of(server: FakeTinker, **timing: Any) -> ServiceClient:
    return ServiceClient(base_url="http://fake.test", api_key="tml-k", timing=replace(FAST, **timing), transport=server)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- one poll for many ----


def test_samples_share_one_poll_and_their_results_are_acknowledged() -> None:
    server = Polled()
    with service_of(server) as service:
        sampling = service.create_sampling_client(base_model="m").result(5)
        futures = [sampling.sample(PROMPT, 1, PARAMS) for _ in range(20)]
        assert all(future.result(5).sequences[0].tokens == [1, 2, 3] for future in futures)
        retrieved = [i for seen in server.of("retrieve_futures") for i in seen.body["retrieved_request_ids"]]
        wait_for(lambda: len({i for s in server.of("retrieve_futures") for i in s.body["retrieved_request_ids"]}) == 20)
    polls = server.of("retrieve_futures")
    assert polls[0].body == {
        "target": {"type": "sampling_session", "sampling_session_id": "s:sample:0", "cloned_sampler_id": 0},
        "prev_cursor": 0,
        "retrieved_request_ids": [],
    }
    assert len(retrieved) <= 20
    assert polls[-1].body["timeout"] == 0.0
    assert polls[-1].body["prev_cursor"] == 20
    fetched = server.of("retrieve_future")
    assert len(fetched) == 20
    assert {seen.body["allow_metadata_only"] for seen in fetched} == {False}


def test_a_poll_that_may_pass_is_repeated_and_one_that_will_not_fails_every_sample() -> None:
    server = Polled()
    with service_of(server) as service:
        sampling = service.create_sampling_client(base_model="m").result(5)
        server.script("retrieve_futures", status(503), no_connection(), status(400))
        assert sampling.sample(PROMPT, 1, PARAMS).result(5).sequences
        wait_for(lambda: server.of("retrieve_futures")[-1].body.get("timeout") == 0.0)
        server.always["retrieve_futures"] = status(404)
        for _ in range(2):
            with pytest.raises(NotFoundError):
                sampling.sample(PROMPT, 1, PARAMS).result(5)


@pytest.mark.parametrize("error", [RuntimeError("in the transport"), httpx2.ConnectError("refused")])
def test_a_poll_that_cannot_be_made_ends_in_its_error_and_the_next_sample_polls_anew(error: Exception) -> None:
    async def fail(_: FakeTinker, __: object) -> httpx2.Response:
        raise error

    server = Polled()
    with service_of(server) as service:
        sampling = service.create_sampling_client(
            base_model="m", retry_config=RetryConfig(enable_retry_logic=False)
        ).result(5)
        server.always["retrieve_futures"] = fail
        with pytest.raises((RuntimeError, APIConnectionError), match=str(error)):
            sampling.sample(PROMPT, 1, PARAMS).result(5)
        del server.always["retrieve_futures"]
        assert sampling.sample(PROMPT, 1, PARAMS).result(5).sequences


# ---- cancelling ----


@pytest.mark.parametrize("enabled", [True, False])
def test_a_sample_given_up_is_cancelled_where_the_server_wants_to_know(enabled: bool) -> None:
    server, gate = FakeTinker(settings={"sample_cancel_enabled": enabled}), threading.Event()
    with service_of(server) as service:
        sampling = service.create_sampling_client(base_model="m").result(5)
        server.script("retrieve_future", until(gate))
        future = sampling.sample(PROMPT, 1, PARAMS)
        wait_for(lambda: bool(server.of("retrieve_future")))
        assert future.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(5)
        assert not future.cancel()
        if enabled:
            wait_for(lambda: bool(server.of("cancel_future")))
            assert server.of("cancel_future")[0].body == {"request_id": "s:sample:0:0"}
        gate.set()
        assert sampling.sample(PROMPT, 1, PARAMS).result(5).sequences
    assert len(server.of("cancel_future")) == enabled


def test_what_trains_cannot_be_taken_back(training: TrainingClient, server: FakeTinker) -> None:
    gate = threading.Event()
    server.script("retrieve_future", until(gate))
    future = training.optim_step(AdamParams())
    assert not future.cancel()
    gate.set()
    assert future.result(5).metrics == {"step:sum": 1.0}


def test_timing_out_a_wait_does_not_cancel(sampling: SamplingClient, server: FakeTinker) -> None:
    gate = threading.Event()
    server.script("retrieve_future", until(gate))
    future = sampling.sample(PROMPT, 1, PARAMS)
    with pytest.raises(TimeoutError):
        asyncio.run(future.result_async(0.05))
    gate.set()
    assert future.result(5).sequences


# ---- billing ----


def test_an_answer_402_is_waited_out_for_as_long_as_the_server_says() -> None:
    server = FakeTinker(flags={"billing_exception_max_pause_duration_sec": 60})
    with service_of(server, billing_pause=0.01) as service:
        training = service.create_lora_training_client("m").result(5)
        server.script("optim_step", status(402), status(402))
        server.script("retrieve_future", status(402))
        assert training.optim_step(AdamParams()).result(5).metrics == {"step:sum": 1.0}
    assert len(server.of("optim_step")) == 3


def test_an_answer_402_beyond_that_is_an_error() -> None:
    server = FakeTinker(flags={"billing_exception_max_pause_duration_sec": 0})
    with service_of(server) as service:
        training = service.create_lora_training_client("m").result(5)
        server.script("optim_step", status(402))
        with pytest.raises(BillingError) as failure:
            training.optim_step(AdamParams()).result(5)
    assert "billing" in failure.value.advice


# ---- the circuit breaker ----


def test_calls_that_keep_failing_make_an_endpoint_rest_until_one_probe_succeeds() -> None:
    now = [0.0]
    breaker = Breaker(2, 30.0, clock=lambda: now[0])
    for _ in range(2):
        assert breaker.seconds_closed_for("a") == 0
        breaker.failed("a")
    assert breaker.seconds_closed_for("a") == 30
    assert breaker.seconds_closed_for("b") == 0
    now[0] = 31
    assert breaker.seconds_closed_for("a") == 0
    assert breaker.seconds_closed_for("a") > 0
    breaker.failed("a")
    assert breaker.seconds_closed_for("a") == 30
    now[0] = 62
    assert breaker.seconds_closed_for("a") == 0
    breaker.succeeded("a")
    assert breaker.seconds_closed_for("a") == 0


def test_an_endpoint_at_rest_refuses_calls_at_once_and_says_why() -> None:
    server = FakeTinker()
    with service_of(server, submit_give_up=0.0, breaker_threshold=2, breaker_reset=0.2) as service:
        training = service.create_lora_training_client("m").result(5)
        server.always["optim_step"] = no_connection()
        for _ in range(2):
            with pytest.raises(APIConnectionError, match="Connection error"):
                training.optim_step(AdamParams()).result(5)
        sent = len(server.of("optim_step"))
        with pytest.raises(CircuitOpenError, match="optim_step has failed again and again"):
            training.optim_step(AdamParams()).result(5)
        assert len(server.of("optim_step")) == sent
        del server.always["optim_step"]
        time.sleep(0.25)
        assert training.optim_step(AdamParams()).result(5).metrics == {"step:sum": 1.0}


def test_mistakes_of_the_caller_do_not_open_it(training: TrainingClient, server: FakeTinker) -> None:
    server.script("optim_step", *[status(400)] * 7)
    for _ in range(7):
        with pytest.raises(Exception, match="400"):
            training.optim_step(AdamParams()).result(5)
    assert training.optim_step(AdamParams()).result(5).metrics == {"step:sum": 1.0}


# ---- offering samples ----


def test_after_a_refusal_few_samples_are_offered_at_once_and_then_as_many_as_before() -> None:
    now = [0.0]

    async def most_at_once(gate: SampleGate, count: int) -> int:
        inside, most = 0, 0

        async def offer() -> None:
            nonlocal inside, most
            async with gate.offer(100):
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.001)
                inside -= 1

        await asyncio.gather(*(offer() for _ in range(count)))
        return most

    async def main() -> list[int]:
        gate = SampleGate(10_000, clock=lambda: now[0])
        before = await most_at_once(gate, 40)
        gate.refused()
        during = await most_at_once(gate, 40)
        now[0] = 11.0
        return [before, during, await most_at_once(gate, 200)]

    # 100 of 100 bytes each fit into 10,000; while throttled a byte counts for 20, so 5 do
    assert asyncio.run(main()) == [40, 5, 100]
