"""What both sides of the wire need of OpenTelemetry. Imported only where traces are wanted (`tinsmith[otel]`)."""

from __future__ import annotations

import os
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Tracer

from tinsmith import __version__

TRACES_PATH: Final = "/v1/traces"
INSTRUMENT: Final = "tinsmith"


def open_provider(service: str, *, endpoint: str | None = None, exporter: SpanExporter | None = None) -> TracerProvider:
    """A provider of this program's own, the global one stays as it is. `endpoint` is an OTLP/HTTP collector's address;
    without it, `OTEL_EXPORTER_OTLP_ENDPOINT` and its relatives say. Shut it down at the end."""
    if exporter is None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=None if endpoint is None else traces_url(endpoint))
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    resource = Resource.create({"service.name": name, "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    return provider


def traces_url(endpoint: str) -> str:
    """Of a collector that is given as OpenTelemetry's own variable would: without the path of a signal.

    Raises `ValueError` for what is no address: the exporter would only say so in the log, span after span.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"{endpoint!r} is no address of a collector; it begins with http:// or https://")
    trimmed = endpoint.rstrip("/")
    return trimmed if trimmed.endswith(TRACES_PATH) else trimmed + TRACES_PATH


def tracer_of(provider: TracerProvider) -> Tracer:
    return provider.get_tracer(INSTRUMENT, __version__)
