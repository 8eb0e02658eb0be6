"""Hours of clients, crashes and lost messages in seconds. P1: what was acknowledged is known. P2, P3: every effect
once, in order. P7: everything ends."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.simulation import (
    SimulatedLedger,
    SimulatedRegistry,
    Unreachable,
    VirtualClock,
    Wire,
    run_virtually,
)
from tests.unit.control.harness import Harness, draw, forward_backward, optim
from tests.unit.control.restarts import Server
from tinsmith.control import service
from tinsmith.control.errors import NotTaken
from tinsmith.control.futures import Outcome
from tinsmith.control.requests import NewSession, SaveState, Submission
from tinsmith.runtime.fake import FakeEngine

FIRST_SEED = int(os.environ.get("SEED", "20261122"))
NUM_WORLDS = 60 if "FAULTS" in os.environ else 3
NUM_CLIENTS, NUM_STEPS = 3, 12
END_S = 4 * 3600.0
"""Of virtual time, by which everything must have ended."""


class World:
    def __init__(self, folder: Path, seed: int, *, loss: float, crashes: bool) -> None:
        self.chance = random.Random(seed)
        self.wire = Wire(self.chance, loss)
        self._crashes = crashes
        self.num_crashes: Counter[str] = Counter()
        self._server = Server(
            folder,
            sweep_interval_s=1.0,
            snapshot_requests=self.chance.choice([5, 20, 1000]),
            health={"is_on": False},
            max_engine_restarts=1000,
            max_strikes=100,
        )
        self._server.clock = VirtualClock()  # type: ignore[assignment]

    async def run(self) -> list[list[Any]]:
        """What every client got."""
        async with asyncio.timeout(END_S):
            self.wire.server = await self._server.start(FakeEngine(delay_s=0.01))
            clients = [asyncio.create_task(self._client(number)) for number in range(NUM_CLIENTS)]
            nature = asyncio.create_task(self._nature()) if self._crashes else None
            results = await asyncio.gather(*clients)
            if nature is not None:
                nature.cancel()
                with suppress(asyncio.CancelledError):
                    await nature
            if self.wire.server is not None:
                await self._server.kill(self.wire.server)
            return results

    async def _nature(self) -> None:
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 1.0))
            h: Harness = self.wire.server
            victim = self.chance.choice(["engine", "server"])
            self.num_crashes[victim] += 1
            if victim == "engine":
                h.engine.die("killed by SIGKILL")
                h.control._check_engines()
                continue
            self.wire.server = None
            await asyncio.shield(self._restart(h))

    async def _restart(self, h: Harness) -> None:
        await self._server.kill(h)
        await asyncio.sleep(self.chance.uniform(0.1, 5.0))
        self.wire.server = await self._server.start(FakeEngine(delay_s=0.01))

    # ---- a client ----

    async def _client(self, number: int) -> list[Any]:
        insist = self.wire.insist
        session_id = await insist(lambda h: h.control.create_session(NewSession(timeout_s=3600)))
        created = await self._accepted(lambda h: h.create(session_id))
        model_id = created.model_id
        assert await self._result(created) == model_id
        requests: list[Callable[[Harness], Awaitable[Submission]]] = []
        for step in range(NUM_STEPS):
            requests += [_submit(forward_backward(model_id, 3 * step + 1, first=10 * number + step))]
            requests += [_submit(optim(model_id, 3 * step + 2, learning_rate=0.1))]
            requests += [_submit(SaveState(model_id=model_id, seq_id=3 * step + 3, name=f"s{step}"))]
        results = await asyncio.gather(*(self._ask(request) for request in requests))
        sampler_id = await insist(lambda h: h.control.create_sampling_session(session_id, 0, "tinsmith/fake", None))
        drawn = await asyncio.gather(*(self._ask(_sample(sampler_id, index)) for index in range(3)))
        tokens = [response.sequences[0].tokens for response in drawn]
        losses = [result.metrics["loss:sum"] for result in results[::3]]
        norms = [result["grad_norm:mean"] for result in results[1::3]]
        return [losses, norms, tokens, len(results[2::3])]

    async def _ask(self, request: Callable[[Harness], Awaitable[Submission]]) -> Any:
        await asyncio.sleep(self.chance.uniform(0, 2.0))  # so that they arrive in any order
        return await self._result(await self._accepted(request))

    async def _accepted(self, request: Callable[[Harness], Awaitable[Submission]]) -> Submission:
        async def durable(h: Harness) -> Submission:
            try:
                receipt = await request(h)
                async with asyncio.timeout(5):
                    await h.control.durable(receipt)
            except (NotTaken, TimeoutError) as error:
                raise Unreachable from error
            return receipt

        submission: Submission = await self.wire.insist(durable)
        return submission

    async def _result(self, receipt: Submission) -> Any:
        """Raises `NotFound` or `FutureExpired` if what was acknowledged is not known any more."""
        while True:
            outcome = await self.wire.insist(lambda h: h.control.wait_future(receipt.request_id, 1.0))
            if isinstance(outcome, Outcome):
                if isinstance(outcome.error, NotTaken) or "stopped" in str(outcome.error):
                    continue
                assert outcome.error is None, outcome.error
                return outcome.result


def _submit(request: Any) -> Callable[[Harness], Awaitable[Submission]]:
    async def submit(h: Harness) -> Submission:
        return h.submit(request)

    return submit


def _sample(sampler_id: str, index: int) -> Callable[[Harness], Awaitable[Submission]]:
    async def submit(h: Harness) -> Submission:
        return h.sample(draw(sampler_id, index))

    return submit


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "Ledger", SimulatedLedger)
    monkeypatch.setattr(service, "Registry", SimulatedRegistry)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("simulated")
def test_worlds_with_crashes_end_as_worlds_without(tmp_path: Path) -> None:
    expected = run_virtually(World(tmp_path / "calm", 0, loss=0.0, crashes=False).run)
    crashes: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_WORLDS):
        SimulatedLedger.chance = random.Random(seed)
        print(f"SEED={seed}")
        world = World(tmp_path / str(seed), seed, loss=0.1, crashes=True)
        try:
            assert run_virtually(world.run) == expected
            crashes.update(world.num_crashes)
        except BaseException as error:
            error.add_note(f"SEED={seed}")
            raise
    assert min(crashes["server"], crashes["engine"]) >= NUM_WORLDS
