"""The one task that ends what has run out of time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

logger = logging.getLogger(__name__)

SLOW_EVERY = 30
"""Rounds of quick chores for one round of those that touch the disk."""


class Janitor:
    def __init__(
        self,
        *,
        quick: Sequence[Callable[[], object]],
        slow: Sequence[Callable[[], Awaitable[object]]],
        interval_s: float,
    ) -> None:
        self._quick = quick
        self._slow = slow
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def sweep(self) -> None:
        """All chores once. One that fails is logged and does not keep the others from their turn."""
        self._sweep_quick()
        await self._sweep_slow()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        round_number = 0
        while True:
            await asyncio.sleep(self._interval_s)
            self._sweep_quick()
            round_number += 1
            if round_number % SLOW_EVERY == 0:
                await self._sweep_slow()

    def _sweep_quick(self) -> None:
        for chore in self._quick:
            try:
                chore()
            except Exception:
                logger.exception("the janitor could not do a chore")

    async def _sweep_slow(self) -> None:
        for chore in self._slow:
            try:
                await chore()
            except Exception:
                logger.exception("the janitor could not do a chore")
