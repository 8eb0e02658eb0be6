"""Quotas: training waits and says why, samples and models are refused with a time to come back, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.control.conftest import OpenControl
from tests.unit.control.harness import Harness, draw, forward_backward, optim
from tinsmith.control.errors import QuotaExceeded
from tinsmith.control.futures import Pending
from tinsmith.control.identities import NO_QUOTA, Quota
from tinsmith.control.requests import NewSession
from tinsmith.types import SamplingParams
from tinsmith.types.operations import TrainItem

pytestmark = pytest.mark.anyio


class Book:
    """Quotas by user and project."""

    def __init__(self, **quotas: Quota) -> None:
        self.quotas = quotas

    def quota_of_user(self, user_id: str) -> Quota:
        return self.quotas.get(user_id, NO_QUOTA)

    def quota_of_project(self, project_id: str | None) -> Quota:
        return self.quotas.get(project_id or "", NO_QUOTA)


def limit(h: Harness, **quotas: Quota) -> Book:
    book = Book(**quotas)
    h.control._training._quotas._book = book
    return book


async def session(h: Harness, project_id: str | None = None) -> str:
    return await h.control.create_session(NewSession(project_id=project_id))


async def pending(h: Harness, request_id: str) -> Pending:
    state = await h.control.wait_future(request_id, 0)
    assert isinstance(state, Pending)
    return state


async def later(h: Harness, seconds: float) -> None:
    """Time goes by, and the scheduler's alarm rings."""
    h.clock.advance(seconds)
    for slot in h.control._engines:
        h.control._training.scheduler(slot).wake()
    await h.settle()


async def test_training_over_quota_waits_says_why_and_goes_on(h: Harness) -> None:
    model_id = await h.model(await session(h, "p"))
    limit(h, p=Quota(tokens_per_minute=60))
    first = h.submit(forward_backward(model_id, 1, length=90))
    second = h.submit(forward_backward(model_id, 2, length=30))
    step = h.submit(optim(model_id, 3))
    await h.result(first)
    await h.settle()
    state = await pending(h, second.request_id)
    assert state.queue_state == "paused_rate_limit"
    assert state.reason == (
        "project 'p' has used its 60 tokens per minute, and 30 more; work goes on by itself in 31 s"
    )
    await later(h, 30)
    assert len(h.asked(TrainItem)) == 1
    await later(h, 2)
    await h.result(second)
    await h.result(step)
    assert h.asked(TrainItem)[-1].data[0].model_input.length == 30


async def test_what_is_done_again_after_a_death_of_the_engine_is_not_charged_again(open_control: OpenControl) -> None:
    async with open_control(ledger=True) as h:
        session_id = await session(h, "p")
        model_id = await h.model(session_id)
        sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
        limit(h, p=Quota(tokens_per_minute=60))
        quotas = h.control._training._quotas
        for seq, length in ((1, 40), (2, 50)):
            await h.result(h.submit(forward_backward(model_id, seq, length=length)))
        assert quotas.room(session_id) == -30
        h.clock.advance(40)
        h.engine.pause()
        sample = h.sample(draw(sampler_id))
        await h.control.durable(sample)
        assert quotas.room(session_id) == 10 - 3
        h.engine.die()
        h.control._check_engines()
        h.engine.resume()
        await h.result(h.submit(optim(model_id, 3)))
        drawn = len((await h.result(sample)).sequences[0].tokens)
        assert quotas.room(session_id) == 10 - 3 - drawn
        assert [item.data[0].model_input.length for item in h.asked(TrainItem)] == [40, 50, 40, 50]


async def test_the_scheduler_wakes_by_itself_when_there_are_tokens_again(open_control: OpenControl) -> None:
    async with open_control() as h:
        model_id = await h.model()
        limit(h, local=Quota(tokens_per_minute=600_000))
        h.control._training._quotas.spend(model_id.partition(":")[0], 600_200)
        receipt = h.submit(forward_backward(model_id, 1))
        await h.settle()
        assert await h.is_pending(receipt)
        h.clock.advance(0.05)  # and the alarm is set for as long
        await h.result(receipt)


async def test_a_quota_of_one_project_is_not_anothers_and_a_user_has_one_over_all(h: Harness) -> None:
    a, b = await h.model(await session(h, "a")), await h.model(await session(h, "b"))
    book = limit(h, a=Quota(tokens_per_minute=10))
    await h.result(h.submit(forward_backward(a, 1, length=50)))
    waits = h.submit(forward_backward(a, 2))
    await h.result(h.submit(forward_backward(b, 1, length=50)))
    assert await h.is_pending(waits)
    book.quotas = {"local": Quota(tokens_per_minute=10)}
    await later(h, 0)
    await h.result(waits)
    await h.result(h.submit(forward_backward(b, 2, length=50)))
    both = [h.submit(forward_backward(a, 3)), h.submit(forward_backward(b, 3))]
    await h.settle()
    assert [await h.is_pending(receipt) for receipt in both] == [True, True]
    book.quotas = {}
    await later(h, 0)
    for receipt in both:
        await h.result(receipt)


