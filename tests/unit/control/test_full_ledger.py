"""While nothing can be written nothing is taken, nothing is lost, and nobody is given up."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.unit.control.harness import Harness, draw, forward_backward
from tests.unit.control.restarts import Server, running
from tinsmith.control.errors import NotTaken
from tinsmith.types.operations import TrainItem

pytestmark = pytest.mark.anyio


@contextmanager
def full_disk(h: Harness) -> Iterator[None]:
    ledger = h.control._ledger
    assert ledger is not None
    transact = ledger._transact

    def full(*arguments: Any) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorname = "SQLITE_FULL"
        raise error

    ledger._transact = full  # type: ignore[method-assign]
    yield
    ledger._transact = transact  # type: ignore[method-assign]


async def well_again(h: Harness) -> None:
    ledger = h.control._ledger
    assert ledger is not None
    ledger.probe()
    await ledger.flush()
    assert ledger.fault is None


async def test_a_sampler_that_could_not_be_written_is_written_when_it_is_asked_for_again(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    with full_disk(h), pytest.raises(NotTaken):
        await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    await well_again(h)
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    await server.kill(h)
    async with running(server) as h:
        await h.result(h.sample(draw(sampler_id, 1)))


async def test_what_waits_for_a_refused_request_is_not_given_up_while_the_disk_is_full(server: Server) -> None:
    async with running(server) as h:
        model_id = await h.model()
        with full_disk(h):
            refused = h.submit(forward_backward(model_id, 1, first=1))
            with pytest.raises(NotTaken):
                await h.control.durable(refused)
            h.clock.advance(100)
            h.control._training.give_up_gaps()
        await well_again(h)
        after = h.submit(forward_backward(model_id, 2, first=2))
        await h.control.durable(after)
        with full_disk(h):
            with pytest.raises(NotTaken):
                await h.control.durable(h.submit(forward_backward(model_id, 3, first=3)))
            h.clock.advance(100)
            h.control._training.give_up_gaps()
        await well_again(h)
        h.control._training.give_up_gaps()
        assert await h.is_pending(after)
        await h.result(h.submit(forward_backward(model_id, 1, first=1)))
        await h.result(after)
        assert [item.data[0].model_input.to_ints()[0] for item in h.asked(TrainItem)] == [1, 2]


async def test_a_refused_request_that_never_comes_again_is_waited_for_as_long_as_any(server: Server) -> None:
    async with running(server) as h:
        model_id = await h.model()
        with full_disk(h):
            refused = h.submit(forward_backward(model_id, 1, first=1))
            later = h.submit(forward_backward(model_id, 2, first=2))
            for receipt in (refused, later):
                with pytest.raises(NotTaken):
                    await h.control.durable(receipt)
        await well_again(h)
        later = h.submit(forward_backward(model_id, 2, first=2))
        await h.control.durable(later)
        h.clock.advance(61)
        h.control._training.give_up_gaps()
        assert "seq 1" in str(await h.error(later))
