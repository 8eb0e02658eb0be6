"""Where the events of one client go, and the measuring of one operation."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from tinsmith.client.errors import TinkerError
from tinsmith.types.events import Event, EventSink, TracingSink

T = TypeVar("T")
logger = logging.getLogger("tinsmith.client")


class Events:
    """Hands events to sinks. Without a sink `emit` does nothing and costs next to nothing."""

    def __init__(self, sinks: Iterable[EventSink] = (), **common: Any) -> None:
        self._sinks = list(sinks)
        self._tracers = [sink for sink in self._sinks if isinstance(sink, TracingSink)]
        self._common = common
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def add(self, sink: EventSink) -> None:
        self._sinks.append(sink)
        if isinstance(sink, TracingSink):
            self._tracers.append(sink)

    def emit(self, name: str, /, **fields: Any) -> None:
        """Tell every sink. A sink that fails is dropped, with a warning in the log."""
        if not self._sinks:
            return
        event = Event(name=name, time=time.time(), fields={**self._common, **_plain(fields)})
        with self._lock:
            for sink in list(self._sinks):
                try:
                    sink.write(event)
                except Exception as error:  # noqa: BLE001  a boundary: telemetry must not stop training
                    self._drop(sink, error)

    def watch(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        span: Span,
        summary: Callable[[T], Mapping[str, Any]] | None = None,
    ) -> Coroutine[Any, Any, T]:
        """What `work` gives, its end told as `operation.finished` or `operation.failed`."""
        return self._watched(work, span, summary) if self._sinks else work()

    async def _watched(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        span: Span,
        summary: Callable[[T], Mapping[str, Any]] | None,
    ) -> T:
        with ExitStack() as traced:
            for sink in list(self._tracers):
                age_s = time.monotonic() - span.called_at
                try:
                    traced.enter_context(sink.operation(span.operation, span.fields, age_s))
                except Exception as error:  # noqa: BLE001  a boundary, as in `emit`
                    self._drop(sink, error)
            self.emit("operation.started", **span.fields)
            try:
                result = await work()
            except BaseException as error:
                self.emit("operation.failed", **(span.measured() | describe(error)))
                raise
            more = {} if summary is None else dict(summary(result))
            known = {key: value for key, value in more.items() if value is not None}
            self.emit("operation.finished", **(span.measured() | known))
            return result

    def headers(self) -> dict[str, str]:
        """What a request of the present operation carries beside its own headers."""
        found: dict[str, str] = {}
        for sink in list(self._tracers):
            try:
                found |= sink.headers()
            except Exception as error:  # noqa: BLE001  a boundary, as in `emit`
                self._drop(sink, error)
        return found

    def _drop(self, sink: EventSink, error: Exception) -> None:
        self._sinks = [one for one in self._sinks if one is not sink]
        self._tracers = [one for one in self._tracers if one is not sink]
        logger.warning("telemetry to %r ends, it failed: %s: %s", sink, type(error).__name__, error)


class Span:
    """One operation under way: what it is, and when it was called, sent and acknowledged."""

    __slots__ = ("acknowledged_at", "called_at", "fields", "sent_at")

    def __init__(self, operation: str, **fields: Any) -> None:
        self.fields: dict[str, Any] = {"operation": operation, **fields}
        self.called_at = time.monotonic()
        self.sent_at: float | None = None
        self.acknowledged_at: float | None = None

    @property
    def operation(self) -> str:
        return str(self.fields["operation"])

    def sent(self) -> None:
        self.sent_at = time.monotonic()

    def acknowledged(self) -> None:
        self.acknowledged_at = time.monotonic()

    def measured(self) -> dict[str, Any]:
        """The fields and what is known by now, in seconds: `wall_s` in all; before sending; sending; on the server."""
        now = time.monotonic()
        sent = self.sent_at if self.sent_at is not None else now
        known = self.acknowledged_at if self.acknowledged_at is not None else now
        return {
            **self.fields,
            "wall_s": now - self.called_at,
            "turn_s": sent - self.called_at,
            "submit_s": known - sent,
            "server_s": now - known,
        }


def describe(error: BaseException) -> dict[str, Any]:
    """An error as fields of an event."""
    if isinstance(error, TinkerError):
        return {
            "error": error.message,
            "error_type": error.type,
            "status": error.status,
            "category": str(error.category),
            "request_id": error.request_id,
            "retryable": error.retryable,
        }
    return {"error": str(error), "error_type": type(error).__name__}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is not known, and with numbers that JSON has."""
    return {
        key: (str(value) if isinstance(value, float) and not math.isfinite(value) else value)
        for key, value in fields.items()
        if value is not None
    }
