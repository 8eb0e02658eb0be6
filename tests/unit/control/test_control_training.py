"""Models and their requests, through the facade, over a fake engine."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.control.conftest import OpenControl
from tests.unit.control.harness import Harness, datum, fingerprint, forward_backward, optim
from tinsmith.control.errors import ModelEnded, SessionEnded
from tinsmith.control.futures import Outcome
from tinsmith.control.requests import LoadState, Rejected, SaveState, UnloadModel
from tinsmith.control.training import SeqGap
from tinsmith.runtime.fake import FakeEngine
from tinsmith.types import LoraConfig
from tinsmith.types.errors import (
    AdapterCorrupted,
    AlreadyExists,
    EngineDied,
    InvalidInput,
    NotFound,
    Overloaded,
    PayloadConflict,
    ServerError,
    TinsmithError,
    Unsupported,
)
from tinsmith.types.operations import CreateAdapter, DropAdapter, OptimStep, SaveAdapter, TrainItem

pytestmark = pytest.mark.anyio


# ---- creation ----


async def test_a_model_is_named_after_its_session_and_number(h: Harness) -> None:
    session_id = await h.session()
    receipt = await h.create(session_id, 3)
    assert receipt.model_id == f"{session_id}:train:3"
    outcome = await h.outcome(receipt)
    assert (outcome.request_type, outcome.result) == ("CreateModel", receipt.model_id)
    info = h.control.model_info(receipt.model_id)
    assert (info.lora_rank, info.model_data.model_name, info.model_data.tokenizer_id) == (
        4,
        "tinsmith/fake",
        "tinsmith/fake",
    )


async def test_creating_a_model_again_is_the_same_request_and_another_shape_a_conflict(h: Harness) -> None:
    session_id = await h.session()
    first, again = await h.create(session_id), await h.create(session_id)
    other = await h.create(session_id, lora_config=LoraConfig(rank=8))
    assert first == again
    assert isinstance(await h.error(other), PayloadConflict)
    await h.result(first)
    assert len(h.asked(CreateAdapter)) == 1


async def test_a_base_model_is_found_by_its_name_before_a_suffix(h: Harness) -> None:
    session_id = await h.session()
    await h.model(session_id, 0, base_model="tinsmith/fake:peft:131072")
    error = await h.error(await h.create(session_id, 1, base_model="Qwen/Qwen9:peft"))
    assert str(error) == "no base model 'Qwen/Qwen9:peft' on this server; it has: tinsmith/fake"
    assert error.category == "user"


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"lora_config": LoraConfig(rank=0)}, InvalidInput, r"lora_config\.rank 0 is outside 1\.\.64"),
        ({"lora_config": LoraConfig(rank=65)}, InvalidInput, r"lora_config\.rank 65 is outside 1\.\.64"),
        (
            {"lora_config": LoraConfig(rank=4, train_attn=False, train_mlp=False, train_unembed=False)},
            InvalidInput,
            "nothing would train",
        ),
        ({"alpha": 0.0}, InvalidInput, r"lora_config\.alpha must be finite and above 0, not 0\.0"),
        ({"alpha": 1e300}, InvalidInput, r"lora_config\.alpha 1e\+300 over rank \d+ is beyond fp32"),
        ({"optimizer_type": "dimuon"}, Unsupported, "'dimuon' is not supported"),
        ({"n": -1}, InvalidInput, "model_seq_id must be at least 0, not -1"),
    ],
)
async def test_a_model_that_cannot_be_fails_its_future(
    h: Harness, fields: dict[str, object], kind: type[TinsmithError], message: str
) -> None:
    receipt = await h.create(await h.session(), **fields)  # type: ignore[arg-type]
    error = await h.error(receipt)
    assert isinstance(error, kind)
    with pytest.raises(kind, match=message):
        raise error


async def test_requests_on_a_model_that_could_not_be_created_say_so(h: Harness) -> None:
    h.engine.fail_next(CreateAdapter, ServerError("out of memory"))
    receipt = await h.create(await h.session())
    assert receipt.model_id is not None
    early = h.submit(forward_backward(receipt.model_id, 1))
    assert isinstance(await h.error(receipt), ServerError)
    late = h.submit(forward_backward(receipt.model_id, 2))
    for error in (await h.error(early), await h.error(late)):
        assert isinstance(error, ModelEnded)
        assert "could not be created: out of memory" in str(error)
    with pytest.raises(ModelEnded, match="could not be created"):
        h.control.model_info(receipt.model_id)


async def test_unknown_sessions_and_models_fail_through_the_future(h: Harness) -> None:
    assert isinstance(await h.error(await h.create("sess-none")), NotFound)
    error = await h.error(h.submit(optim("sess-none:train:0", 1)))
    assert isinstance(error, NotFound)
    assert "'sess-none:train:0'" in str(error)


async def test_no_more_models_than_the_limit_are_live(open_control: OpenControl) -> None:
    async with open_control(max_live_models=2) as h:
        session_id = await h.session()
        first = await h.model(session_id, 0)
        await h.model(session_id, 1)
        assert isinstance(await h.error(await h.create(session_id, 2)), Overloaded)
        await h.result(h.submit(UnloadModel(model_id=first)))
        await h.model(session_id, 3)


# ---- order ----


async def test_out_of_order_submits_are_answered_at_once_and_done_in_order(h: Harness) -> None:
    model_id = await h.model()
    third = h.submit(optim(model_id, 3))
    second = h.submit(forward_backward(model_id, 2, first=20))
    await h.settle()
    assert await h.is_pending(second)
    pending = await h.control.wait_future(third.request_id, 0)
    assert not isinstance(pending, Outcome)
    assert pending.reason == f"waiting for request seq 1 of model '{model_id}'"
    assert h.batches() == []
    first = h.submit(forward_backward(model_id, 1, first=10))
    assert (await h.result(third))["step_applied"] == 1.0
    assert h.batches() == [[(model_id, 10), (model_id, 20)]]
    assert (await h.result(first)).metrics["tokens:sum"] == 3.0
    await h.result(second)


async def test_gradients_of_several_requests_are_gathered_before_the_step(h: Harness) -> None:
    model_id = await h.model()
    parts = [h.submit(forward_backward(model_id, seq, first=10 * seq)) for seq in (1, 2, 3)]
    step = h.submit(optim(model_id, 4))
    losses = [(await h.result(part)).loss_sum for part in parts]
    assert (await h.result(step))["grad_norm:mean"] == pytest.approx(sum(losses))


async def test_the_same_submit_again_is_the_same_request(h: Harness) -> None:
    model_id = await h.model()
    request = forward_backward(model_id, 1)
    first, again = h.submit(request), h.submit(request)
    await h.result(first)
    late = h.submit(request)
    assert first == again == late
    assert len(h.batches()) == 1


async def test_a_used_number_with_another_payload_fails_and_leaves_the_original_alone(h: Harness) -> None:
    model_id = await h.model()
    original = h.submit(forward_backward(model_id, 1))
    conflict = h.submit(forward_backward(model_id, 1, first=9))
    error = await h.error(conflict)
    assert isinstance(error, PayloadConflict)
    assert f"seq 1 of model '{model_id}'" in str(error)
    assert conflict.request_id != original.request_id
    await h.result(original)
    assert h.batches() == [[(model_id, 1)]]


async def test_a_rejected_request_uses_up_its_number_and_the_model_goes_on(h: Harness) -> None:
    model_id = await h.model()
    bad = h.submit(forward_backward(model_id, 1, loss_fn="nonsense"))
    worse = h.submit(Rejected(model_id=model_id, seq_id=2, error=InvalidInput("not a datum")))
    step = h.submit(optim(model_id, 3, learning_rate=-1.0))
    good = h.submit(forward_backward(model_id, 4))
    assert "cross_entropy, importance_sampling, ppo, cispo, dro" in str(await h.error(bad))
    assert str(await h.error(worse)) == "not a datum"
    assert str(await h.error(step)) == "adam_params.learning_rate must be at least 0, not -1.0"
    assert (await h.result(good)).loss_sum > 0
    assert h.asked(OptimStep) == []


async def test_large_data_are_checked_aside_and_keep_their_place(open_control: OpenControl) -> None:
    async with open_control() as h:
        model_id = await h.model()
        large = h.submit(forward_backward(model_id, 1, data=tuple(datum(1, 200) for _ in range(8))))
        small = h.submit(forward_backward(model_id, 2, first=7))
        bad = h.submit(forward_backward(model_id, 3, data=tuple(datum(400, 200) for _ in range(8))))
        step = h.submit(optim(model_id, 4))
        await h.settle()
        assert (await h.result(large)).metrics["tokens:sum"] == 1600.0
        await h.result(small)
        assert "data[0].model_input: token 512 at position 112" in str(await h.error(bad))
        assert (await h.result(step))["step_applied"] == 1.0
        assert [first for batch in h.batches() for _, first in batch] == [1, 7]


async def test_a_missing_number_is_waited_for_and_then_the_later_requests_fail(open_control: OpenControl) -> None:
    async with open_control(seq_gap_timeout_s=60) as h:
        model_id = await h.model()
        later = [h.submit(forward_backward(model_id, seq)) for seq in (2, 3)]
        h.clock.advance(59)
        await h.control.sweep()
        assert await h.is_pending(later[0])
        h.clock.advance(1)
        await h.control.sweep()
        for receipt in later:
            error = await h.error(receipt)
            assert isinstance(error, SeqGap)
            assert f"request seq 1 of model '{model_id}' did not come within 60 s" in str(error)
            assert error.category == "user"
        assert "came too late" in str(await h.error(h.submit(forward_backward(model_id, 1))))
        await h.result(h.submit(forward_backward(model_id, 4)))


async def test_requests_without_a_number_take_the_next_one(h: Harness) -> None:
    model_id = await h.model()
    receipts = [h.submit(forward_backward(model_id, 0, first=first)) for first in (1, 2, 3)]
    for receipt in receipts:
        await h.result(receipt)
    assert [first for batch in h.batches() for _, first in batch] == [1, 2, 3]
    assert len({receipt.request_id for receipt in receipts}) == 3
    await h.result(h.submit(optim(model_id, 4)))


async def test_a_full_queue_says_so_but_lets_the_request_in_that_others_wait_for(open_control: OpenControl) -> None:
    async with open_control(max_pending_per_model=3) as h:
        model_id = await h.model()
        waiting = [h.submit(forward_backward(model_id, seq)) for seq in (2, 3, 4)]
        with pytest.raises(Overloaded, match="3 requests"):
            h.submit(forward_backward(model_id, 5))
        h.submit(forward_backward(model_id, 1))
        for receipt in waiting:
            await h.result(receipt)
        await h.result(h.submit(forward_backward(model_id, 5)))


async def test_waiting_tokens_of_a_model_are_bounded(open_control: OpenControl) -> None:
    async with open_control(max_pending_tokens_per_model=10) as h:
        model_id = await h.model()
        h.submit(forward_backward(model_id, 2, length=8))
        with pytest.raises(Overloaded, match="8 tokens"):
            h.submit(forward_backward(model_id, 3, length=3))
        h.submit(forward_backward(model_id, 3, length=2))
        await h.result(h.submit(forward_backward(model_id, 1, length=100)))
        await h.settle()
        await h.result(h.submit(forward_backward(model_id, 4, length=100)))


# ---- sharing an engine ----


async def test_two_models_share_batches_and_each_keeps_its_order(h: Harness) -> None:
    session_id = await h.session()
    a, b = await h.model(session_id, 0), await h.model(session_id, 1)
    h.engine.pause()
    receipts = []
    for seq in (1, 2):
        receipts += [h.submit(forward_backward(a, seq, first=seq)), h.submit(forward_backward(b, seq, first=10 * seq))]
    receipts += [h.submit(optim(a, 3)), h.submit(optim(b, 3))]
    h.engine.resume()
    for receipt in receipts:
        await h.result(receipt)
    assert [sorted(batch) for batch in h.batches()] == [[(a, 1), (a, 2), (b, 10), (b, 20)]]
    for model, order in ((a, [1, 2]), (b, [10, 20])):
        assert [first for name, first in h.batches()[0] if name == model] == order
    steps = [
        [operation.model_id for operation in burst] for burst in h.engine.bursts if isinstance(burst[0], OptimStep)
    ]
    assert steps == [[a, b]]


async def test_a_request_is_answered_before_the_rest_of_its_batch(open_control: OpenControl) -> None:
    async with open_control() as h:
        session_id = await h.session()
        a, b = await h.model(session_id, 0), await h.model(session_id, 1)
        h.engine.pause()
        receipts = [h.submit(forward_backward(model_id, 1)) for model_id in (a, b)]
        save = h.submit(SaveState(model_id=a, seq_id=2, name="early"))
        await h.settle()
        assert len(h.batches()) == 1
        h.engine.step()
        await h.result(receipts[0])
        assert await h.is_pending(receipts[1])
        for _ in range(500):  # the registry writes in a thread of its own
            if h.asked(SaveAdapter):
                break
            await asyncio.sleep(0.01)
        assert h.asked(SaveAdapter)
        assert await h.is_pending(receipts[1])
        h.engine.resume()
        await h.result(receipts[1])
        await h.result(save)


async def test_a_small_request_does_not_wait_for_anothers_long_queue(open_control: OpenControl) -> None:
    async with open_control(max_batch_tokens=8) as h:
        session_id = await h.session()
        greedy, modest = await h.model(session_id, 0), await h.model(session_id, 1)
        h.engine.pause()
        for seq in range(1, 21):
            h.submit(forward_backward(greedy, seq, length=8))
        await h.settle()
        small = h.submit(forward_backward(modest, 1))
        h.engine.resume()
        await h.result(small)
        place = next(i for i, batch in enumerate(h.batches()) if batch[0][0] == modest)
        assert place <= 2


async def test_batches_stay_within_the_token_budget(open_control: OpenControl) -> None:
    async with open_control(max_batch_tokens=10) as h:
        model_id = await h.model()
        receipts = [h.submit(forward_backward(model_id, seq, length=4)) for seq in range(1, 6)]
        receipts.append(h.submit(forward_backward(model_id, 6, length=30)))
        for receipt in receipts:
            await h.result(receipt)
        assert [len(batch) for batch in h.batches()] == [2, 2, 1, 1]


async def test_an_engine_has_at_most_two_training_operations_at_a_time(open_control: OpenControl) -> None:
    async with open_control(max_batch_tokens=3) as h:
        model_id = await h.model()
        h.engine.pause()
        receipts = [h.submit(forward_backward(model_id, seq)) for seq in range(1, 6)]
        await h.settle()
        assert len(h.batches()) == 2
        h.engine.resume()
        for receipt in receipts:
            await h.result(receipt)
        assert len(h.batches()) == 5


async def test_an_item_that_fails_does_not_fail_its_neighbours(h: Harness) -> None:
    session_id = await h.session()
    a, b = await h.model(session_id, 0), await h.model(session_id, 1)
    h.engine.fail_items(a, InvalidInput("bad"))
    receipts = [h.submit(forward_backward(m, 1)) for m in (a, b)]
    assert str(await h.error(receipts[0])) == "bad"
    assert (await h.result(receipts[1])).loss_sum > 0
    await h.result(h.submit(forward_backward(a, 2)))


async def test_a_batch_that_fails_whole_fails_its_requests_and_the_models_go_on(h: Harness) -> None:
    model_id = await h.model()
    h.engine.fail_next(TrainItem, ServerError("device fault"))
    assert str(await h.error(h.submit(forward_backward(model_id, 1)))) == "device fault"
    await h.result(h.submit(forward_backward(model_id, 2)))


async def test_a_corrupted_adapter_marks_its_run(h: Harness) -> None:
    model_id = await h.model()
    assert not (await h.control.library.get_training_run(model_id)).corrupted
    h.engine.fail_next(OptimStep, AdapterCorrupted("gradient is not finite"))
    assert isinstance(await h.error(h.submit(optim(model_id, 1))), AdapterCorrupted)
    assert (await h.control.library.get_training_run(model_id)).corrupted
    assert h.control.model_info(model_id).corrupted
    session_id = model_id.partition(":")[0]
    assert (await h.control.library.get_session(session_id)).corrupted_training_run_ids == [model_id]
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=2, name="after")))
    assert (await h.control.library.get_training_run(model_id)).corrupted
    await h.result(
        h.submit(LoadState(model_id=model_id, seq_id=3, path=f"tinker://{model_id}/weights/after", optimizer=True))
    )
    assert not (await h.control.library.get_training_run(model_id)).corrupted
    assert not h.control.model_info(model_id).corrupted
    assert (await h.control.library.get_session(session_id)).corrupted_training_run_ids == []


async def test_a_corrupted_run_stays_marked_after_a_restart(open_control: OpenControl) -> None:
    async with open_control(ledger=True) as h:
        model_id = await h.model()
        h.engine.fail_next(OptimStep, AdapterCorrupted("gradient is not finite"))
        await h.error(h.submit(optim(model_id, 1)))
    async with open_control(ledger=True) as h:
        assert (await h.control.library.get_training_run(model_id)).corrupted


# ---- endings ----


async def test_an_unloaded_model_takes_no_more_requests(h: Harness) -> None:
    model_id = await h.model()
    h.submit(forward_backward(model_id, 1))
    assert await h.result(h.submit(UnloadModel(model_id=model_id))) == model_id
    error = await h.error(h.submit(forward_backward(model_id, 3)))
    assert isinstance(error, ModelEnded)
    assert "was unloaded" in str(error)
    assert [operation.model_id for operation in h.asked(DropAdapter)] == [model_id]


async def test_a_finished_session_completes_what_was_asked_and_takes_nothing_new(h: Harness) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    h.engine.pause()
    save = h.submit(SaveState(model_id=model_id, seq_id=2, name="last"))
    train = h.submit(forward_backward(model_id, 1))
    await h.control.finish_session(session_id, "success", None)
    await h.control.finish_session(session_id, "errored", "a second reason")
    late = h.submit(forward_backward(model_id, 3))
    h.engine.resume()
    await h.result(train)
    assert (await h.result(save)).endswith("/weights/last")
    assert isinstance(await h.error(late), ModelEnded)
    await h.control.sweep()
    await h.settle()
    assert [operation.model_id for operation in h.asked(DropAdapter)] == [model_id]
    with pytest.raises(SessionEnded, match=r"has ended \(success\)"):
        h.control.heartbeat(session_id)
    assert "has ended (success)" in str(await h.error(await h.create(session_id, 1)))


async def test_a_silent_session_is_ended_and_its_models_dropped(open_control: OpenControl) -> None:
    async with open_control(session_timeout_s=600, seq_gap_timeout_s=1e6) as h:
        dead, alive = await h.session(), await h.session()
        dead_model, live_model = await h.model(dead), await h.model(alive)
        waiting = h.submit(forward_backward(dead_model, 2))
        h.clock.advance(599)
        h.control.heartbeat(alive)
        h.clock.advance(1)
        await h.control.sweep()
        for receipt in (waiting, h.submit(forward_backward(dead_model, 3))):
            assert "no heartbeat for 600 s" in str(await h.error(receipt))
        with pytest.raises(SessionEnded, match="no heartbeat for 600 s"):
            h.control.heartbeat(dead)
        await h.result(h.submit(forward_backward(live_model, 1)))
        await h.settle()
        assert [operation.model_id for operation in h.asked(DropAdapter)] == [dead_model]


async def test_requests_and_polls_keep_a_session_alive_too(open_control: OpenControl) -> None:
    async with open_control(session_timeout_s=600) as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        h.clock.advance(400)
        receipt = h.submit(forward_backward(model_id, 1))
        h.clock.advance(400)
        await h.control.sweep()
        await h.result(receipt)
        h.clock.advance(400)
        await h.control.sweep()
        h.control.heartbeat(session_id)


async def test_when_an_engine_dies_everything_on_it_fails_and_the_server_is_not_ready(
    open_control: OpenControl,
) -> None:
    async with open_control() as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        assert h.control.is_ready
        h.engine.pause()
        receipts = [h.submit(forward_backward(model_id, seq)) for seq in (1, 2, 4)]
        await h.settle()
        h.engine.die("the engine was killed")
        for receipt in receipts:
            assert isinstance(await h.error(receipt), EngineDied)
        assert not h.control.is_ready
        assert h.control.readiness_reason == "the engine of 'tinsmith/fake' died: the engine was killed"
        assert isinstance(await h.error(h.submit(forward_backward(model_id, 5))), EngineDied)
        assert isinstance(await h.error(await h.create(session_id, 1)), EngineDied)


async def test_an_engine_that_dies_idle_is_noticed(h: Harness) -> None:
    model_id = await h.model()
    waiting = h.submit(forward_backward(model_id, 2))
    h.engine.die()
    await h.control.sweep()
    assert not h.control.is_ready
    assert isinstance(await h.error(waiting), EngineDied)


async def test_closing_finishes_what_runs_and_fails_what_waits(open_control: OpenControl) -> None:
    async with open_control() as h:
        model_id = await h.model()
        running, waiting = h.submit(forward_backward(model_id, 1)), h.submit(forward_backward(model_id, 3))
        await asyncio.sleep(0)
        await asyncio.gather(h.control.close(), h.control.close())
        assert (await h.result(running)).loss_sum > 0
        assert isinstance(await h.error(waiting), SessionEnded)
        assert h.control.readiness_reason == "the server is closed"


async def test_a_base_model_that_cannot_be_loaded_stops_the_start(open_control: OpenControl) -> None:
    error = InvalidInput("no such folder")
    with pytest.raises(InvalidInput, match="no such folder"):
        async with open_control([FakeEngine(), FakeEngine(start_error=error)]):
            raise AssertionError("it started")
    async with open_control() as h:
        assert h.control.is_ready


async def test_two_servers_cannot_share_a_data_folder(open_control: OpenControl) -> None:
    async with open_control():
        with pytest.raises(TinsmithError, match="in use by another server"):
            async with open_control():
                raise AssertionError("it started")


async def test_bad_requests_are_told_apart_by_their_payload(h: Harness) -> None:
    model_id = await h.model()
    request = forward_backward(model_id, 1, loss_fn="nonsense")
    assert h.submit(request) == h.submit(request)
    assert isinstance(await h.error(h.submit(forward_backward(model_id, 1))), PayloadConflict)
    assert fingerprint(request) == fingerprint(forward_backward(model_id, 1, loss_fn="nonsense"))


async def test_an_expired_result_is_not_computed_again(open_control: OpenControl) -> None:
    async with open_control(future_ttl_s=10, session_timeout_s=1e6) as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        request = forward_backward(model_id, 1)
        await h.result(h.submit(request))
        h.clock.advance(11)
        await h.control.sweep()
        error = await h.error(h.submit(request))
        assert "seq 1 was already used and its result is no longer kept; the next is 2" in str(error)
        assert isinstance(await h.error(await h.create(session_id)), AlreadyExists)
        assert len(h.batches()) == 1
