"""Work that is done once however often it is asked for: what a client sends again finds what it sent before."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from tinsmith.types.errors import PayloadConflict

T = TypeVar("T")

MAX_REMEMBERED = 1000
"""Results that a repeated request finds again."""


class Once(Generic[T]):
    def __init__(self, what: str) -> None:
        """`what` is asked for, in words for an error."""
        self._what = what
        self._known: OrderedDict[tuple[str, str], tuple[Hashable, asyncio.Task[T]]] = OrderedDict()

    async def do(self, owner: str, key: str | None, order: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `work` gives; for the same order under the owner's same key what it gave before. A failure is not kept.

        Raises `PayloadConflict` for another order under the same key, and what `work` raises.
        """
        if key is None:
            return await work()
        remembered = (owner, key)
        if remembered in self._known:
            known, task = self._known[remembered]
            if known != order:
                raise PayloadConflict(f"idempotency key {key!r} was already used for another {self._what}")
        else:
            task = asyncio.create_task(work())
            self._known[remembered] = (order, task)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        try:
            return await asyncio.shield(task)
        except Exception:
            self._known.pop(remembered, None)
            raise
