"""The order of one model's requests: by sequence number, whatever the order of arrival. Pure: time is passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from tinsmith.types.errors import PayloadConflict, UserError

ItemT = TypeVar("ItemT")

_REMEMBERED_GAPS = 64


class SeqConsumed(UserError):
    """A sequence number came again, or came after the queue had given it up."""


@dataclass(frozen=True, slots=True)
class Gap(Generic[ItemT]):
    """Requests given up, in order, because `missing` never came."""

    missing: int
    waited_s: float
    items: tuple[ItemT, ...]


class ModelQueue(Generic[ItemT]):
    """Requests wait here until all numbers before theirs have come.

    Every number is consumed exactly once: taken in order, or given up with a gap.
    """

    def __init__(self, *, first_seq: int = 0) -> None:
        self._next = first_seq
        self._waiting: dict[int, ItemT] = {}
        self._highest = first_seq - 1
        self._gap_since: float | None = None
        self._given_up: deque[range] = deque(maxlen=_REMEMBERED_GAPS)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def next_seq(self) -> int:
        """The number that is taken next."""
        return self._next

    @property
    def free_seq(self) -> int:
        """The lowest number above all that have come."""
        return self._highest + 1

    @property
    def missing_seq(self) -> int | None:
        """The number that others wait for, if it has not come."""
        return self._next if self._waiting and self._next not in self._waiting else None

    def fills_gap(self, seq: int) -> bool:
        return seq == self.missing_seq

    def check(self, seq: int) -> None:
        """Raises `SeqConsumed` for a number below `next_seq`, `PayloadConflict` for one that is waiting."""
        if seq < self._next:
            if any(seq in gap for gap in self._given_up):
                raise SeqConsumed(f"seq {seq} came too late: the requests after it had waited and were given up")
            raise SeqConsumed(f"seq {seq} was already used and its result is no longer kept; the next is {self._next}")
        if seq in self._waiting:
            raise PayloadConflict(f"seq {seq} was already used with another payload")

    def push(self, seq: int, item: ItemT, now: float) -> None:
        """Raises as `check`."""
        self.check(seq)
        self._waiting[seq] = item
        self._highest = max(self._highest, seq)
        self._watch_gap(now)

    def head(self) -> ItemT | None:
        """The request whose turn it is, if it has come."""
        return self._waiting.get(self._next)

    def run(self) -> Iterator[ItemT]:
        """The requests that have come without a gap, in order."""
        seq = self._next
        while seq in self._waiting:
            yield self._waiting[seq]
            seq += 1

    def pop(self, now: float) -> ItemT:
        """Take the head. Raises `KeyError` if it has not come."""
        item = self._waiting.pop(self._next)
        self._next += 1
        self._watch_gap(now)
        return item

    def give_up_gap(self, now: float, timeout_s: float) -> Gap[ItemT] | None:
        """If a number has been missed for `timeout_s`: everything that waits, and go on after it."""
        if self._gap_since is None or now - self._gap_since < timeout_s:
            return None
        missing, waited_s = self._next, now - self._gap_since
        return Gap(missing, waited_s, self.clear())

    def clear(self) -> tuple[ItemT, ...]:
        """Give up everything that waits; the numbers up to the highest that came are consumed."""
        items = tuple(self._waiting[seq] for seq in sorted(self._waiting))
        if self._waiting:
            self._given_up.append(range(self._next, self._highest + 1))
        self._waiting.clear()
        self._next = self._highest + 1
        self._gap_since = None
        return items

    def withdraw(self, seq: int, now: float) -> None:
        """As if it had never come; it may come again, and what came after it waits no longer than for any other."""
        self._waiting.pop(seq, None)
        self._highest = max([self._next - 1, *self._waiting])
        self._watch_gap(now)

    def wait_anew(self, now: float) -> None:
        """What is missed is missed from now on."""
        if self._gap_since is not None:
            self._gap_since = now

    def rewind(self, first_seq: int, items: Mapping[int, ItemT], now: float) -> None:
        """Go back to `first_seq`: `items` were taken from there on, and wait again."""
        self._next = first_seq
        self._waiting.update(items)
        self._highest = max([self._highest, first_seq - 1, *items])
        self._gap_since = None
        self._watch_gap(now)

    def _watch_gap(self, now: float) -> None:
        if self.missing_seq is None:
            self._gap_since = None
        elif self._gap_since is None:
            self._gap_since = now
