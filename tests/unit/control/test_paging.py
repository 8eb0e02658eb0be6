"""Models that do not fit together: they take turns in the engine's memory, and none of them notices."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control.conftest import OpenControl
from tests.unit.control.harness import Harness, draw, forward_backward, optim
from tinsmith.control import paging
from tinsmith.control.paging import PageLost, PagingStats
from tinsmith.control.requests import LoadState, SaveForSampler, SaveState, UnloadModel
from tinsmith.runtime.fake import FAKE_CARD, FakeEngine
from tinsmith.types import LoraConfig
from tinsmith.types.errors import EngineDied, InvalidInput, ServerError, StorageError, UserError
from tinsmith.types.operations import (
    AdapterShape,
    CreateAdapter,
    DropAdapter,
    LoadAdapter,
    LoadSnapshot,
    ParkAdapter,
    SaveAdapter,
    UnparkAdapter,
)

pytestmark = pytest.mark.anyio

SHAPE = AdapterShape(attn=100, mlp=100, unembed=50)
ADAPTER_BYTES = 4 * 250 * 16
"""Of a model of the harness, rank 4."""


def engine_for(num_adapters: float, **card: Any) -> FakeEngine:
    """With room for so many adapters."""
    budget = int(num_adapters * ADAPTER_BYTES)
    return FakeEngine(replace(FAKE_CARD, adapter_shape=SHAPE, adapter_memory_bytes=budget, **card))


async def train(h: Harness, model_id: str, steps: range) -> list[float]:
    """Two requests a step; the losses."""
    losses = []
    for step in steps:
        first = h.submit(forward_backward(model_id, 2 * step + 1))
        second = h.submit(optim(model_id, 2 * step + 2, learning_rate=0.1))
        losses.append((await h.result(first)).metrics["loss:sum"])
        await h.result(second)
    return losses


def stats(h: Harness) -> PagingStats:
    return h.control.paging_stats()["tinsmith/fake"]


def in_engine(h: Harness) -> int:
    return len(h.engine._adapters)


@pytest.mark.parametrize("ledger", [False, True])
async def test_models_beyond_the_budget_train_as_if_each_were_alone(open_control: OpenControl, ledger: bool) -> None:
    async with open_control([engine_for(100)]) as h:
        expected = await train(h, await h.model(), range(4))
    async with open_control([engine_for(3)], ledger=ledger) as h:
        session = await h.session()
        models = [await h.model(session, n) for n in range(8)]
        losses: dict[str, list[float]] = {model: [] for model in models}
        for step in range(4):
            answers = await asyncio.gather(*(train(h, model, range(step, step + 1)) for model in models))
            for model, answer in zip(models, answers, strict=True):
                losses[model] += answer
            assert in_engine(h) <= 3
        assert all(loss == expected for loss in losses.values())
        assert stats(h).pages_in > 8
        assert stats(h).used_bytes <= 3 * ADAPTER_BYTES


async def test_a_model_whose_snapshot_was_just_taken_leaves_without_being_written(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)], ledger=True, snapshot_requests=1) as h:
        session = await h.session()
        first = await h.model(session, 0)
        await train(h, first, range(1))
        await h.control.sweep()
        await h.control._snapshots.drain()
        assert len(h.asked(SaveAdapter)) == 1
        await h.model(session, 1)
        assert len(h.asked(SaveAdapter)) == 1
        assert (stats(h).pages_out, stats(h).written) == (1, 0)
        await train(h, first, range(1, 2))


async def test_gradients_that_wait_for_a_step_survive_the_way_to_disk(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        first, second = await h.model(session, 0), await h.model(session, 1)
        await h.result(h.submit(forward_backward(first, 1)))
        await train(h, second, range(2))
        assert (await h.result(h.submit(optim(first, 2, learning_rate=0.1))))["step_applied"] == 1.0


async def test_unnamed_samplers_leave_and_come_back_with_their_weights(open_control: OpenControl) -> None:
    async with open_control([engine_for(1.5)]) as h:
        session = await h.session()
        model = await h.model(session, 0)
        samplers, before = [], []
        for n in range(6):
            await train(h, model, range(2 * n, 2 * n + 1))
            saved = await h.result(
                h.submit(SaveForSampler(model_id=model, seq_id=4 * n + 3, sampling_session_seq_id=n))
            )
            await h.result(h.submit(forward_backward(model, 4 * n + 4)))
            samplers.append(saved.sampling_session_id)
            before.append((await h.result(h.sample(draw(samplers[-1])))).sequences[0].logprobs)
        await h.settle()
        assert len(h.engine._snapshots) <= 2  # each takes a quarter of an adapter
        after = [(await h.result(h.sample(draw(s, 1)))).sequences[0].logprobs for s in samplers]
        assert after == before
        assert len({str(row) for row in after}) == 6
        assert len(h.asked(LoadSnapshot)) >= 4


async def test_the_first_sample_of_a_sampler_that_left_waits_for_its_weights(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        model = await h.model(session, 0)
        saved = await h.result(h.submit(SaveForSampler(model_id=model, seq_id=1, sampling_session_seq_id=0)))
        await h.model(session, 1)
        await h.settle()
        assert h.engine._snapshots == {}
        samples = [h.sample(draw(saved.sampling_session_id, n)) for n in range(3)]
        assert len([await h.result(sample) for sample in samples]) == 3
        assert len(h.asked(LoadSnapshot)) == 1


async def test_an_idle_model_goes_to_the_host_first_and_the_oldest_there_to_disk(open_control: OpenControl) -> None:
    engine = engine_for(2, device="cuda", host_adapter_bytes=3 * ADAPTER_BYTES)
    async with open_control([engine]) as h:
        session = await h.session()
        models = [await h.model(session, n) for n in range(6)]
        assert (len(h.asked(ParkAdapter)), len(h.asked(SaveAdapter))) == (4, 1)
        losses = [await train(h, model, range(1)) for model in models]
        assert len({str(loss) for loss in losses}) == 1
        assert len(h.asked(UnparkAdapter)) + len(h.asked(LoadAdapter)) >= 4
        assert stats(h).num_resident == 2
        assert stats(h).num_parked <= 3


async def test_a_damaged_page_ends_its_model_with_a_clear_error_and_no_other(
    open_control: OpenControl, tmp_path: Path
) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        first, second = await h.model(session, 0), await h.model(session, 1)
        await train(h, first, range(1))
        await train(h, second, range(1))
        (page,) = (tmp_path / "data" / "snapshots" / first.replace(":", "~")).glob("*/adapter_model.safetensors")
        page.write_bytes(page.read_bytes()[:-1] + b"!")
        failed, fine = h.submit(forward_backward(first, 3)), h.submit(forward_backward(second, 3))
        error = await h.error(failed)
        assert isinstance(error, PageLost)
        assert "lost with its file on disk" in str(error)
        await h.result(fine)
        assert "lost" in str(await h.error(h.submit(optim(first, 4))))
        await h.result(h.submit(optim(second, 4)))
        assert stats(h).lost == 1
        run = await h.control.library.get_training_run(first)
        assert run.corrupted


async def test_a_full_disk_fails_who_wants_in_and_leaves_those_who_are_in_alone(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        first = await h.model(session, 0)
        await train(h, first, range(1))
        h.engine.fail_next(SaveAdapter, StorageError("no space left on device"))
        receipt = await h.create(session, 1)
        assert "memory for adapters is full, and the disk refuses" in str(await h.error(receipt))
        await train(h, first, range(1, 2))
        h.clock.advance(6)
        second = await h.model(session, 2)
        await train(h, second, range(1))
        await train(h, first, range(2, 3))


async def test_a_page_that_cannot_be_read_now_fails_what_waits_and_is_read_later(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        first, second = await h.model(session, 0), await h.model(session, 1)
        await train(h, second, range(1))
        h.engine.fail_next(LoadAdapter, ServerError("out of memory"))
        waiting = [h.submit(forward_backward(first, 1)), h.submit(optim(first, 2))]
        for receipt in waiting:
            assert "could not be brought into memory" in str(await h.error(receipt))
        await h.result(h.submit(forward_backward(first, 3)))


async def test_a_model_larger_than_the_budget_is_refused_by_name_and_number(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        error = await h.error(await h.create(await h.session(), lora_config=LoraConfig(rank=5, seed=1)))
        assert isinstance(error, InvalidInput)
        assert "--adapter-memory" in str(error)
        assert h.asked(CreateAdapter) == []


async def test_a_busy_model_makes_room_after_its_turn_and_comes_back(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        first, second = await h.model(session, 0), await h.model(session, 1)
        h.engine.pause()
        receipts = [h.submit(forward_backward(first, seq)) for seq in range(1, 40)]
        other = h.submit(forward_backward(second, 1))
        h.engine.resume()
        await h.result(other)
        assert await h.is_pending(receipts[-1])
        for receipt in receipts:
            await h.result(receipt)


async def test_a_model_on_disk_can_be_unloaded_without_coming_back(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        first = await h.model(session, 0)
        await h.model(session, 1)
        await h.result(h.submit(UnloadModel(model_id=first, seq_id=1)))
        assert h.asked(LoadAdapter) == []


async def test_a_model_that_ends_while_it_is_read_or_written_leaves_nothing_behind(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        session, other = await h.session(), await h.session()
        first = await h.model(session, 0)
        h.engine.pause()
        receipt = await h.create(other, 0)
        await h.settle()
        assert h.asked(SaveAdapter) != []
        await h.control.finish_session(session, "completed", None)
        await h.control.sweep()
        h.engine.resume()
        assert (await h.outcome(receipt)).error is None
        await h.settle()
        assert first not in h.engine._adapters
        assert len(h.asked(DropAdapter)) >= 1
        await train(h, receipt.model_id or "", range(1))


async def test_after_a_restart_only_the_models_that_are_used_come_back(open_control: OpenControl) -> None:
    async with open_control([engine_for(2)], ledger=True) as h:
        session = await h.session()
        models = [await h.model(session, n) for n in range(5)]
        for model in models:
            await train(h, model, range(2))
    async with open_control([engine_for(2)], ledger=True) as h:
        expected = await train(h, models[0], range(2, 3))
        loads = {operation.model_id for operation in h.asked(LoadAdapter)}
        replayed = {operation.model_id for operation in h.asked(CreateAdapter)}
        assert models[0] in loads
        assert len(loads | replayed) <= 3
        for model in models[1:]:
            assert await train(h, model, range(2, 3)) == expected


@pytest.mark.parametrize("host_adapters", [0, 1])
async def test_a_request_that_fails_its_check_while_its_model_is_written_keeps_nobody_waiting(
    open_control: OpenControl, host_adapters: int
) -> None:
    engine = engine_for(1, device="cuda", host_adapter_bytes=host_adapters * ADAPTER_BYTES)
    async with open_control([engine]) as h:
        session = await h.session()
        models = [await h.model(session, n) for n in range(1 + host_adapters)]
        h.engine.pause()
        newcomer = await h.create(session, 9)
        await h.settle()
        (saved,) = h.asked(SaveAdapter)
        assert saved.model_id == models[0]
        bad = h.submit(forward_backward(models[0], 1, loss_fn="no such loss"))
        good = h.submit(forward_backward(models[0], 2))
        assert isinstance(await h.error(bad), UserError)
        h.engine.resume()
        await h.result(newcomer)
        await h.result(good)


async def test_whoever_waits_for_room_in_an_engine_that_stays_dead_is_told(open_control: OpenControl) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        model = await h.model(session, 0)
        saved = await h.result(h.submit(SaveForSampler(model_id=model, seq_id=1, sampling_session_seq_id=0)))
        await h.model(session, 1)
        await h.settle()
        assert h.engine._snapshots == {}
        h.engine.pause()
        before = h.sample(draw(saved.sampling_session_id, 0))
        await h.settle()
        assert stats(h).num_waiting > 0
        h.engine.die()
        await h.control.sweep()
        after = h.sample(draw(saved.sampling_session_id, 1))
        for receipt in (before, after):
            assert isinstance(await h.error(receipt), EngineDied)
        assert stats(h).num_waiting == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_a_model_comes_in_once_the_weights_that_were_read_before_it_are_read(
    open_control: OpenControl, fails: bool
) -> None:
    async with open_control([engine_for(1)]) as h:
        session = await h.session()
        first = await h.model(session, 0)
        saved = await h.result(h.submit(SaveForSampler(model_id=first, seq_id=1, sampling_session_seq_id=0)))
        await h.model(session, 1)
        await h.settle()
        reads = h.engine._lanes["sample"]
        reads.open.clear()
        if fails:
            h.engine.fail_next(LoadSnapshot, ServerError("out of memory"))
        sample = h.sample(draw(saved.sampling_session_id))
        await h.settle()
        assert h.asked(LoadSnapshot)
        h.clock.advance(10)
        receipt = h.submit(forward_backward(first, 2))
        await h.settle()
        assert stats(h).num_waiting == 1
        reads.open.set()
        assert ((await h.outcome(sample)).error is not None) == fails
        h.clock.advance(10)
        await h.result(receipt)


async def test_a_model_that_a_load_makes_larger_sends_others_out(open_control: OpenControl) -> None:
    async with open_control([engine_for(3)]) as h:
        session = await h.session()
        large = await h.model(session, 0, lora_config=LoraConfig(rank=8, seed=7))
        path = await h.result(h.submit(SaveState(model_id=large, seq_id=1, name="large")))
        await h.result(h.submit(UnloadModel(model_id=large)))
        grown, other, third = [await h.model(session, n) for n in (1, 2, 3)]
        await h.result(h.submit(LoadState(model_id=grown, seq_id=1, path=path, optimizer=True)))
        for _ in range(3):
            h.clock.advance(10)
            await h.settle()
        assert stats(h).used_bytes <= 3 * ADAPTER_BYTES
        assert in_engine(h) == 2
        for model, seq_id in ((grown, 2), (other, 1), (third, 1)):
            await h.result(h.submit(forward_backward(model, seq_id)))


async def test_weights_that_are_read_outlive_as_many_deaths_as_a_request_that_kills_engines(
    open_control: OpenControl,
) -> None:
    async with open_control([engine_for(1)], ledger=True, engine_backoff_s=0.0) as h:
        session = await h.session()
        first = await h.model(session, 0)
        saved = await h.result(h.submit(SaveForSampler(model_id=first, seq_id=1, sampling_session_seq_id=0)))
        drawn = (await h.result(h.sample(draw(saved.sampling_session_id)))).sequences[0].tokens
        await h.model(session, 1)
        await h.settle()
        load, num_deaths = h.engine._handlers[LoadSnapshot], 0

        def deadly(operation: LoadSnapshot) -> Any:
            nonlocal num_deaths
            if num_deaths < 3:
                num_deaths += 1
                h.engine.die("killed by SIGKILL")
                raise EngineDied("killed by SIGKILL")
            return load(operation)

        h.engine._handlers[LoadSnapshot] = deadly
        again = await h.result(h.sample(draw(saved.sampling_session_id, 1)))
        assert num_deaths == 3
        assert again.sequences[0].tokens == drawn
        assert stats(h).used_bytes <= ADAPTER_BYTES


@pytest.mark.parametrize("has_snapshot", [False, True])
async def test_a_model_that_cannot_be_brought_back_after_a_death_loses_no_step(
    open_control: OpenControl, monkeypatch: pytest.MonkeyPatch, has_snapshot: bool
) -> None:
    monkeypatch.setattr(paging, "_RETRY_S", 0.01)
    async with open_control([engine_for(2)], ledger=True, engine_backoff_s=0.0) as h:
        model = await h.model()
        await train(h, model, range(2))
        if has_snapshot:
            h.clock.advance(61)
            await h.control.sweep()
            await h.control._snapshots.drain()
        await train(h, model, range(2, 5))
        pager = h.control._paging._pagers["tinsmith/fake"]
        make_room, refused = pager._make_room, StorageError("the disk refuses those that would make room")

        async def refuse_once(*args: Any) -> None:
            monkeypatch.setattr(pager, "_make_room", make_room)
            raise refused

        monkeypatch.setattr(pager, "_make_room", refuse_once)
        h.engine.die()
        h.control._check_engines()
        assert isinstance(await h.error(h.submit(forward_backward(model, 11))), StorageError)
        await h.result(h.submit(forward_backward(model, 12)))
        assert h.engine._adapters[model].weights.step == 5
