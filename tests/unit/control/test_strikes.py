"""A request that kills its engine again and again is found and failed, whoever is restarted in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.control.harness import draw, forward_backward, optim
from tests.unit.control.restarts import Server, results, running, train
from tinsmith.runtime.fake import FakeEngine
from tinsmith.types import LoraConfig, ModelInput
from tinsmith.types.errors import EngineDied, NotFound, ServerError
from tinsmith.types.operations import CreateAdapter, LoadAdapter, Sample, TrainItem

pytestmark = pytest.mark.anyio

POISON = 66


def deadly_engine() -> FakeEngine:
    """It dies whenever it trains on, or continues, a text that begins with the poison."""
    engine = FakeEngine()
    train_item, sample = engine._handlers[TrainItem], engine._handlers[Sample]

    def die_if(is_poison: bool, execute: Callable[[Any], Any], operation: Any) -> Any:
        if not is_poison:
            return execute(operation)
        engine.die("killed by SIGSEGV")
        raise EngineDied("killed by SIGSEGV")

    engine._handlers[TrainItem] = lambda o: die_if(o.data[0].model_input.to_ints()[0] == POISON, train_item, o)
    engine._handlers[Sample] = lambda o: die_if(int(o.prompt[0]) == POISON, sample, o)
    return engine


def poisonous(sampler_id: str, seq_id: int) -> Any:
    return draw(sampler_id, seq_id, prompt=ModelInput.from_ints([POISON, 1, 2]))


async def test_a_sample_that_was_given_up_is_not_drawn_by_a_later_server(server: Server) -> None:
    h = await server.start(deadly_engine())
    session_id = await h.session()
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    poison = h.sample(poisonous(sampler_id, 1))
    assert "died 3 times" in str(await h.error(poison))
    innocent = h.sample(draw(sampler_id, 2))
    await h.result(innocent)
    await server.kill(h)
    engine = deadly_engine()
    h = await server.start(engine)
    assert "died 3 times" in str(await h.error(poison))
    await h.result(innocent)
    assert engine.num_starts == 1
    await h.control.close()


async def test_strikes_are_counted_over_restarts_of_the_server(server: Server) -> None:
    """The server dies with its engine every time; the fourth knows whom to blame."""
    h = await server.start(deadly_engine())
    model_id, innocent = await h.model(), await h.model()
    harmless = await train(h, innocent, 1, 2)
    await results(h, harmless)
    poison = h.submit(forward_backward(model_id, 1, first=POISON))
    await h.control.durable(poison)
    num_deaths = 0
    for _ in range(8):
        outcome = None
        for _ in range(200):
            await h.settle()
            outcome = h.control._futures.ended(poison.request_id)
            if outcome is not None or h.engine.num_starts > 1:
                break
        if outcome is not None:
            break
        num_deaths += 1
        await server.kill(h)
        h = await server.start(deadly_engine())
    assert "died 3 times" in str(await h.error(poison))
    assert num_deaths <= 3
    await results(h, await train(h, innocent, 5, 1))
    await h.control.close()


async def test_samples_beside_a_deadly_one_are_not_blamed_by_a_later_server(server: Server) -> None:
    h = await server.start(deadly_engine())
    session_id = await h.session()
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    h.engine.pause()
    innocent = [h.sample(draw(sampler_id, n)) for n in (1, 2)]
    poison = h.sample(poisonous(sampler_id, 3))
    for receipt in (*innocent, poison):
        await h.control.durable(receipt)
    await h.settle()
    h.engine.die("killed by SIGSEGV")  # everybody is there
    h.control._check_engines()
    await h.control._ledger.flush()  # type: ignore[union-attr]
    await server.kill(h)
    h = await server.start(deadly_engine())
    for receipt in innocent:
        await h.result(receipt)
    assert "died 3 times" in str(await h.error(poison))
    await h.control.close()


async def test_an_engine_that_dies_often_and_gets_on_is_started_again(server: Server) -> None:
    """Only deaths without any result in between count against it."""
    server.settings["max_engine_restarts"] = 2
    async with running(server) as h:
        model_id = await h.model()
        for seq in range(1, 20, 2):
            await results(h, await train(h, model_id, seq, 1))
            h.engine.die("killed by SIGKILL")
            h.control._check_engines()
        await results(h, await train(h, model_id, 21, 1))
        assert h.engine.num_starts == 11


async def test_a_model_whose_creation_kills_the_engine_is_given_up(server: Server) -> None:
    engine = FakeEngine()
    create = engine._handlers[CreateAdapter]

    def deadly(operation: CreateAdapter) -> Any:
        if operation.lora.seed == POISON:
            engine.die("killed by SIGSEGV")
            raise EngineDied("killed by SIGSEGV")
        return create(operation)

    engine._handlers[CreateAdapter] = deadly
    h = await server.start(engine)
    innocent = await h.model()
    poison = await h.create(await h.session(), lora_config=LoraConfig(rank=4, seed=POISON))
    assert "died 3 times" in str(await h.error(poison))
    await results(h, await train(h, innocent, 1, 1))
    assert engine.num_starts == 4
    await server.kill(h)
    async with running(server) as h:
        await results(h, await train(h, innocent, 3, 1))
        assert "died 3 times" in str(await h.error(poison))
        with pytest.raises(NotFound):
            h.control.model_info(str(poison.model_id))


async def test_a_suspect_whose_adapter_cannot_be_read_holds_nobody_up(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    sampler_id = await h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None)
    await results(h, await train(h, model_id, 1, 1))
    h.clock.advance(61)
    await h.control.sweep()
    await h.control._snapshots.drain()
    h.engine.pause()
    request, sample = h.submit(forward_backward(model_id, 3)), h.sample(draw(sampler_id))
    await h.control.durable(request)
    await h.control.durable(sample)
    await h.settle()
    h.engine.fail_next(LoadAdapter, ServerError("out of memory"))
    h.engine.die("killed by SIGKILL")
    h.control._check_engines()
    h.engine.resume()
    assert "out of memory" in str(await h.error(request))
    await h.result(sample)
    await h.result(h.submit(optim(model_id, 4)))
    await h.control.close()
