"""Limits on what is under way at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class ByteBudget:
    """First come, first served. What is larger than the whole budget goes alone. Use on one event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, num_bytes: int) -> AsyncIterator[None]:
        share = min(num_bytes, self._limit)
        await self._acquire(share)
        try:
            yield
        finally:
            self._used -= share
            self._admit()

    async def _acquire(self, share: int) -> None:
        if not self._waiting and self._used + share <= self._limit:
            self._used += share
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (share, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._used -= share
            elif entry in self._waiting:
                self._waiting.remove(entry)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting and self._used + self._waiting[0][0] <= self._limit:
            share, turn = self._waiting.popleft()
            if not turn.done():
                self._used += share
                turn.set_result(None)


THROTTLED_S = 10.0
"""So long after the server had no room, samples are offered carefully."""
THROTTLED_AT_ONCE = 10
THROTTLED_COST = 20
"""What a byte of a prompt counts for then."""


class SampleGate:
    """How many samples may be on their way to the server: by the bytes of their prompts, and few after a refusal.

    Shared by all sampling clients of a connection. Use on one event loop only.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes = ByteBudget(limit)
        self._few = asyncio.Semaphore(THROTTLED_AT_ONCE)
        self._clock = clock
        self._throttled_until = float("-inf")

    @property
    def is_throttled(self) -> bool:
        return self._clock() < self._throttled_until

    def refused(self) -> None:
        """The server had no room for a sample."""
        self._throttled_until = self._clock() + THROTTLED_S

    @asynccontextmanager
    async def offer(self, num_bytes: int) -> AsyncIterator[None]:
        if not self.is_throttled:
            async with self._bytes.reserve(num_bytes):
                yield
            return
        async with self._few, self._bytes.reserve(num_bytes * THROTTLED_COST):
            yield
