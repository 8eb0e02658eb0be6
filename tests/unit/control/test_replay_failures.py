"""A request that was told it failed, or was cancelled, is not done again by the next engine or server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.control.harness import draw, forward_backward
from tests.unit.control.restarts import Server, results, running, train
from tinsmith.control import service
from tinsmith.control.requests import LoadState, Recipe, SaveState
from tinsmith.types.errors import ServerError
from tinsmith.types.operations import LoadAdapter, Sample, TrainItem

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("what_dies", ["server", "engine"])
async def test_a_load_that_found_nothing_finds_nothing_when_it_is_done_again(server: Server, what_dies: str) -> None:
    h = await server.start()
    model_id = await h.model()
    h.control._snapshots._max_requests = 10**9
    await results(h, await train(h, model_id, 1, 1))
    path = f"tinker://{model_id}/weights/a"
    load = h.submit(LoadState(model_id=model_id, seq_id=3, path=path, optimizer=True))
    told = await h.error(load)
    await results(h, await train(h, model_id, 4, 1))
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=6, name="a")))
    if what_dies == "server":
        await server.kill(h)
        h = await server.start()
    else:
        h.engine.die()
        h.control._check_engines()
    await results(h, await train(h, model_id, 7, 1))
    assert not h.asked(LoadAdapter)
    again = await h.error(load)
    assert (type(again), str(again)) == (type(told), str(told))
    await h.control.close()


async def test_a_pass_that_failed_is_not_done_again(server: Server) -> None:
    h = await server.start()
    model_id = await h.model()
    h.engine.fail_items(model_id, ServerError("the pass failed on the device: out of memory"))
    failed = h.submit(forward_backward(model_id, 1, first=11))
    assert isinstance(await h.error(failed), ServerError)
    await results(h, await train(h, model_id, 2, 1))  # the client has sent it again
    await server.kill(h)
    async with running(server) as h:
        await results(h, await train(h, model_id, 4, 1))
        assert len(h.asked(TrainItem)) == 2
        assert "out of memory" in str(await h.error(failed))


async def test_a_cancelled_sample_is_not_drawn_by_the_next_server(server: Server) -> None:
    h = await server.start()
    sampler_id = await h.control.create_sampling_session(await h.session(), 0, "tinsmith/fake", None)
    h.engine.pause()
    cancelled, wanted = h.sample(draw(sampler_id, 1)), h.sample(draw(sampler_id, 2))
    for receipt in (cancelled, wanted):
        await h.control.durable(receipt)
    h.control.cancel(cancelled.request_id)
    await h.settle()
    await server.kill(h)
    async with running(server) as h:
        await h.result(wanted)
        assert "cancelled" in str(await h.error(cancelled))
        assert len(h.asked(Sample)) == 1


async def test_a_recipe_that_failed_is_not_tried_again_with_a_new_engine(server: Server) -> None:
    async with running(server) as h:
        model_id = await h.model()
        attempts: list[object] = []

        async def make(details: Any) -> Any:
            attempts.append(details)
            if len(attempts) == 1:
                raise ServerError("the reference could not be scored")
            return forward_backward(model_id, 1)

        h.control.recipes.teach("test", make)
        failed = h.control.submit_deferred(model_id, Recipe(kind="test", details={}))
        assert isinstance(await h.error(failed), ServerError)
        await h.result(h.control.submit_deferred(model_id, Recipe(kind="test", details={})))
        h.engine.operations.clear()
        h.engine.die()
        h.control._check_engines()
        await h.result(h.control.submit_deferred(model_id, Recipe(kind="test", details={})))
        assert len(h.asked(TrainItem)) == 2


async def test_a_server_stops_while_a_recipe_waits_for_an_engine(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CLOSE_TIMEOUT_S", 0.05)
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)

    async def make(details: Any) -> Any:
        await h.control.draw_samples(draw(sampler_id))
        return forward_backward(model_id, 1)

    h.control.recipes.teach("test", make)
    h.engine.pause()
    receipt = h.control.submit_deferred(model_id, Recipe(kind="test", details={}))
    await h.control.durable(receipt)
    await h.settle()
    async with asyncio.timeout(5):
        await h.control.close()
    assert h.control.num_left == 1
