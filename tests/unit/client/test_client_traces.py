"""A client's operations as OpenTelemetry spans, and the header that lets a server join them."""

from __future__ import annotations

import gc
import http.server
import threading

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.unit.client.fake_tinker import FAST, FakeTinker, status
from tinsmith.client import ServiceClient
from tinsmith.client.events import Events
from tinsmith.observe import MetricsAggregate
from tinsmith.observe.event_sinks import open_sinks
from tinsmith.observe.otel_events import OpenTelemetryEvents
from tinsmith.types import AdamParams, Datum, ModelInput

DATA = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})]


class Seen:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.sink = OpenTelemetryEvents(provider=self.provider)

    def one(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.exporter.get_finished_spans() if span.name == name]
        return span


def test_an_operation_is_a_span_that_its_requests_carry() -> None:
    server, seen, figures = FakeTinker(), Seen(), MetricsAggregate()
    tracer = seen.provider.get_tracer("mine")
    with ServiceClient(
        base_url="http://fake.test", api_key="tml-secret", timing=FAST, transport=server, telemetry=[seen.sink, figures]
    ) as service:
        training = service.create_lora_training_client("m").result(5)
        with tracer.start_as_current_span("my step") as mine:
            training.forward_backward(DATA, "cross_entropy").result(5)
        server.script("optim_step", status(503))
        training.optim_step(AdamParams(learning_rate=0.25)).result(5)
        server.script("save_weights", status(400))
        assert training.save_state("x").exception(5) is not None
    span = seen.one("forward_backward")
    assert span.parent is not None
    assert span.parent.span_id == mine.get_span_context().span_id
    assert span.attributes is not None
    assert span.attributes["tinsmith.run_id"]
    assert "tinsmith.loss" in span.attributes
    assert [event.name for event in seen.one("optim_step").events] == ["http.retry"]
    assert not seen.one("save_weights").status.is_ok
    assert "tml-secret" not in "".join(s.to_json() for s in seen.exporter.get_finished_spans())
    sent = [call.headers.get("traceparent") for call in server.of("forward_backward")]
    (header,) = sent
    assert str(header).rpartition("-")[0] == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}"
    counted = figures.snapshot()
    assert counted.counters["forward_backward.count"] == 1
    assert counted.counters["save_weights.errors"] == 1
    assert counted.histograms["optim_step.wall_s"].count == 1


@pytest.mark.parametrize("part", ["operation", "headers"])
def test_a_sink_for_traces_that_fails_stops_nothing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the sink")

    seen, counted = Seen(), MetricsAggregate()
    monkeypatch.setattr(seen.sink, part, fail)
    sinks = [seen.sink, counted]
    with ServiceClient(
        base_url="http://fake.test", api_key="tml-k", timing=FAST, transport=FakeTinker(), telemetry=sinks
    ) as service:
        training = service.create_lora_training_client("m").result(5)
        training.optim_step(AdamParams()).result(5)
    assert counted.snapshot().counters["optim_step.count"] == 1


def test_without_a_sink_for_traces_nothing_is_added_to_requests() -> None:
    assert Events().headers() == {}
    assert Events([MetricsAggregate()]).headers() == {}


def test_a_program_with_a_provider_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: seen.provider)
    (sink,) = open_sinks("otel")
    events = Events([sink])
    events.emit("recovery.detected", run_id="r")
    sink.close()
    assert seen.one("recovery.detected").attributes == {"tinsmith.run_id": "r"}


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes spans as OTLP over HTTP; the server notes how many bytes came."""

    def do_POST(self) -> None:
        self.server.received.append(len(self.rfile.read(int(self.headers["content-length"]))))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("closed", [True, False])
def test_the_last_spans_are_sent_by_close_and_by_the_end_of_whoever_held_the_sink(closed: bool) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        collector.received = []  # type: ignore[attr-defined]
        threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        (sink,) = open_sinks(f"otel:http://127.0.0.1:{collector.server_port}")
        Events([sink]).emit("recovery.detected", run_id="r")
        if closed:
            sink.close()
            assert len(collector.received) == 1  # type: ignore[attr-defined]
            sink.close()
        del sink
        gc.collect()
        collector.shutdown()
    assert len(collector.received) == 1  # type: ignore[attr-defined]
