"""What waits in a session that its client has finished is done, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.unit.control.harness import Harness, fingerprint, forward_backward
from tests.unit.control.restarts import Server, results, running
from tinsmith.control.requests import CreateCustomLoss, ForwardBackward
from tinsmith.types.custom_loss import CustomLoss, LossCall, LossInput, Ref
from tinsmith.types.operations import TrainItem

pytestmark = pytest.mark.anyio

SUM = CustomLoss(
    name="sum",
    inputs=(LossInput(node="logprobs", name="logprobs", rank=1),),
    calls=(LossCall(node="sum_1", op="call_method", target="sum", args=(Ref("logprobs"),)),),
    loss=Ref("sum_1"),
)


async def custom_loss(h: Harness, session_id: str) -> str:
    request = CreateCustomLoss(session_id=session_id, custom_loss_seq_id=0, loss=SUM)
    loss_id: str = await h.result(h.control.create_custom_loss(request, fingerprint(request)))
    return loss_id


def with_loss(model_id: str, seq_id: int, loss_id: str) -> ForwardBackward:
    return forward_backward(model_id, seq_id, loss_fn="custom", loss_fn_config={"loss_id": loss_id})


@pytest.mark.parametrize("what_dies", ["server", "engine"])
async def test_requests_with_a_loss_of_a_finished_session_are_done_again(server: Server, what_dies: str) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id, loss_id = await h.model(session_id), await custom_loss(h, session_id)
    done = h.submit(with_loss(model_id, 1, loss_id))
    await h.result(done)
    h.engine.pause()
    waiting = h.submit(with_loss(model_id, 2, loss_id))
    await h.control.durable(waiting)
    await h.control.finish_session(session_id, "success", None)
    await h.control.sweep()
    if what_dies == "server":
        await server.kill(h)
        h = await server.start()
    else:
        h.engine.operations.clear()
        h.engine.die()
        h.control._check_engines()
        h.engine.resume()
    await results(h, [done, waiting])
    assert [item.custom_loss for item in h.asked(TrainItem)] == [SUM, SUM]
    await h.control.sweep()
    await h.control._journal.write(())
    assert {e.kind for e in h.control._ledger.read()} <= {"result", "strike"}  # type: ignore[union-attr]
    session = h.control._sessions.find(session_id)
    assert session is not None
    assert not session.custom_losses
    await h.control.close()


async def test_a_session_that_waits_for_nothing_takes_its_losses_along(server: Server) -> None:
    async with running(server) as h:
        session_id = await h.session()
        await custom_loss(h, session_id)
        await h.control.finish_session(session_id, "success", None)
        await h.control._journal.write(())
        assert not h.control._ledger.read()  # type: ignore[union-attr]


async def test_the_last_request_of_a_finished_session_is_not_lost_with_its_engine(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    gate, start = asyncio.Event(), h.engine.start

    async def slow_start() -> Any:
        await gate.wait()
        return await start()

    again: Callable[[], Awaitable[Any]] = slow_start
    h.engine.start = again  # type: ignore[method-assign]
    h.engine.pause()
    last = h.submit(forward_backward(model_id, 1))
    await h.control.durable(last)
    await h.settle()
    await h.control.finish_session(session_id, "success", None)
    h.engine.die()
    await h.settle()
    await h.control.sweep()
    gate.set()
    h.engine.resume()
    await h.result(last)
    await h.control.close()
