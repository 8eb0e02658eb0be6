"""Usage is counted once, however often a request is done again after crashes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.unit.control.harness import Harness, draw
from tests.unit.control.restarts import Server, results, running, train
from tinsmith.control.errors import Unsettled
from tinsmith.control.registry import COUNTED_REQUESTS

pytestmark = pytest.mark.anyio


async def used(h: Harness) -> dict[str, float]:
    report = await h.control.library.usage(0, 4e9)
    counts: Counter[str] = Counter()
    for event in report.events:
        counts[event.kind] += event.amount
    return dict(counts)


def num_marks(h: Harness) -> int:
    return len(h.control._registry.read_now(lambda c: c.execute(COUNTED_REQUESTS.select()).all()))


async def worked(h: Harness) -> tuple[str, str]:
    """Two steps and a sample, done; the model and the sampler."""
    session_id = await h.session()
    model_id = await h.model(session_id)
    await results(h, await train(h, model_id, 1, 2))
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    await h.result(h.sample(draw(sampler_id, 1)))
    return model_id, sampler_id


@pytest.mark.parametrize("is_written", [False, True])
async def test_what_a_killed_server_had_done_is_counted_once(server: Server, is_written: bool) -> None:
    """Whether the count had been written when it was killed, or is lost with it."""
    async with running(Server(server.data_dir.with_name("other"))) as h:
        await worked(h)
        expected = await used(h)
    h = await server.start()
    model_id, _ = await worked(h)
    if is_written:
        assert await used(h) == expected
    for _ in range(2):
        await server.kill(h)
        h = await server.start()
        await used(h)  # which writes down what was done again so far
    await results(h, await train(h, model_id, 5, 1))
    assert await used(h) == expected | {"training": expected["training"] * 3 / 2}
    await h.control.close()


async def test_marks_leave_with_what_they_are_of(server: Server) -> None:
    async with running(server) as h:
        await worked(h)
        await used(h)
        assert num_marks(h) > 0
        h.clock.advance(61)
        await h.control.sweep()
        await h.control._snapshots.drain()
        await h.settle()
        await used(h)
        assert num_marks(h) == 0


async def test_what_a_dead_engine_had_done_is_counted_once(server: Server) -> None:
    async with running(server) as h:
        model_id, _ = await worked(h)
        before = await used(h)
        h.engine.die("killed by SIGKILL")
        h.control._check_engines()
        await results(h, await train(h, model_id, 5, 2))
        assert await used(h) == before | {"training": before["training"] * 2}


async def test_a_write_of_which_nobody_knows_whether_it_was_done_does_not_keep_later_ones_from_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(server) as h:
        await worked(h)
        registry, write = h.control._registry, h.control._registry.write

        async def write_and_lose_the_connection(work: Any) -> Any:
            monkeypatch.setattr(registry, "write", write)
            await write(work)
            raise Unsettled("the connection was lost")

        monkeypatch.setattr(registry, "write", write_and_lose_the_connection)
        with pytest.raises(Unsettled):
            await used(h)
        marks = num_marks(h)
        assert marks > 0
        await used(h)
        assert num_marks(h) == marks
