"""Inflight samplers after a crash: all of a model's sample the newest weights, as before it."""

from __future__ import annotations

import pytest

from tests.unit.control.harness import Harness, draw
from tests.unit.control.restarts import Server, results, train
from tinsmith.control.requests import SaveForSampler

pytestmark = pytest.mark.anyio


async def inflight(h: Harness, model_id: str, seq_id: int, number: int) -> str:
    asked = SaveForSampler(model_id=model_id, seq_id=seq_id, sampling_session_seq_id=number, kind="inflight")
    return str((await h.result(h.submit(asked))).sampling_session_id)


async def drawn(h: Harness, sampler_id: str, number: int) -> list[int]:
    response = await h.result(h.sample(draw(sampler_id, number)))
    return list(response.sequences[0].tokens)


@pytest.mark.parametrize("has_snapshot", [False, True])
@pytest.mark.parametrize("victim", ["server", "engine"])
async def test_inflight_samplers_sample_the_newest_weights_after_a_crash(
    server: Server, victim: str, has_snapshot: bool
) -> None:
    h = await server.start()
    model_id = await h.model()
    await results(h, await train(h, model_id, 1, 2))
    older = await inflight(h, model_id, 5, 0)
    await results(h, await train(h, model_id, 6, 2))
    newer = await inflight(h, model_id, 10, 1)
    expected = await drawn(h, newer, 1)
    assert await drawn(h, older, 1) == expected
    if has_snapshot:
        h.clock.advance(61)
        await h.control.sweep()
        await h.control._snapshots.drain()
    if victim == "server":
        await server.kill(h)
        h = await server.start()
    else:
        h.engine.die("killed by SIGKILL")
        h.control._check_engines()
    assert await drawn(h, newer, 2) == expected
    assert await drawn(h, older, 2) == expected
    await results(h, await train(h, model_id, 11, 2))
    newest = await inflight(h, model_id, 15, 2)
    assert await drawn(h, older, 3) == await drawn(h, newest, 3) != expected
    await h.control.close()


@pytest.mark.parametrize("victim", ["server", "engine"])
async def test_samples_of_an_older_inflight_sampler_wait_for_the_newest_weights(server: Server, victim: str) -> None:
    h = await server.start()
    model_id = await h.model()
    older = await inflight(h, model_id, 1, 0)
    h.clock.advance(61)
    await h.control.sweep()
    await h.control._snapshots.drain()
    await results(h, await train(h, model_id, 2, 2))
    await inflight(h, model_id, 6, 1)
    await results(h, await train(h, model_id, 7, 2))
    await inflight(h, model_id, 11, 2)
    expected = await drawn(h, older, 1)
    await h.control.sweep()
    h.engine.pause()
    running = h.sample(draw(older, 2))
    await h.control.durable(running)
    if victim == "server":
        await server.kill(h)
        h = await server.start()
    else:
        h.engine.die("killed by SIGKILL")
        h.control._check_engines()
        h.engine.resume()
    new = h.sample(draw(older, 3))
    for receipt in (running, new):
        assert list((await h.result(receipt)).sequences[0].tokens) == expected
    await h.control.close()
