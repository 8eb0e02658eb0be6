"""Who is told what control does, as it happens: for figures and traces. Nothing here waits, and nothing may raise."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from tinsmith.control.futures import RequestSpan, RequestType
from tinsmith.control.identity import Clock
from tinsmith.control.usage import TokenKind
from tinsmith.types.errors import TinsmithError
from tinsmith.types.results import SampleResponse


class Observer(Protocol):
    """Called in the event loop, but for `committed`, which is called in the ledger's thread."""

    def request_opened(
        self, request_id: str, request_type: RequestType, session_id: str | None, subject: str | None
    ) -> None:
        """In the context of whoever asked."""
        ...

    def request_ended(self, span: RequestSpan) -> None: ...

    def tokens(self, kind: TokenKind, base_model: str, count: int) -> None:
        """Computed for a request that succeeded."""
        ...

    def committed(self, num_writes: int, seconds: float) -> None:
        """The ledger has written so many changes in one transaction."""
        ...


class Observers:
    """Hands everything on to those that were added."""

    def __init__(self) -> None:
        self._all: list[Observer] = []

    def add(self, observer: Observer) -> None:
        self._all.append(observer)

    def request_opened(
        self, request_id: str, request_type: RequestType, session_id: str | None, subject: str | None
    ) -> None:
        for observer in self._all:
            observer.request_opened(request_id, request_type, session_id, subject)

    def request_ended(self, span: RequestSpan) -> None:
        for observer in self._all:
            observer.request_ended(span)

    def tokens(self, kind: TokenKind, base_model: str, count: int) -> None:
        for observer in self._all:
            observer.tokens(kind, base_model, count)

    def committed(self, num_writes: int, seconds: float) -> None:
        for observer in self._all:
            observer.committed(num_writes, seconds)


def both(first: Callable[[RequestSpan], None], second: Callable[[RequestSpan], None]) -> Callable[[RequestSpan], None]:
    def told(span: RequestSpan) -> None:
        first(span)
        second(span)

    return told


async def observed_draw(
    observers: Observers, clock: Clock, sampler_id: str, drawing: Coroutine[Any, Any, SampleResponse]
) -> SampleResponse:
    """A sample that a caller waits for in place: told as a request without an id."""
    opened_at, error = clock.time(), None
    try:
        return await drawing
    except TinsmithError as failure:
        error = failure
        raise
    finally:
        span = RequestSpan(
            request_id="",
            request_type="Sample",
            session_id="",
            subject=sampler_id,
            opened_at=opened_at,
            started_at=opened_at,
            finished_at=clock.time(),
            error=None if error is None else error.message,
            category=None if error is None else error.category,
        )
        observers.request_ended(span)
