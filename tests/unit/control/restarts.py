"""A control plane that can be killed and started again, over a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.unit.control.harness import CountedIds, Harness, ManualClock, forward_backward, optim
from tinsmith.control.requests import Submission
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FakeEngine


class Server:
    """A server that can be killed and started again over the same folder."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        self.data_dir = data_dir
        self.settings = settings
        self.clock = ManualClock()

    async def start(self, engine: FakeEngine | None = None) -> Harness:
        values = {
            "data_dir": self.data_dir,
            "ledger": True,
            "sweep_interval_s": 3600.0,
            "engine_backoff_s": 0.0,
            **self.settings,
        }
        engine = engine or FakeEngine()
        control = Control(ControlSettings(**values), [engine], clock=self.clock, ids=CountedIds)
        await control.start()
        return Harness(control, engine, self.clock)

    async def kill(self, h: Harness) -> None:
        """Nothing is said good-bye to; only what a process takes with it is freed."""
        control = h.control
        control._state = "killed"
        assert control._ledger is not None
        assert control._supervisor is not None
        await asyncio.to_thread(control._ledger.close)
        await control._supervisor.close()
        await control._janitor.close()
        await control._health.close()
        await control.accounts.close()
        for slot in control._engines:
            control._training.scheduler(slot).is_held = True
            slot.is_recovering = True
            slot.on_death = lambda slot: None
        await h.engine.close()
        await control._paging.close()
        await control._training.drain()
        await control._sampling.close()
        await control._jobs.close()
        control._training.close()
        await asyncio.to_thread(control._registry.close)
        control._lock.release()


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[Harness]:
    h = await server.start()
    try:
        yield h
    finally:
        await h.control.close()


async def train(h: Harness, model_id: str, first_seq: int, steps: int) -> list[Submission]:
    receipts = []
    for seq in range(first_seq, first_seq + 2 * steps, 2):
        receipts.append(h.submit(forward_backward(model_id, seq, first=seq)))
        receipts.append(h.submit(optim(model_id, seq + 1)))
    for receipt in receipts:
        await h.control.durable(receipt)
    return receipts


async def results(h: Harness, receipts: list[Submission]) -> list[Any]:
    return [await h.result(receipt) for receipt in receipts]
