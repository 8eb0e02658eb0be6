"""OpenTelemetry traces of the server: HTTP request, then its request's wait and work, then the reply that took it home.

Imported only where traces are wanted. A caller's trace goes on (W3C `traceparent`). What a request did between two HTTP
requests becomes spans when it ends, under the HTTP request that brought it; the one that fetches its result is linked.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import Token
from typing import Any, Final

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tinsmith.control.futures import RequestSpan, RequestType
from tinsmith.control.usage import TokenKind
from tinsmith.observe.otel import tracer_of

_QUIET: Final = ("session_heartbeat", "healthz", "readyz", "metrics")
"""Last parts of routes that are never told."""
_STILL_PENDING: Final = 408
_MAX_REMEMBERED: Final = 50_000
"""Requests whose trace is known, ended ones among them: their result may still be fetched."""


class Tracing:
    """An `HttpTracer`, and an `Observer` of control."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = tracer_of(provider)
        self._propagator = TraceContextTextMapPropagator()
        self._origins: OrderedDict[str, Context] = OrderedDict()
        """The context of the HTTP request that brought a request."""

    def close(self) -> None:
        """Send what waits. Blocks for some seconds if the collector does not answer."""
        self._provider.shutdown()

    # ---- HTTP ----

    def begin(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> HttpTrace:
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        parent = self._propagator.extract(carrier, context=Context())
        span = self._tracer.start_span(method, context=parent, kind=SpanKind.SERVER)
        span.set_attribute("http.request.method", method)
        return HttpTrace(span, self._link_to)

    def _link_to(self, span: Span, request_id: str) -> None:
        """Join the reply to the request it is about, if that came with another HTTP request."""
        origin = trace.get_current_span(self._origins.get(request_id)).get_span_context()
        if origin.is_valid and origin.span_id != span.get_span_context().span_id:
            span.add_link(origin)

    # ---- Observer ----

    def request_opened(
        self, request_id: str, request_type: RequestType, session_id: str | None, subject: str | None
    ) -> None:
        """One that an earlier process took has no origin, and is told by itself."""
        self._origins[request_id] = context.get_current()
        while len(self._origins) > _MAX_REMEMBERED:
            self._origins.popitem(last=False)

    def request_ended(self, span: RequestSpan) -> None:
        parent = self._origins.get(span.request_id) if span.request_id else context.get_current()
        ended_at = time.time() if span.finished_at is None else span.finished_at
        attributes = {"tinsmith.request_id": span.request_id, "tinsmith.session_id": span.session_id}
        attributes["tinsmith.sampler_id" if span.request_type == "Sample" else "tinsmith.model_id"] = span.subject
        told = self._tracer.start_span(
            span.request_type,
            context=parent,
            attributes={key: value for key, value in attributes.items() if value},
            start_time=_ns(span.opened_at),
        )
        if span.category is not None:
            told.set_status(Status(StatusCode.ERROR, span.category.value))
        began = ended_at if span.started_at is None else min(span.started_at, ended_at)
        within = trace.set_span_in_context(told, Context())
        if span.started_at != span.opened_at:
            self._part("queue", within, span.opened_at, began)
        if span.started_at is not None:
            self._part("engine", within, began, ended_at)
        told.end(_ns(ended_at))

    def _part(self, name: str, within: Context, began: float, ended: float) -> None:
        self._tracer.start_span(name, context=within, start_time=_ns(began)).end(_ns(ended))

    def tokens(self, kind: TokenKind, base_model: str, count: int) -> None:
        """Not in traces."""

    def committed(self, num_writes: int, seconds: float) -> None:
        """Not in traces."""


class HttpTrace:
    """The span of one HTTP request; the present one within `with`. It is sent by `end`, or never."""

    def __init__(self, span: Span, link_to: Any) -> None:
        self._span = span
        self._link_to = link_to
        self._token: Token[Context] | None = None

    def __enter__(self) -> HttpTrace:
        self._token = context.attach(trace.set_span_in_context(self._span, Context()))
        return self

    def __exit__(self, *failure: object) -> None:
        if self._token is not None:
            context.detach(self._token)

    def end(self, route: str, status: int, ids: Mapping[str, str]) -> None:
        """Heartbeats and polls without a result are dropped: there are too many, and they say nothing."""
        if route.rpartition("/")[2] in _QUIET or status == _STILL_PENDING:
            return
        span = self._span
        span.update_name(f"{span.name} {route}" if hasattr(span, "name") else route)
        span.set_attributes({"http.route": route, "http.response.status_code": status})
        span.set_attributes({f"tinsmith.{name}": value for name, value in ids.items()})
        if "request_id" in ids:
            self._link_to(span, ids["request_id"])
        if status >= 500 or status == 0:
            span.set_status(Status(StatusCode.ERROR))
        span.end()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
