"""A server or an engine that was killed goes on where it was: same ids, same futures, same numbers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control.conftest import OpenControl
from tests.unit.control.harness import Harness, draw, forward_backward, optim
from tests.unit.control.restarts import Server, results, running, train
from tinsmith.control.errors import FutureExpired, SessionEnded
from tinsmith.control.futures import Outcome, Pending
from tinsmith.control.requests import LoadState, NewSession, SaveForSampler, SaveState, UnloadModel
from tinsmith.runtime.fake import FAKE_CARD, FakeEngine
from tinsmith.types import SamplingParams
from tinsmith.types.errors import AlreadyExists, EngineDied, PayloadConflict, ServerError, StorageError, UserError
from tinsmith.types.operations import DropAdapter, LoadAdapter, OptimStep, Sample, SaveAdapter, TrainItem

pytestmark = pytest.mark.anyio


async def test_a_killed_server_goes_on_with_the_same_futures(server: Server, tmp_path: Path) -> None:
    async with running(Server(tmp_path / "other")) as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        expected = await results(h, await train(h, model_id, 1, 4))
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    receipts = await train(h, model_id, 1, 2)
    first = await results(h, receipts)
    h.engine.pause()
    receipts += await train(h, model_id, 5, 2)
    await server.kill(h)
    h = await server.start()
    h.control.heartbeat(session_id)
    again = await results(h, receipts)
    assert again[:4] == first
    assert again == expected
    assert h.control.model_info(model_id).lora_rank == 4
    await h.control.close()


async def test_a_session_goes_on_with_its_owner_in_the_project_it_was_assigned_to(server: Server) -> None:
    h = await server.start()
    session_id = await h.control.create_session(NewSession(owner="anna", project_id="first"))
    await h.control.library.assign_project(session_id, "second")
    await server.kill(h)
    async with running(server) as h:
        session = h.control._sessions.find(session_id)
        assert session is not None
        assert (session.owner, session.project_id) == ("anna", "second")


async def test_a_snapshot_is_where_the_replay_begins(server: Server) -> None:
    h = await server.start()
    model_id = await h.model()
    receipts = await train(h, model_id, 1, 3)
    pending = h.submit(forward_backward(model_id, 7, first=7))
    expected = await results(h, [*receipts, pending])
    h.clock.advance(61)
    await h.control.sweep()
    await h.control._snapshots.drain()
    after = await train(h, model_id, 8, 1)
    expected += await results(h, after)
    await server.kill(h)

    h = await server.start()
    assert await results(h, after) == expected[-2:]
    assert len(h.asked(LoadAdapter)) == 1
    assert len(h.asked(TrainItem)) == 1
    last = await results(h, await train(h, model_id, 10, 1))
    await server.kill(h)
    async with running(server) as h:  # and once more, from the same snapshot
        assert (await results(h, await train(h, model_id, 12, 1)))[1]["step_applied"] == 1.0
        assert last[1]["grad_norm:mean"] > 0


async def test_results_before_a_snapshot_that_nobody_fetched_are_kept(server: Server) -> None:
    h = await server.start()
    model_id = await h.model()
    receipts = await train(h, model_id, 1, 2)
    await h.result(receipts[-1])
    await h.settle()
    h.clock.advance(61)
    await h.control.sweep()
    await h.control._snapshots.drain()
    await server.kill(h)
    h = await server.start()
    values = await results(h, receipts[:3])
    assert values[0].metrics["loss:sum"] > 0
    assert not h.asked(TrainItem)
    retry = h.submit(forward_backward(model_id, 1, first=1))
    assert retry.request_id == receipts[0].request_id
    assert isinstance(await h.error(h.submit(optim(model_id, 1))), PayloadConflict)
    await server.kill(h)
    server.clock.advance(3601)
    h = await server.start()
    with pytest.raises(FutureExpired):
        await h.control.wait_future(receipts[0].request_id, 0)
    await h.control.close()


async def test_pending_gradients_are_in_the_snapshot(server: Server, tmp_path: Path) -> None:
    async def norm_of_a_step(h: Harness, model_id: str) -> float:
        return float((await h.result(h.submit(optim(model_id, 2))))["grad_norm:mean"])

    async with running(Server(tmp_path / "other")) as h:
        model_id = await h.model()
        await h.result(h.submit(forward_backward(model_id, 1)))
        expected = await norm_of_a_step(h, model_id)
    h = await server.start()
    model_id = await h.model()
    await h.result(h.submit(forward_backward(model_id, 1)))
    h.clock.advance(61)
    await h.control.sweep()
    await h.control._snapshots.drain()
    await server.kill(h)
    async with running(server) as h:
        assert await norm_of_a_step(h, model_id) == expected
        assert not h.asked(TrainItem)


async def test_a_save_that_was_done_is_not_done_again(server: Server) -> None:
    h = await server.start()
    model_id = await h.model()
    receipts = await train(h, model_id, 1, 1)
    save = h.submit(SaveState(model_id=model_id, seq_id=3, name="a"))
    path = await h.result(save)
    await server.kill(h)
    async with running(server) as h:
        assert await h.result(save) == path
        await results(h, receipts)
        _, total = await h.control.library.list_user_checkpoints(10, 0)
        assert total == 1
        assert isinstance(await h.error(h.submit(SaveState(model_id=model_id, seq_id=4, name="a"))), AlreadyExists)


async def test_a_load_is_of_the_version_it_was_of(server: Server) -> None:
    h = await server.start()
    model_id = await h.model()
    await results(h, await train(h, model_id, 1, 1))
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=3, name="a")))
    path = f"tinker://{model_id}/weights/a"
    h.control._snapshots._max_requests = 10**9
    await h.result(h.submit(LoadState(model_id=model_id, seq_id=4, path=path, optimizer=True)))
    await results(h, await train(h, model_id, 5, 2))
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=9, name="a", overwrite=True)))
    first = [operation.folder for operation in h.asked(LoadAdapter)]
    await server.kill(h)
    async with running(server) as h:
        await results(h, await train(h, model_id, 10, 1))
        loaded = [operation.folder for operation in h.asked(LoadAdapter) if not operation.gradients]
        assert loaded in ([], first)


async def test_a_load_while_a_snapshot_is_written_outlives_its_checkpoint(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = await server.start()
    model_id = await h.model()
    await results(h, await train(h, model_id, 1, 1))
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=3, name="a")))
    await results(h, await train(h, model_id, 4, 2))
    written, write = asyncio.Event(), h.control._journal.write

    async def slow_write(changes: Any) -> None:
        monkeypatch.setattr(h.control._journal, "write", write)
        await written.wait()
        await write(changes)

    monkeypatch.setattr(h.control._journal, "write", slow_write)
    h.clock.advance(61)
    await h.control.sweep()
    await h.settle()
    path = f"tinker://{model_id}/weights/a"
    await h.result(h.submit(LoadState(model_id=model_id, seq_id=8, path=path, optimizer=True)))
    await h.settle()
    written.set()
    await h.control._snapshots.drain()
    await h.settle()
    await h.control._snapshots.drain()
    await h.control.library.delete_checkpoint(model_id, "weights/a")
    after = await train(h, model_id, 9, 1)
    expected = await results(h, after)
    await server.kill(h)
    async with running(server) as h:
        assert await results(h, after) == expected


async def test_samples_in_flight_are_drawn_again_with_the_same_seed(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    unseeded = SamplingParams(max_tokens=4)
    done = h.sample(draw(sampler_id, 1, params=unseeded))
    tokens = (await h.result(done)).sequences[0].tokens
    h.engine.pause()
    waiting = h.sample(draw(sampler_id, 2, params=unseeded))
    await h.control.durable(waiting)
    await h.settle()
    seed = h.asked(Sample)[-1].seed
    await server.kill(h)
    async with running(server) as h:
        await h.result(waiting)
        assert h.asked(Sample)[-1].seed == seed
        assert (await h.result(done)).sequences[0].tokens == tokens
        assert h.control.get_sampler(sampler_id).base_model == "tinsmith/fake"


@pytest.mark.parametrize("snapshot", [False, True])
async def test_an_unnamed_sampler_is_there_again(server: Server, snapshot: bool) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    await results(h, await train(h, model_id, 1, 2))
    saved = await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=5, sampling_session_seq_id=0)))
    sampler_id = saved.sampling_session_id
    tokens = (await h.result(h.sample(draw(sampler_id, 1)))).sequences[0].tokens
    await results(h, await train(h, model_id, 6, 1))
    if snapshot:
        h.clock.advance(61)
        await h.control.sweep()
        await h.control._snapshots.drain()
    digest = h.control.sampler_digest(sampler_id)
    await server.kill(h)
    async with running(server) as h:
        assert (await h.result(h.sample(draw(sampler_id, 2)))).sequences[0].tokens == tokens
        assert h.control.sampler_digest(sampler_id) == digest
        assert bool(h.asked(TrainItem)) is not snapshot


async def test_failures_are_remembered(server: Server) -> None:
    h = await server.start()
    model_id = await h.model()
    nobody = h.submit(optim("sess-none:train:0", 1))
    bad = h.submit(forward_backward(model_id, 1, loss_fn="nonsense"))
    good = h.submit(optim(model_id, 2))
    for receipt in (nobody, bad, good):
        await h.control.durable(receipt)
    messages = [str(await h.error(receipt)) for receipt in (nobody, bad)]
    await h.result(good)
    await server.kill(h)
    async with running(server) as h:
        assert [str(await h.error(receipt)) for receipt in (nobody, bad)] == messages
        await h.result(good)


async def test_numbers_that_were_given_up_stay_given_up(server: Server) -> None:
    h = await server.start()
    model_id = await h.model()
    receipts = await train(h, model_id, 1, 1)
    await results(h, receipts)
    late = await train(h, model_id, 5, 1)  # 3 and 4 never come
    h.clock.advance(61)
    h.control._training.give_up_gaps()
    await h.error(late[0])
    await results(h, await train(h, model_id, 7, 1))
    await server.kill(h)
    async with running(server) as h:
        assert "did not come" in str(await h.error(late[1]))
        assert (await results(h, await train(h, model_id, 9, 1)))[1]["step_applied"] == 1.0
        assert len(h.asked(OptimStep)) == 3


async def test_what_ended_stays_ended(server: Server) -> None:
    h = await server.start()
    finished, live = await h.session(), await h.session()
    dialect = await h.control.create_session(NewSession(orders_by_arrival=True))
    model_id = await h.model(live)
    await h.model(finished)
    await h.control.finish_session(finished, "success", None)
    unloaded = h.submit(UnloadModel(model_id=model_id))
    assert await h.result(unloaded) == model_id
    await h.control.sweep()
    await server.kill(h)
    async with running(server) as h:
        h.control.heartbeat(live)
        for session_id in (finished, dialect):
            with pytest.raises(Exception, match="ended"):
                h.control.heartbeat(session_id)
        assert await h.result(unloaded) == model_id
        assert "has ended" in str(await h.error(h.submit(optim(model_id, 2))))
        assert not [e for e in h.control._ledger.read() if e.kind == "model"]  # type: ignore[union-attr]


@pytest.mark.parametrize("is_killed", [False, True])
async def test_what_waits_in_a_finished_session_is_still_done_by_the_next_server(
    server: Server, is_killed: bool
) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    await results(h, await train(h, model_id, 1, 1))
    h.engine.pause()
    receipts = await train(h, model_id, 3, 2)
    receipts.append(h.submit(SaveState(model_id=model_id, seq_id=7, name="final")))
    await h.control.durable(receipts[-1])
    await h.control.finish_session(session_id, "success", None)
    await h.control.sweep()
    if is_killed:
        await server.kill(h)
    else:
        h.engine.resume()
        h.control._hold()
        await h.control.close()
    h = await server.start()
    assert isinstance(await h.error(h.submit(optim(model_id, 8))), UserError)
    assert (await results(h, receipts))[-1] == f"tinker://{model_id}/weights/final"
    with pytest.raises(SessionEnded, match="success"):
        h.control.heartbeat(session_id)
    await h.control.sweep()
    assert h.asked(DropAdapter)
    await server.kill(h)
    async with running(server) as h:
        assert not [e for e in h.control._ledger.read() if e.kind == "model"]  # type: ignore[union-attr]
        assert (await h.control.library.find_checkpoint(f"tinker://{model_id}/weights/final")).step == 3


async def test_a_stopped_server_goes_on_too(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    receipts = await train(h, model_id, 1, 2)
    await h.control.close()
    async with running(server) as h:
        h.control.heartbeat(session_id)
        assert (await results(h, receipts))[-1]["step_applied"] == 1.0


async def test_a_dead_engine_is_started_again_and_goes_on(server: Server, tmp_path: Path) -> None:
    async with running(Server(tmp_path / "other")) as h:
        model_id = await h.model()
        expected = await results(h, await train(h, model_id, 1, 4))
    h = await server.start()
    model_id = await h.model()
    receipts = await train(h, model_id, 1, 2)
    await results(h, receipts)
    h.engine.pause()
    receipts += await train(h, model_id, 5, 1)
    await h.settle()
    h.engine.die("killed by SIGKILL")
    receipts += await train(h, model_id, 7, 1)
    h.engine.resume()
    assert await results(h, receipts) == expected
    assert h.engine.num_starts == 2
    assert h.control.is_ready
    await h.control.close()


async def test_an_engine_is_started_again_whatever_another_is_writing(open_control: OpenControl) -> None:
    dying, slow = FakeEngine(), FakeEngine(replace(FAKE_CARD, name="tinsmith/slow"))
    async with open_control([dying, slow], ledger=True, snapshot_requests=1) as h:
        session_id = await h.session()
        model_id, other = await h.model(session_id, 0), await h.model(session_id, 1, base_model="tinsmith/slow")
        await h.result(h.submit(forward_backward(other, 1)))
        slow.pause()
        await h.control.sweep()
        await h.settle()
        assert any(isinstance(operation, SaveAdapter) for operation in slow.operations)
        dying.die("killed by SIGKILL")
        h.control._check_engines()
        await h.result(h.submit(forward_backward(model_id, 1)))
        slow.resume()


async def test_readiness_and_polls_say_that_an_engine_is_started_again(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    gate = asyncio.Event()
    start: Callable[[], Awaitable[Any]] = h.engine.start

    async def slow_start() -> Any:
        await gate.wait()
        return await start()

    h.engine.start = slow_start  # type: ignore[method-assign]
    h.engine.pause()
    receipts = [h.submit(forward_backward(model_id, 1)), h.sample(draw(sampler_id, 1))]
    for receipt in receipts:
        await h.control.durable(receipt)
    await h.settle()
    h.engine.die()
    await h.settle()
    assert not h.control.is_ready
    for receipt in receipts:
        state = await h.control.wait_future(receipt.request_id, 0)
        assert isinstance(state, Pending)
        assert state.queue_state == "paused_capacity"
        assert "started again" in (state.reason or "")
    gate.set()
    h.engine.resume()
    await results(h, receipts)
    assert h.control.is_ready
    await h.control.close()


async def test_samplers_survive_a_dead_engine(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    await results(h, await train(h, model_id, 1, 1))
    saved = await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=3, sampling_session_seq_id=0)))
    named = await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=4, name="n")))
    other = await h.control.create_sampling_session(session_id, 1, None, named.path)
    samplers = (saved.sampling_session_id, other)
    before = [(await h.result(h.sample(draw(s, 1)))).sequences[0].tokens for s in samplers]
    h.engine.die()
    h.control._check_engines()
    after = [(await h.result(h.sample(draw(s, 2)))).sequences[0].tokens for s in samplers]
    assert after == before
    await h.control.close()


async def test_a_request_that_kills_the_engine_is_failed_and_the_rest_goes_on(server: Server) -> None:
    h = await server.start()
    innocent, guilty = await h.model(), await h.model()
    execute = h.engine._handlers[TrainItem]

    def deadly(item: TrainItem) -> Any:
        if item.model_id == guilty and item.data[0].model_input.to_ints()[0] == 66:
            h.engine.die("killed by SIGSEGV")
            raise EngineDied("killed by SIGSEGV")
        return execute(item)

    h.engine._handlers[TrainItem] = deadly
    harmless = await train(h, innocent, 1, 3)
    poison = h.submit(forward_backward(guilty, 1, first=66))
    after = h.submit(forward_backward(guilty, 2, first=5))
    error = await h.error(poison)
    assert isinstance(error, ServerError)
    assert "died 3 times" in str(error)
    await results(h, [*harmless, after])
    assert h.engine.num_starts == 4
    await server.kill(h)
    async with running(server) as h:  # nor does a later server try it again
        assert "died 3 times" in str(await h.error(poison))
        await h.result(after)


async def test_an_engine_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", max_engine_restarts=2, max_strikes=9)
    h = await server.start()
    model_id = await h.model()

    def deadly(item: TrainItem) -> Any:
        h.engine.die("killed by SIGSEGV")
        raise EngineDied("killed by SIGSEGV")

    h.engine._handlers[TrainItem] = deadly
    error = await h.error(h.submit(forward_backward(model_id, 1)))
    assert "SIGSEGV" in str(error)
    assert not h.control.is_ready
    await h.control.close()


async def test_nothing_is_done_that_is_not_on_disk(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    ledger = h.control._ledger
    assert ledger is not None
    transact = ledger._transact

    def full(*arguments: Any) -> None:
        error = __import__("sqlite3").OperationalError("database or disk is full")
        error.sqlite_errorname = "SQLITE_FULL"
        raise error

    ledger._transact = full  # type: ignore[method-assign]
    receipt = h.submit(forward_backward(model_id, 1))
    with pytest.raises(StorageError, match="full"):
        await h.control.durable(receipt)
    assert not h.asked(TrainItem)
    assert "full" in (h.control.readiness_reason or "")
    h.control.heartbeat(session_id)
    h.control.model_info(model_id)
    ledger._transact = transact  # type: ignore[method-assign]
    ledger.probe()
    await ledger.flush()
    assert h.control.is_ready
    retry = h.submit(forward_backward(model_id, 1))
    await h.control.durable(retry)
    await h.result(retry)
    assert len(h.asked(TrainItem)) == 1
    await h.control.close()


async def test_fetched_samples_leave_the_ledger(server: Server) -> None:
    async with running(server) as h:
        sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
        receipts = [h.sample(draw(sampler_id, n)) for n in range(5)]
        await results(h, receipts[:4])
        h.clock.advance(31)
        await h.control.sweep()
        await h.control._ledger.flush()  # type: ignore[union-attr]
        names = [e.name for e in h.control._ledger.read() if e.kind == "sample"]  # type: ignore[union-attr]
        assert names == [receipts[4].request_id]
        await h.result(receipts[4])


async def test_a_request_that_named_an_unknown_loss_fails_alike(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    with_fault = h.submit(forward_backward(model_id, 1, loss_fn="custom", loss_fn_config={"loss_id": "none"}))
    await h.control.durable(with_fault)
    error = await h.error(with_fault)
    await server.kill(h)
    async with running(server) as h:
        again = await h.control.wait_future(with_fault.request_id, 5)
        assert isinstance(again, Outcome)
        assert str(again.error) == str(error)


async def test_an_engine_that_keeps_dying_is_given_up_whatever_another_achieves(open_control: OpenControl) -> None:
    dying, busy = FakeEngine(), FakeEngine(replace(FAKE_CARD, name="tinsmith/busy"))
    values = {"ledger": True, "max_engine_restarts": 2, "max_strikes": 9, "engine_backoff_s": 0.0}
    async with open_control([dying, busy], **values) as h:
        session_id = await h.session()
        model_id, other = await h.model(session_id, 0), await h.model(session_id, 1, base_model="tinsmith/busy")
        start, seqs = dying.start, itertools.count(1)

        async def start_after_a_result_of_the_other() -> Any:
            await h.result(h.submit(forward_backward(other, next(seqs))))
            return await start()

        def deadly(item: TrainItem) -> Any:
            dying.die("killed by SIGSEGV")
            raise EngineDied("killed by SIGSEGV")

        dying.start = start_after_a_result_of_the_other  # type: ignore[method-assign]
        dying._handlers[TrainItem] = deadly
        error = await h.error(h.submit(forward_backward(model_id, 1)))
        assert str(error) == "killed by SIGSEGV"
        assert dying.num_starts == 3
