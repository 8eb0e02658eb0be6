"""Futures: one terminal state, woken waiters, bounded retention."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from tests.unit.control.harness import ManualClock
from tinsmith.control.errors import FutureExpired
from tinsmith.control.futures import FutureStore, Outcome, Pending, result_bytes
from tinsmith.control.identity import SignedIds
from tinsmith.types import ForwardBackwardOutput, TensorData
from tinsmith.types.errors import InvalidInput, NotFound, PayloadConflict

pytestmark = pytest.mark.anyio

KEY = b"k" * 32


def store(clock: ManualClock | None = None, **limits: int) -> FutureStore:
    values = {"max_retained": 100, **limits}
    return FutureStore(ids=SignedIds(KEY), clock=clock or ManualClock(), ttl_s=60.0, **values)


async def test_a_long_poll_wakes_with_the_result_and_not_at_its_timeout() -> None:
    futures = store()
    request_id = futures.open("OptimStep")
    asyncio.get_running_loop().call_later(0.02, futures.resolve, request_id, {"a": 1.0})
    start = time.perf_counter()
    outcome = await futures.wait(request_id, 30.0)
    assert isinstance(outcome, Outcome)
    assert outcome.result == {"a": 1.0}
    assert time.perf_counter() - start < 1.0


async def test_many_waiters_of_one_future_get_the_same_outcome() -> None:
    futures = store()
    request_id = futures.open("OptimStep")
    waiters = [asyncio.create_task(futures.wait(request_id, 5.0)) for _ in range(10)]
    await asyncio.sleep(0)
    futures.resolve(request_id, 1)
    outcomes = await asyncio.gather(*waiters)
    assert all(outcome is outcomes[0] for outcome in outcomes)


async def test_a_poll_that_times_out_says_what_the_request_waits_for() -> None:
    futures = store()
    request_id = futures.open("OptimStep", on_poll=lambda: Pending(reason="seq 3"))
    assert await futures.wait(request_id, 0.01) == Pending(reason="seq 3")
    assert await futures.wait(request_id, 0) == Pending(reason="seq 3")


async def test_the_first_terminal_state_is_the_only_one() -> None:
    futures = store()
    request_id = futures.open("OptimStep")
    assert futures.fail(request_id, InvalidInput("first"))
    assert not futures.resolve(request_id, "second")
    assert not futures.fail(request_id, InvalidInput("third"))
    outcome = await futures.wait(request_id, 0)
    assert isinstance(outcome, Outcome)
    assert str(outcome.error) == "first"
    assert outcome.result is None


async def test_a_result_can_be_fetched_again_until_its_time_is_over() -> None:
    clock = ManualClock()
    futures = store(clock)
    first, second = futures.open("OptimStep"), futures.open("OptimStep")
    futures.resolve(first, 1)
    clock.advance(59)
    futures.resolve(second, 2)
    assert futures.expire() == 0
    clock.advance(1)
    assert futures.expire() == 1
    with pytest.raises(FutureExpired, match=first):
        await futures.wait(first, 0)
    assert isinstance(await futures.wait(second, 0), Outcome)


async def test_an_unfinished_future_never_expires() -> None:
    clock = ManualClock()
    futures = store(clock)
    request_id = futures.open("OptimStep")
    clock.advance(1e6)
    assert futures.expire() == 0
    assert await futures.wait(request_id, 0) == Pending()


async def test_an_expired_id_is_told_from_an_invented_one_even_after_a_restart() -> None:
    futures = store()
    request_id = futures.open("OptimStep")
    with pytest.raises(FutureExpired):
        await store().wait(request_id, 0)
    forged = request_id[:-1] + ("0" if request_id[-1] != "0" else "1")
    for invented in (forged, "req-", "", "nonsense", "req-" + "zz" * 20):
        with pytest.raises(NotFound):
            await futures.wait(invented, 0)


async def test_the_oldest_results_go_when_there_are_too_many_of_them() -> None:
    futures = store(max_retained=2)
    ids = [futures.open("OptimStep") for _ in range(4)]
    for request_id in ids[:3]:
        futures.resolve(request_id, 1)
    with pytest.raises(FutureExpired):
        await futures.wait(ids[0], 0)
    assert len(futures) == 3
    assert futures.num_open == 1


async def test_the_oldest_results_go_when_they_are_too_large_together() -> None:
    output = ForwardBackwardOutput("x", [{"logprobs": TensorData([0.0] * 1000, "float32")}], {"loss:sum": 0.0})
    assert result_bytes(output) == 2 * 4000 + 400
    futures = store(max_retained_bytes=20_000)
    ids = [futures.open("ForwardBackward") for _ in range(3)]
    for request_id in ids:
        futures.resolve(request_id, output)
    with pytest.raises(FutureExpired):
        await futures.wait(ids[0], 0)
    assert isinstance(await futures.wait(ids[1], 0), Outcome)


async def test_nothing_is_remembered_of_large_results_that_have_expired() -> None:
    clock = ManualClock()
    futures = store(clock)
    for _ in range(3):
        large = TensorData.from_numpy(np.zeros(10_000, dtype=np.float32))
        futures.resolve(futures.open("ForwardBackward"), ForwardBackwardOutput("x", [{"logprobs": large}], {}))
        clock.advance(61)
        futures.expire()
    assert len(futures) == len(futures._large) == 0


async def test_a_key_names_the_same_request_until_its_future_expires() -> None:
    clock = ManualClock()
    futures = store(clock)
    assert futures.claim("k", b"1", "seq 1") is None
    request_id = futures.open("OptimStep", key="k", fingerprint=b"1")
    assert futures.claim("k", b"1", "seq 1") == request_id
    with pytest.raises(PayloadConflict, match="seq 1 was already used with another payload"):
        futures.claim("k", b"2", "seq 1")
    futures.resolve(request_id, 1)
    clock.advance(60)
    futures.expire()
    assert futures.claim("k", b"2", "seq 1") is None
