"""Sampling sessions and samples, through the facade, over a fake engine."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.unit.control.conftest import OpenControl
from tests.unit.control.harness import Harness, draw, forward_backward, optim
from tinsmith.control.errors import SamplerGone, SessionEnded
from tinsmith.control.requests import RejectedSample, SaveForSampler, SaveState
from tinsmith.types import SamplingParams
from tinsmith.types.errors import (
    CheckpointDamaged,
    EngineDied,
    InvalidInput,
    NotFound,
    Overloaded,
    PayloadConflict,
    Unsupported,
    UserError,
)
from tinsmith.types.operations import CancelSample, DropSnapshot, LoadSnapshot, PublishSnapshot, Sample
from tinsmith.types.results import DrawnToken
from tinsmith.types.tensor import TensorData

pytestmark = pytest.mark.anyio


async def publish(h: Harness, model_id: str, seq_id: int, n: int) -> str:
    save = SaveForSampler(model_id=model_id, seq_id=seq_id, sampling_session_seq_id=n)
    return str((await h.result(h.submit(save))).sampling_session_id)


async def saved(h: Harness, model_id: str, seq_id: int, name: str) -> str:
    return str((await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=seq_id, name=name)))).path)


async def tokens(h: Harness, sampler_id: str, seq_id: int = 0) -> list[int]:
    return list((await h.result(h.sample(draw(sampler_id, seq_id)))).sequences[0].tokens)


async def test_a_base_model_is_sampled_without_a_snapshot(h: Harness) -> None:
    session_id = await h.session()
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake:x", None)
    assert sampler_id == f"{session_id}:sample:0"
    receipt = h.sample(draw(sampler_id, num_samples=3))
    assert receipt.sample_sequence_ids == tuple(f"{receipt.request_id}:{i}" for i in range(3))
    response = await h.result(receipt)
    assert [sequence.sequence_id for sequence in response.sequences] == list(receipt.sample_sequence_ids)
    assert h.asked(Sample)[0].snapshot_id is None
    described = h.control.get_sampler(sampler_id)
    assert (described.base_model, described.model_path) == ("tinsmith/fake", None)
    assert h.control.sampler_digest(sampler_id) is None


async def test_a_sampling_session_is_created_once_per_number(h: Harness) -> None:
    session_id = await h.session()
    first = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    assert await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None) == first
    with pytest.raises(PayloadConflict, match="samples something else"):
        await h.control.create_sampling_session(session_id, 0, "tinsmith/fake:other", None)
    model_id = await h.model(session_id)
    taken = h.submit(SaveForSampler(model_id=model_id, seq_id=1, sampling_session_seq_id=0))
    assert isinstance(await h.error(taken), PayloadConflict)


async def test_unknown_sources_are_errors_that_name_what_was_asked(h: Harness) -> None:
    session_id = await h.session()
    with pytest.raises(NotFound, match="no base model 'gpt' on this server; it has: tinsmith/fake"):
        await h.control.create_sampling_session(session_id, 0, "gpt", None)
    with pytest.raises(NotFound, match="no checkpoint 'tinker://r/weights/x'"):
        await h.control.create_sampling_session(session_id, 0, None, "tinker://r/weights/x")
    with pytest.raises(InvalidInput, match="not a checkpoint path: 'r/x'"):
        await h.control.create_sampling_session(session_id, 0, None, "r/x")
    with pytest.raises(InvalidInput, match="needs a base_model or a model_path"):
        await h.control.create_sampling_session(session_id, 0, None, None)
    with pytest.raises(NotFound, match="sess-none"):
        await h.control.create_sampling_session("sess-none", 0, "tinsmith/fake", None)
    error = await h.error(h.sample(draw("nobody")))
    assert isinstance(error, NotFound)
    assert "'nobody'" in str(error)


async def test_a_snapshot_stays_as_it_was_while_the_model_trains_on(h: Harness) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    old = await publish(h, model_id, 1, 0)
    before = await tokens(h, old)
    h.submit(forward_backward(model_id, 2))
    h.submit(optim(model_id, 3))
    new = await publish(h, model_id, 4, 1)
    assert await tokens(h, old, 1) == before
    assert await tokens(h, new) != before
    assert (old, new) == (f"{session_id}:sample:0", f"{session_id}:sample:1")
    assert h.control.sampler_digest(old) != h.control.sampler_digest(new)
    assert (await h.control.library.get_session(session_id)).sampler_ids == [old, new]


async def test_a_snapshot_is_taken_in_the_order_of_the_model(h: Harness) -> None:
    model_id = await h.model()
    save = h.submit(SaveForSampler(model_id=model_id, seq_id=3, sampling_session_seq_id=0))
    h.submit(optim(model_id, 2))
    h.submit(forward_backward(model_id, 1))
    await h.result(save)
    kinds = [type(operation).__name__ for operation in h.engine.operations]
    assert kinds == ["CreateAdapter", "TrainItem", "OptimStep", "PublishSnapshot"]


async def test_only_the_newest_unnamed_samplers_of_a_session_are_kept(open_control: OpenControl) -> None:
    async with open_control(ephemeral_samplers_per_session=2) as h:
        model_id = await h.model()
        samplers = [await publish(h, model_id, seq, seq) for seq in (1, 2, 3)]
        error = await h.error(h.sample(draw(samplers[0])))
        assert isinstance(error, SamplerGone)
        assert "keeps the newest 2 unnamed samplers" in str(error)
        assert len(await tokens(h, samplers[1])) == 4
        assert [operation.snapshot_id for operation in h.asked(DropSnapshot)] == [samplers[0]]


async def test_inflight_samplers_follow_the_newest_of_their_model(h: Harness) -> None:
    session_id = await h.session()
    model_id, other_id = await h.model(session_id), await h.model(session_id, 1)

    async def saved(model_id: str, seq: int, number: int, kind: str = "inflight") -> str:
        save = SaveForSampler(model_id=model_id, seq_id=seq, sampling_session_seq_id=number, kind=kind)
        return (await h.result(h.submit(save))).sampling_session_id

    async def prompt_logprob(sampler_id: str, seq: int) -> float:
        request = draw(sampler_id, seq, prompt_logprobs=True)
        return float((await h.result(h.sample(request))).prompt_logprobs_np[1])

    first, fixed, other = (
        await saved(model_id, 1, 0),
        await saved(model_id, 2, 1, "snapshot"),
        await saved(other_id, 1, 2),
    )
    before = [await prompt_logprob(sampler, 0) for sampler in (first, fixed, other)]
    h.submit(forward_backward(model_id, 3))
    h.submit(optim(model_id, 4))
    second = await saved(model_id, 5, 3)
    after = [await prompt_logprob(sampler, 1) for sampler in (first, fixed, other, second)]
    assert after[0] == after[3] != before[0]
    assert after[1:3] == before[1:3]
    assert h.control.sampler_digest(first) == h.control.sampler_digest(second)
    assert [drop.snapshot_id for drop in h.asked(DropSnapshot)] == [first]
    neither = await h.error(h.submit(SaveForSampler(model_id=model_id, seq_id=6)))
    assert "needs a path (a name) or a sampling_session_seq_id" in str(neither)
    await h.control.finish_session(session_id, "success", None)
    assert {drop.snapshot_id for drop in h.asked(DropSnapshot)} == {first, fixed, other, second}


async def test_samplers_of_one_checkpoint_share_a_snapshot_until_their_sessions_end(h: Harness) -> None:
    training = await h.session()
    model_id = await h.model(training)
    path = await saved(h, model_id, 1, "a")
    sessions = [await h.session(), await h.session()]
    samplers = [await h.control.create_sampling_session(s, 0, "ignored: the path wins", path) for s in sessions]
    assert await tokens(h, samplers[0]) == await tokens(h, samplers[1])
    assert len(h.asked(LoadSnapshot)) == 1
    digest = h.control.sampler_digest(samplers[0])
    assert digest is not None
    assert h.control.sampler_digest(samplers[1]) == digest
    assert h.control.get_sampler(samplers[0]).model_path == path
    await h.control.finish_session(sessions[0], "success", None)
    assert h.asked(DropSnapshot) == []
    await h.control.finish_session(sessions[1], "success", None)
    assert [operation.snapshot_id for operation in h.asked(DropSnapshot)] == [h.asked(LoadSnapshot)[0].snapshot_id]
    assert isinstance(await h.error(h.sample(draw(samplers[0], 9))), SessionEnded)


async def test_checkpoints_that_were_pushed_out_are_loaded_again_when_sampled(open_control: OpenControl) -> None:
    async with open_control(max_loaded_checkpoints=1) as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        first = await saved(h, model_id, 1, "first")
        h.submit(forward_backward(model_id, 2))
        h.submit(optim(model_id, 3))
        second = await saved(h, model_id, 4, "second")
        a = await h.control.create_sampling_session(session_id, 0, None, first)
        before = await tokens(h, a)
        b = await h.control.create_sampling_session(session_id, 1, None, second)
        assert len(h.asked(DropSnapshot)) == 1
        receipts = [h.sample(draw(a, seq)) for seq in (1, 2)]
        for receipt in receipts:
            assert (await h.result(receipt)).sequences[0].tokens == before
        assert len(h.asked(LoadSnapshot)) == 3
        assert await tokens(h, b) != before


async def test_a_sampler_whose_checkpoint_is_gone_and_unloaded_says_so(open_control: OpenControl) -> None:
    async with open_control(max_loaded_checkpoints=1) as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        paths = [await saved(h, model_id, seq, f"n{seq}") for seq in (1, 2)]
        samplers = [await h.control.create_sampling_session(session_id, n, None, path) for n, path in enumerate(paths)]
        for seq in (1, 2):
            await h.control.library.delete_checkpoint(model_id, f"sampler_weights/n{seq}")
        assert len(await tokens(h, samplers[1])) == 4
        error = await h.error(h.sample(draw(samplers[0])))
        assert isinstance(error, SamplerGone)
        assert paths[0] in str(error)


async def test_a_checkpoint_that_cannot_be_read_is_an_error_and_never_the_base_model(h: Harness) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    path = await saved(h, model_id, 1, "a")
    h.engine.fail_next(LoadSnapshot, CheckpointDamaged("hash mismatch"))
    with pytest.raises(CheckpointDamaged, match="hash mismatch"):
        await h.control.create_sampling_session(session_id, 0, None, path)
    assert len(await tokens(h, await h.control.create_sampling_session(session_id, 0, None, path))) == 4


async def test_a_sample_sent_again_is_the_same_request(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    first, again = h.sample(draw(sampler_id)), h.sample(draw(sampler_id))
    assert first == again
    assert isinstance(await h.error(h.sample(draw(sampler_id, num_samples=2))), PayloadConflict)
    await h.result(first)
    assert len(h.asked(Sample)) == 1


async def test_bad_samples_fail_their_future_alone(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    bad = h.sample(draw(sampler_id, 0, params=SamplingParams(top_k=10**6)))
    undecodable = h.sample(
        RejectedSample(sampling_session_id=sampler_id, seq_id=1, num_samples=2, error=Unsupported("alt tokens"))
    )
    good = h.sample(draw(sampler_id, 2))
    assert "sampling_params.top_k must be -1 (off) or 1..512" in str(await h.error(bad))
    assert str(await h.error(undecodable)) == "alt tokens"
    assert len(undecodable.sample_sequence_ids) == 2
    assert len((await h.result(good)).sequences) == 1


async def test_prompt_scores_before_the_last_n_are_hidden(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    all_of_them = await h.result(h.sample(draw(sampler_id, 0, prompt_logprobs=True, topk_prompt_logprobs=2)))
    last = await h.result(
        h.sample(draw(sampler_id, 1, prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=1))
    )
    assert all_of_them.prompt_logprobs[0] is None
    assert last.prompt_logprobs == [None, None, all_of_them.prompt_logprobs[2]]
    assert last.topk_prompt_logprobs == [None, None, all_of_them.topk_prompt_logprobs[2]]


async def test_chosen_and_alternative_prompt_tokens_are_scored(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    dense = TensorData(np.array([[5, -1], [7, 8]]))
    sparse = TensorData(np.array([5, 7, 8]), "int64", (2, 2), [0, 1, 3], [0, 0, 1])
    one = await h.result(h.sample(draw(sampler_id, 0, target_prompt_logprobs=dense, prompt_alt_tokens_k=3)))
    other = await h.result(h.sample(draw(sampler_id, 1, target_prompt_logprobs=sparse)))
    assert one.target_prompt_logprobs.to_numpy()[0, 1] == 0.0
    assert (one.target_prompt_logprobs.flat[[0, 2, 3]] < 0).all()
    assert not one.target_prompt_logprobs.is_sparse
    assert other.target_prompt_logprobs.is_sparse
    assert other.target_prompt_logprobs == one.target_prompt_logprobs
    assert one.prompt_alt_tokens.tokens.shape == one.prompt_alt_tokens.logprobs.shape == [2, 3]
    assert other.prompt_alt_tokens is None


async def test_a_sample_can_be_cancelled_any_number_of_times(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    h.engine.pause()
    receipt = h.sample(draw(sampler_id))
    h.control.cancel(receipt.request_id)
    h.control.cancel(receipt.request_id)
    error = await h.error(receipt)
    assert isinstance(error, UserError)
    assert "cancelled" in str(error)
    h.control.cancel(receipt.request_id)
    h.control.cancel("req-unknown")
    assert len(h.asked(CancelSample)) <= 2


async def test_no_more_samples_wait_than_the_limit(open_control: OpenControl) -> None:
    async with open_control(max_pending_samples=2) as h:
        sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
        h.engine.pause()
        waiting = [h.sample(draw(sampler_id, seq)) for seq in (0, 1)]
        with pytest.raises(Overloaded, match="2 samples are waiting"):
            h.sample(draw(sampler_id, 2))
        assert h.sample(draw(sampler_id, 1)) == waiting[1]
        h.engine.resume()
        for receipt in waiting:
            await h.result(receipt)
        await h.result(h.sample(draw(sampler_id, 2)))


async def test_samples_of_a_sampler_that_comes_back_count_among_those_that_wait(open_control: OpenControl) -> None:
    async with open_control(max_pending_samples=2) as h:
        model_id = await h.model()
        save_it = SaveForSampler(model_id=model_id, seq_id=1, sampling_session_seq_id=0)
        sampler_id = (await h.result(h.submit(save_it))).sampling_session_id
        h.control._samplers.expect(sampler_id, model_id, is_inflight=False)
        waiting = [h.sample(draw(sampler_id, seq)) for seq in (0, 1)]
        with pytest.raises(Overloaded, match="2 samples are waiting"):
            h.sample(draw(sampler_id, 2))
        h.control._samplers.settle(sampler_id)
        for receipt in waiting:
            await h.result(receipt)


async def test_samples_do_not_wait_for_training(h: Harness) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    sampler_id = await publish(h, model_id, 1, 0)
    h.submit(forward_backward(model_id, 3))
    assert len(await tokens(h, sampler_id)) == 4


async def test_samples_of_a_dead_engine_fail(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    h.engine.pause()
    waiting = h.sample(draw(sampler_id))
    h.engine.die("killed")
    assert isinstance(await h.error(waiting), EngineDied)
    assert isinstance(await h.error(h.sample(draw(sampler_id, 1))), EngineDied)
    assert not h.control.is_ready


async def test_a_drawn_seed_differs_from_request_to_request_and_a_given_one_does_not(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    free = SamplingParams(max_tokens=4)
    for seq in (0, 1):
        await h.result(h.sample(draw(sampler_id, seq, params=free)))
    assert await tokens(h, sampler_id, 2) == await tokens(h, sampler_id, 3)
    seeds = [operation.seed for operation in h.asked(Sample)]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [1, 1]


async def test_a_named_save_can_open_a_sampler_too(h: Harness) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    both = SaveForSampler(model_id=model_id, seq_id=1, name="x", sampling_session_seq_id=5)
    result = await h.result(h.submit(both))
    assert result.path == f"tinker://{model_id}/sampler_weights/x"
    assert h.control.get_sampler(result.sampling_session_id).model_path == result.path
    assert len(h.asked(PublishSnapshot)) == 1


async def test_a_training_checkpoint_can_be_sampled_and_retries_of_its_session_share_the_load(h: Harness) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    path = await h.result(h.submit(SaveState(model_id=model_id, seq_id=1, name="state")))
    create = [h.control.create_sampling_session(session_id, 0, None, path) for _ in range(3)]
    assert len(set(await asyncio.gather(*create))) == 1
    assert len(h.asked(LoadSnapshot)) == 1


async def test_a_sample_drawn_in_place_tells_its_tokens_and_keeps_no_future(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    told: list[DrawnToken] = []
    response = await h.control.draw_samples(draw(sampler_id, num_samples=2), told.append)
    for index, sequence in enumerate(response.sequences):
        assert [t.token for t in told if t.index == index] == sequence.tokens
    await h.control.draw_samples(draw(sampler_id))
    assert [operation.stream for operation in h.asked(Sample)] == [True, False]
    assert len(h.control._futures) == 0


async def test_a_caller_that_leaves_stops_the_drawing(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    h.engine.pause()
    waiting = asyncio.create_task(h.control.draw_samples(draw(sampler_id)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert h.asked(CancelSample) == [CancelSample(ticket=1)]
    h.engine.resume()
    assert (await h.control.draw_samples(draw(sampler_id))).sequences


async def test_a_sample_drawn_in_place_meets_the_same_refusals(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    with pytest.raises(InvalidInput, match="max_tokens"):
        await h.control.draw_samples(draw(sampler_id, params=SamplingParams(max_tokens=100_000)))
    with pytest.raises(NotFound, match="nobody"):
        await h.control.draw_samples(draw("nobody"))
    waiting = asyncio.create_task(h.control.draw_samples(draw(sampler_id)))
    await asyncio.sleep(0)
    h.engine.die("out of memory")
    with pytest.raises(EngineDied):
        await waiting
    assert not h.control.is_ready


async def test_stop_texts_and_more_stop_tokens_go_together(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    params = SamplingParams(max_tokens=4, seed=1, stop=["zz"])
    await h.control.draw_samples(draw(sampler_id, params=params, more_stop_tokens=(5, 7, 5)))
    (operation,) = h.asked(Sample)
    assert (operation.stop_strings, operation.stop_token_ids) == (("zz",), (5, 7))
