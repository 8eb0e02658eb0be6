"""What the requests of a session did when, as a trace that Perfetto and Chrome's viewer open.

Kept in memory, in bounds: of each session the newest requests, of all sessions the newest sessions.
Format: the "Trace Event Format" of Chrome's tracing tools, nestable asynchronous events.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

from tinsmith.control.futures import RequestSpan

MAX_SPANS_PER_SESSION = 20_000
MAX_SPANS = 400_000

_MICROSECONDS = 1_000_000


class TraceLog:
    def __init__(self, *, max_per_session: int = MAX_SPANS_PER_SESSION, max_total: int = MAX_SPANS) -> None:
        self._max_per_session = max_per_session
        self._max_total = max_total
        self._spans: OrderedDict[str, deque[RequestSpan]] = OrderedDict()
        self._total = 0

    def add(self, span: RequestSpan) -> None:
        """Requests of no session are in nobody's trace."""
        if not span.session_id:
            return
        spans = self._spans.setdefault(span.session_id, deque())
        self._spans.move_to_end(span.session_id)
        spans.append(span)
        self._total += 1
        if len(spans) > self._max_per_session:
            spans.popleft()
            self._total -= 1
        while self._total > self._max_total and len(self._spans) > 1:
            self._total -= len(self._spans.popitem(last=False)[1])

    def spans(self, session_id: str) -> list[RequestSpan]:
        return list(self._spans.get(session_id, ()))


def trace_document(session_id: str, spans: Iterable[RequestSpan], now: float) -> dict[str, Any]:
    """One row of the trace per model and sampler; a request is a slice that holds its wait and its work."""
    events: list[dict[str, Any]] = []
    rows: dict[str, int] = {}
    for span in sorted(spans, key=lambda span: span.opened_at):
        if span.subject not in rows:
            rows[span.subject] = len(rows) + 1
            events.append(_row_name(rows[span.subject], span.subject or f"session {session_id}"))
        events.extend(_slices(span, rows[span.subject], now))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"session_id": session_id}}


def _row_name(row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": row, "args": {"name": name}}


def _slices(span: RequestSpan, row: int, now: float) -> Iterator[dict[str, Any]]:
    end = now if span.finished_at is None else span.finished_at
    began = end if span.started_at is None else min(span.started_at, end)
    args: dict[str, Any] = {"request_id": span.request_id, "state": _state(span)}
    if span.error is not None:
        args["error"] = span.error
    yield from _slice(span, row, span.request_type, span.opened_at, end, args)
    yield from _slice(span, row, "queued", span.opened_at, began, {})
    if span.started_at is not None:
        yield from _slice(span, row, "running", began, end, {})


def _state(span: RequestSpan) -> str:
    if span.finished_at is None:
        return "open"
    return "done" if span.error is None else "failed"


def _slice(
    span: RequestSpan, row: int, name: str, start: float, end: float, args: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    shared = {"cat": "request", "id": span.request_id, "name": name, "pid": row, "tid": row}
    yield shared | {"ph": "b", "ts": round(start * _MICROSECONDS), "args": args}
    yield shared | {"ph": "e", "ts": round(end * _MICROSECONDS)}
