"""Results beyond the memory they may take: on disk, and fetched from there as they were."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.control.harness import ManualClock, datum, forward_backward, optim
from tests.unit.control.restarts import Server
from tinsmith.control import result_store
from tinsmith.control.errors import FutureExpired
from tinsmith.control.futures import FutureStore, Outcome
from tinsmith.control.identity import SignedIds
from tinsmith.control.result_store import ResultStore
from tinsmith.types import ForwardBackwardOutput, TensorData
from tinsmith.types.errors import StorageError

pytestmark = pytest.mark.anyio


def output(number: int) -> ForwardBackwardOutput:
    """About 8,400 bytes as results are counted."""
    logprobs = np.random.default_rng(number).normal(size=1000).astype(np.float32)
    return ForwardBackwardOutput("x", [{"logprobs": TensorData.from_numpy(logprobs)}], {"loss:sum": float(number)})


async def written(futures: FutureStore) -> None:
    while futures._leaving_bytes:  # noqa: ASYNC110 - nothing is told when a thread has written
        await asyncio.sleep(0.001)


class Kept:
    """Futures with room for two such results in memory."""

    def __init__(self, tmp_path: Path, **limits: Any) -> None:
        self.clock = ManualClock()
        self.store = ResultStore(tmp_path, **{"max_bytes": 10**9, **limits})
        self.store.open()
        self.futures = FutureStore(
            ids=SignedIds(b"k" * 32),
            clock=self.clock,
            ttl_s=60.0,
            max_retained=1000,
            max_retained_bytes=20_000,
            store=self.store,
        )

    async def finish(self, numbers: range) -> list[str]:
        ids = []
        for number in numbers:
            ids.append(self.futures.open("ForwardBackward", group=("sampler", 0)))
            self.futures.resolve(ids[-1], output(number))
            await written(self.futures)
        return ids

    async def fetch(self, request_id: str) -> Any:
        outcome = await self.futures.wait(request_id, 0)
        assert isinstance(outcome, Outcome)
        if outcome.error is not None:
            raise outcome.error
        return outcome.result


async def test_results_beyond_the_budget_are_fetched_from_disk_bit_for_bit_until_they_expire(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    ids = await kept.finish(range(50))
    assert kept.futures.kept_bytes <= 20_000
    assert kept.store.num_results == 48
    for number, request_id in enumerate(ids):
        found, made = await kept.fetch(request_id), output(number)
        assert np.array_equal(found.loss_fn_outputs[0]["logprobs"].flat, made.loss_fn_outputs[0]["logprobs"].flat)
        assert found.metrics == made.metrics
    assert kept.futures.kept_bytes <= 20_000
    kept.clock.advance(60)
    kept.futures.expire()
    assert (kept.store.num_results, kept.store.num_bytes, kept.futures.kept_bytes) == (0, 0, 0)
    with pytest.raises(FutureExpired):
        await kept.fetch(ids[0])
    kept.store.close()


async def test_the_disk_is_given_back_with_the_last_result_of_a_segment(tmp_path: Path) -> None:
    kept = Kept(tmp_path, segment_bytes=20_000)
    before = len(os.listdir("/proc/self/fd"))
    ids = await kept.finish(range(40))
    assert len(os.listdir("/proc/self/fd")) > before + 5
    for request_id in ids:
        kept.futures.release(request_id, ("sampler", 0))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert (kept.store.num_results, kept.store.num_bytes) == (0, 0)
    kept.store.close()


async def test_small_results_stay_in_memory(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    ids = [kept.futures.open("OptimStep") for _ in range(20)]
    for request_id in ids:
        kept.futures.resolve(request_id, {"grad_norm:mean": 1.0})
    await kept.finish(range(5))
    assert kept.store.num_results == 4
    assert await kept.fetch(ids[0]) == {"grad_norm:mean": 1.0}
    kept.store.close()


async def test_a_disk_that_refuses_lets_the_oldest_in_memory_expire_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(tmp_path)
    stored = await kept.finish(range(4))

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result_store.os, "pwrite", full)
    later = await kept.finish(range(4, 10))
    assert (await kept.fetch(stored[0])).metrics == {"loss:sum": 0.0}
    assert (await kept.fetch(later[-1])).metrics == {"loss:sum": 9.0}
    with pytest.raises(FutureExpired):
        await kept.fetch(later[0])
    monkeypatch.undo()
    more = await kept.finish(range(10, 14))
    assert (await kept.fetch(more[0])).metrics == {"loss:sum": 10.0}
    kept.store.close()


async def test_a_result_that_was_damaged_on_disk_is_an_error_and_never_another_result(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    ids = await kept.finish(range(4))
    promise = kept.futures._promises[ids[0]]
    assert promise.outcome is not None
    stored = promise.outcome.result
    os.pwrite(stored.segment.descriptor, b"!", stored.offset + 100)
    with pytest.raises(StorageError, match="damaged"):
        await kept.fetch(ids[0])
    assert (await kept.fetch(ids[1])).metrics == {"loss:sum": 1.0}
    kept.store.close()


async def test_beyond_the_disk_s_budget_the_oldest_in_memory_expire(tmp_path: Path) -> None:
    kept = Kept(tmp_path, max_bytes=8_000)  # two results of 4,000 bytes
    ids = await kept.finish(range(10))
    assert kept.store.num_results == 2
    assert (await kept.fetch(ids[0])).metrics == {"loss:sum": 0.0}
    with pytest.raises(FutureExpired):
        await kept.fetch(ids[3])
    kept.store.close()


@pytest.mark.parametrize("snapshot_before", [False, True])
async def test_results_on_disk_are_fetched_after_a_crash(tmp_path: Path, snapshot_before: bool) -> None:
    """The ledger has them, or has what they are computed from."""
    server = Server(tmp_path / "data", max_retained_bytes=20_000, snapshot_requests=1)
    h = await server.start()
    session = await h.session()
    model = await h.model(session)
    passes = []
    for step in range(6):
        data = tuple(datum(step + 1, 200) for _ in range(6))
        passes.append(h.submit(forward_backward(model, 2 * step + 1, data=data)))
        await h.result(h.submit(optim(model, 2 * step + 2, learning_rate=0.1)))
        await written(h.control._futures)
    assert h.control._results.num_results >= 3
    if snapshot_before:
        await h.control.sweep()
        await h.control._snapshots.drain()
    expected = [(await h.result(receipt)).metrics for receipt in passes]
    await server.kill(h)
    h = await server.start()
    found = [(await h.result(receipt)).metrics for receipt in passes]
    assert found == expected
    await h.control.close()
