"""What an engine does beside its passes: files that are written and read by threads of their own.

The adapter or the snapshot that is written or read is held meanwhile where it must not change: what is asked of it
waits, in its order, and what is asked of others goes on.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

OutcomeT = TypeVar("OutcomeT")
ItemT = TypeVar("ItemT")

_POLL_S = 0.002
"""How long an engine with nothing else to do waits here before it looks for new operations."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job(Generic[OutcomeT]):
    done: Future[Callable[[], OutcomeT]]
    """What is left to do in the engine's own thread, with the outcome."""
    holds: str | None


class Aside(Generic[OutcomeT, ItemT]):
    """One thread that writes, one that reads and one for what takes long; everything else here is the engine's
    thread's."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot-writer")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot-reader")
        self._converter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-converter")
        self._jobs: dict[int, _Job[OutcomeT]] = {}
        self._held: dict[str, int] = defaultdict(int)
        """How many jobs hold each adapter."""
        self._waiting: dict[str, deque[ItemT]] = defaultdict(deque)

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def write(self, ticket: int, work: Callable[[], OutcomeT], *, holds: str | None = None) -> None:
        """`work` must touch nothing that later operations touch, but for the adapter that it `holds`."""

        self._add(ticket, self._writer.submit(_finished, work), holds)

    def convert(self, ticket: int, work: Callable[[], OutcomeT]) -> None:
        """From files to files: `work` touches nothing of the engine's. Nobody's writing waits for it."""
        self._add(ticket, self._converter.submit(_finished, work), None)

    def read(self, ticket: int, work: Callable[[], Callable[[], OutcomeT]], *, holds: str) -> None:
        """`work` returns what is left to do in the engine's thread."""
        self._add(ticket, self._reader.submit(work), holds)

    def _add(self, ticket: int, done: Future[Callable[[], OutcomeT]], holds: str | None) -> None:
        self._jobs[ticket] = _Job(done, holds)
        if holds is not None:
            self._held[holds] += 1

    def keeps_waiting(self, name: str | None, item: ItemT) -> bool:
        """Whether `item` is asked of what is held; then it is kept here until that is free."""
        if name is None or name not in self._held:
            return False
        self._waiting[name].append(item)
        return True

    def has_waiting(self, name: str) -> bool:
        """Whether something that was asked of it is kept here."""
        return name in self._waiting

    def wait(self) -> None:
        wait([job.done for job in self._jobs.values()], timeout=_POLL_S)

    def collect(self) -> tuple[list[tuple[int, OutcomeT]], list[ItemT]]:
        """What is finished, by ticket, and the items that need wait no longer, in order."""
        outcomes: list[tuple[int, OutcomeT]] = []
        freed: list[ItemT] = []
        for ticket in [ticket for ticket, job in self._jobs.items() if job.done.done()]:
            job = self._jobs.pop(ticket)
            outcomes.append((ticket, job.done.result()()))
            if job.holds is not None:
                freed.extend(self._release(job.holds))
        return outcomes, freed

    def _release(self, name: str) -> Iterable[ItemT]:
        self._held[name] -= 1
        if self._held[name] > 0:
            return ()
        del self._held[name]
        return self._waiting.pop(name, ())


def _finished(work: Callable[[], OutcomeT]) -> Callable[[], OutcomeT]:
    outcome = work()
    return lambda: outcome
