"""Who may send next: sequence numbers and turns of one training client."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType


class Turn:
    """One call's place in the line. `async with turn` waits until the calls before it have sent all they will send.

    Leaving the block lets the next call go, however it is left. A turn that is given up while it waits does not let
    the next one overtake those before it.
    """

    __slots__ = ("_line", "is_open", "is_over", "may_send", "next", "seq_ids")

    def __init__(self, line: SubmitLine, seq_ids: range) -> None:
        self.seq_ids = seq_ids
        self.may_send = asyncio.Event()
        self.is_open = False
        self.is_over = False
        self.next: Turn | None = None
        self._line = line

    async def __aenter__(self) -> Turn:
        try:
            await self.may_send.wait()
        except BaseException:
            self._line.end(self)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.end(self)


class SubmitLine:
    """Hands out consecutive sequence numbers, from 1, and turns, in the order of the calls, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = Turn(self, range(1, 1))
        self._last.is_open = self._last.is_over = True

    def reserve(self, num_seq_ids: int) -> Turn:
        with self._lock:
            first = self._last.seq_ids.stop
            turn = Turn(self, range(first, first + num_seq_ids))
            if self._last.is_open and self._last.is_over:
                self._open(turn)
            self._last.next = turn
            self._last = turn
            return turn

    def end(self, turn: Turn) -> None:
        """On the event loop's thread only."""
        with self._lock:
            turn.is_over = True
            following: Turn | None = turn
            while following is not None and following.is_open and following.is_over:
                following = following.next
                if following is not None and not following.is_open:
                    self._open(following)

    @staticmethod
    def _open(turn: Turn) -> None:
        turn.is_open = True
        turn.may_send.set()
