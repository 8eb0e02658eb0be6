"""Which requests of a group have ended, as a log that is read from a cursor: many requests, one open poll."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeAlias

Group: TypeAlias = tuple[str, int]
"""A sampler's id, and the number of the client that samples through it."""


@dataclass(frozen=True, slots=True)
class Completion:
    request_id: str
    num_bytes: int
    """Roughly, of the encoded result."""
    has_failed: bool


@dataclass(slots=True)
class _Log:
    entries: OrderedDict[str, tuple[int, Completion]] = field(default_factory=OrderedDict)
    """By request id, oldest first, each with its number."""
    last: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced, with every entry."""


class Completions:
    """Entries are numbered in each group, after what `first` says when it is first heard of.

    One is kept until a reader's cursor has passed it or its result has expired; numbers are never given out again.
    """

    def __init__(self, first: Callable[[], int] = lambda: 0) -> None:
        self._first = first
        self._logs: dict[Group, _Log] = {}

    def __len__(self) -> int:
        return sum(len(log.entries) for log in self._logs.values())

    def add(self, group: Group, completion: Completion) -> None:
        log = self._log(group)
        log.last += 1
        log.entries[completion.request_id] = (log.last, completion)
        log.changed.set()
        log.changed = asyncio.Event()

    def _log(self, group: Group) -> _Log:
        if group not in self._logs:
            self._logs[group] = _Log(last=self._first())
        return self._logs[group]

    def drop(self, group: Group, request_id: str) -> None:
        """Its result is no longer kept."""
        if (log := self._logs.get(group)) is not None:
            log.entries.pop(request_id, None)

    def forget(self, sampler_ids: Collection[str]) -> None:
        for group in [group for group in self._logs if group[0] in sampler_ids]:
            del self._logs[group]

    async def read(self, group: Group, cursor: int, timeout_s: float) -> tuple[list[Completion], int]:
        """What ended after `cursor`, and the next cursor; waits for at most `timeout_s` if there is nothing.

        What `cursor` has passed is forgotten. A cursor of 0 starts from the oldest entry that is left.
        """
        log = self._log(group)
        while log.entries and next(iter(log.entries.values()))[0] <= cursor:
            log.entries.popitem(last=False)
        if not log.entries and timeout_s > 0:
            try:
                async with asyncio.timeout(timeout_s):
                    await log.changed.wait()
            except TimeoutError:
                pass  # answered below: nothing new
        found = [completion for _, completion in log.entries.values()]
        return found, log.last if found else min(cursor, log.last)
