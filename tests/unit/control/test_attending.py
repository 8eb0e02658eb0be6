"""A caller that waits in place sees no more than a pause when the engine dies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.control.harness import Harness, draw
from tests.unit.control.restarts import Server, results, running, train
from tinsmith.control.requests import SaveForSampler
from tinsmith.types import SamplingParams
from tinsmith.types.errors import EngineDied
from tinsmith.types.operations import Sample
from tinsmith.types.results import DrawnToken

pytestmark = pytest.mark.anyio

UNSEEDED = SamplingParams(max_tokens=6)


async def sampler_of(h: Harness) -> str:
    """An unnamed sampler of a model that has learned a little."""
    session_id = await h.session()
    model_id = await h.model(session_id)
    await results(h, await train(h, model_id, 1, 2))
    saved = await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=5, sampling_session_seq_id=0)))
    return str(saved.sampling_session_id)


async def test_a_draw_in_place_survives_the_death_of_its_engine(server: Server) -> None:
    async with running(server) as h:
        sampler_id = await sampler_of(h)
        h.engine.pause()
        told: list[DrawnToken] = []
        drawing = asyncio.create_task(h.control.draw_samples(draw(sampler_id, params=UNSEEDED), told.append))
        await h.settle()
        seed = h.asked(Sample)[-1].seed
        call = h.engine._lanes["sample"]._jobs[0].call
        first = h.engine._sample(h.asked(Sample)[-1]).sequences[0].tokens
        for position in range(3):  # half of it is told
            assert call.on_token is not None
            call.on_token(DrawnToken(index=0, token=first[position], logprob=-1.0))
        h.engine.die("killed by SIGKILL")
        h.engine.resume()
        response = await drawing
        assert h.asked(Sample)[-1].seed == seed
        assert response.sequences[0].tokens == first
        assert [drawn.token for drawn in told] == first
        assert h.control._sampling._num_attended == 0


async def test_other_tokens_than_were_told_are_an_error(server: Server) -> None:
    async with running(server) as h:
        sampler_id = await sampler_of(h)
        h.engine.pause()
        drawing = asyncio.create_task(h.control.draw_samples(draw(sampler_id, params=UNSEEDED), lambda drawn: None))
        await h.settle()
        call = h.engine._lanes["sample"]._jobs[0].call
        assert call.on_token is not None
        call.on_token(DrawnToken(index=0, token=511, logprob=-1.0))
        h.engine.die("killed by SIGKILL")
        h.engine.resume()
        with pytest.raises(EngineDied, match="other tokens"):
            await drawing


async def test_a_draw_in_place_that_kills_its_engine_again_fails(server: Server) -> None:
    async with running(server) as h:
        sampler_id = await sampler_of(h)
        sample = h.engine._handlers[Sample]

        def deadly(operation: Sample) -> Any:
            h.engine.die("killed by SIGSEGV")
            raise EngineDied("killed by SIGSEGV")

        h.engine._handlers[Sample] = deadly
        with pytest.raises(EngineDied):
            await h.control.draw_samples(draw(sampler_id), None)
        h.engine._handlers[Sample] = sample
        assert h.engine.num_starts == 2
        response = await h.control.draw_samples(draw(sampler_id), None)
        assert len(response.sequences[0].tokens) == 4
