"""A client's events as OpenTelemetry spans: one per operation, retries and recoveries as events, and the W3C header
that lets the server's spans join them.

    ServiceClient(telemetry="otel")                          # where OTEL_EXPORTER_OTLP_ENDPOINT says
    ServiceClient(telemetry="otel:http://collector:4318")
    ServiceClient(telemetry=[OpenTelemetryEvents(provider=my_provider)])

A program that has set up OpenTelemetry itself keeps its provider: our spans become children of its own.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.propagate import inject
from opentelemetry.trace import SpanKind, Status, StatusCode

from tinsmith import __version__
from tinsmith.observe.otel import INSTRUMENT, open_provider
from tinsmith.types.events import Event

_SKIPPED = ("http.request", "operation.started")
_ENDS = ("operation.finished", "operation.failed")


class OpenTelemetryEvents:
    """An `EventSink` that is a `TracingSink` too."""

    def __init__(self, endpoint: str | None = None, *, provider: trace.TracerProvider | None = None) -> None:
        self._end: Callable[[], object] = lambda: None
        if provider is None:
            present = trace.get_tracer_provider()
            if endpoint is not None or isinstance(present, trace.ProxyTracerProvider):
                own = open_provider("tinsmith-client", endpoint=endpoint)
                self._end = weakref.finalize(self, own.shutdown)  # sends what is left, at exit too
                present = own
            provider = present
        self._tracer = provider.get_tracer(INSTRUMENT, __version__)

    @contextmanager
    def operation(self, name: str, fields: Mapping[str, Any], age_s: float) -> Iterator[None]:
        """The present span within, for everything the operation sends; `age_s` ago it was called."""
        began = time.time_ns() - int(age_s * 1e9)
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=_attributes(fields), start_time=began)
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield

    def headers(self) -> dict[str, str]:
        """`traceparent` of the present span; none outside of any."""
        carrier: dict[str, str] = {}
        inject(carrier)
        return carrier

    def write(self, event: Event) -> None:
        if event.name in _SKIPPED:
            return
        span, attributes = trace.get_current_span(), _attributes(event.fields)
        if event.name in _ENDS:
            span.set_attributes(attributes)
            if event.name == "operation.failed":
                span.set_status(Status(StatusCode.ERROR, str(event.fields.get("error_type", ""))))
        elif span.is_recording():
            span.add_event(event.name, attributes, timestamp=int(event.time * 1e9))
        else:
            at = int(event.time * 1e9)
            self._tracer.start_span(event.name, attributes=attributes, start_time=at).end(end_time=at)

    def close(self) -> None:
        self._end()


def _attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With names that are ours; what is no plain value is left out."""
    return {f"tinsmith.{key}": value for key, value in fields.items() if isinstance(value, str | bool | int | float)}
