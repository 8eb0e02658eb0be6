"""A limit on bytes under way at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
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