async def test_sampled_and_prefilled_tokens_count_and_the_refusal_says_when_to_come_back(h: Harness) -> None:
    session_id = await session(h, "p")
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    limit(h, p=Quota(tokens_per_minute=30))
    params = SamplingParams(max_tokens=20, seed=1, stop=[])
    await h.result(h.sample(draw(sampler_id, 0, num_samples=2, params=params)))
    with pytest.raises(QuotaExceeded, match="project 'p' has used its 30 tokens per minute, and 13 more") as caught:
        h.sample(draw(sampler_id, 1))
    assert caught.value.retry_after_s == pytest.approx(28)
    with pytest.raises(QuotaExceeded):
        await h.control.draw_samples(draw(sampler_id))
    h.clock.advance(28.1)
    await h.result(h.sample(draw(sampler_id, 1)))


async def test_samples_at_once_are_counted_until_they_end_however_they_end(h: Harness) -> None:
    session_id = await session(h, "p")
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    limit(h, p=Quota(concurrent_samples=2))
    h.engine.pause()
    first, second = h.sample(draw(sampler_id, 0)), h.sample(draw(sampler_id, 1))
    with pytest.raises(QuotaExceeded, match="project 'p' has 2 samples that wait or are drawn, and a quota of 2"):
        h.sample(draw(sampler_id, 2))
    assert h.sample(draw(sampler_id, 1)) == second, "the same request again is no new one"
    h.control.cancel(first.request_id)
    await h.error(first)
    third = h.sample(draw(sampler_id, 2))
    h.engine.resume()
    await h.result(second)
    await h.result(third)
    await h.control.draw_samples(draw(sampler_id))
    assert not h.control._training._quotas._num_samples
    assert not h.control._training._quotas._samples


async def test_live_models_have_a_quota_and_one_that_ends_makes_room(h: Harness) -> None:
    session_id = await session(h, "p")
    limit(h, p=Quota(live_models=1))
    await h.model(session_id, 0)
    await h.model(await session(h, "other"), 0)
    with pytest.raises(QuotaExceeded, match="project 'p' has 1 live models, and a quota of 1; finish a session"):
        await h.create(await session(h, "p"), 0)
    await h.control.finish_session(session_id, "success", None)
    await h.settle()
    await h.control.sweep()
    await h.model(await session(h, "p"), 0)


async def test_work_by_one_project_is_done_by_its_share(open_control: OpenControl) -> None:
    async with open_control(max_batch_tokens=30) as h:
        large, small = await h.model(await session(h, "large")), await h.model(await session(h, "small"))
        h.engine.pause()
        before = len(h.batches())
        many = [h.submit(forward_backward(large, n, length=30)) for n in range(1, 1001)]
        await h.settle()
        one = h.submit(forward_backward(small, 1, length=5))
        h.engine.resume()
        await h.result(one)
        batches = h.batches()[before:]
        assert next(i for i, batch in enumerate(batches) if batch[0][0] == small) <= 2
        for receipt in many:
            await h.result(receipt)


async def test_samples_carry_their_payer(h: Harness) -> None:
    sampler_id = await h.control.create_sampling_session(await session(h, "p"), 0, "tinsmith/fake", None)
    await h.result(h.sample(draw(sampler_id)))
    (operation,) = h.asked(type(h.engine.operations[-1]))
    assert (operation.payer.project, operation.payer.flow, operation.payer.weight) == ("project:p", sampler_id, 1.0)


# ---- samples that nobody waits for ----


async def drawing(h: Harness, count: int, session_id: str) -> list[Any]:
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    h.engine.pause()
    return [h.sample(draw(sampler_id, n)) for n in range(count)]


async def test_samples_of_a_session_that_asks_for_nothing_are_cancelled(open_control: OpenControl) -> None:
    async with open_control(abandoned_sample_s=100.0, session_timeout_s=1000.0) as h:
        session_id = await session(h)
        receipts = await drawing(h, 5, session_id)
        h.clock.advance(60)
        assert await h.is_pending(receipts[0])
        h.clock.advance(60)
        h.control.heartbeat(session_id)
        await h.control.sweep()
        assert await h.is_pending(receipts[1]), "one poll keeps all samples of the session"
        h.clock.advance(60)
        h.control.heartbeat(session_id)
        h.clock.advance(60)
        await h.control.sweep()
        for receipt in receipts:
            assert "cancelled" in str(await h.error(receipt))
        assert not h.control._sampling._open


async def test_samples_of_a_lost_session_free_their_places(open_control: OpenControl) -> None:
    async with open_control(session_timeout_s=50.0) as h:
        receipts = await drawing(h, 3, await session(h))
        h.clock.advance(51)
        await h.control.sweep()
        await h.settle()
        for receipt in receipts:
            assert (await h.outcome(receipt)).error is not None
        assert not h.control._sampling._open


async def test_more_sessions_than_the_limit_are_refused(open_control: OpenControl) -> None:
    async with open_control(max_live_sessions=2) as h:
        first = await session(h)
        await session(h)
        with pytest.raises(Exception, match="2 sessions are live, the most this server keeps"):
            await session(h)
        await h.control.finish_session(first, "success", None)
        await session(h)
