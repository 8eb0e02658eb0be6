"""A training step over the wire as one trace: real client, real server, a real OTLP receiver; and the server's log."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.protocol.conftest import running_server
from tinsmith import ServiceClient
from tinsmith.observe.otel_events import OpenTelemetryEvents
from tinsmith.types import Datum, ModelInput

KEY = "tml-a-key-that-must-not-be-logged"


class Collector:
    """What an OTLP/HTTP receiver was sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[tuple[str, Span]] = []
        """Each with its service's name."""

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            facts = {fact.key: fact.value.string_value for fact in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(facts["service.name"], span) for span in scope.spans]

    def one(self, service: str, name: str) -> Span:
        (span,) = [span for of, span in self.spans if (of, span.name) == (service, name)]
        return span

    def child(self, name: str, parent: Span) -> Span:
        (span,) = [span for _, span in self.spans if span.name == name and span.parent_span_id == parent.span_id]
        assert span.trace_id == parent.trace_id
        return span


@contextmanager
def receiving() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_step_is_one_trace_through_client_server_and_engine(tmp_path: Path) -> None:
    options = ("--dtype", "float32", "--log-format", "json", "--log-level", "debug")
    with receiving() as collector:
        with running_server(tmp_path, *options, "--otel-endpoint", collector.url) as server:
            sink = OpenTelemetryEvents(collector.url)
            with ServiceClient(base_url=server.url, api_key=KEY, telemetry=[sink]) as service:
                training = service.create_lora_training_client("tinsmith/tiny", rank=4).result(60)
                data = [Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8], "weights": [1.0] * 3})]
                result = training.forward_backward(data, "cross_entropy").result(60)
                model_id = training.model_id
            sink.close()
        operation = collector.one("tinsmith-client", "forward_backward")
        submit = collector.child("POST /api/v1/forward_backward", operation)
        work = collector.child("ForwardBackward", submit)
        queue, engine = collector.child("queue", work), collector.child("engine", work)
        assert operation.start_time_unix_nano <= submit.start_time_unix_nano
        assert queue.end_time_unix_nano == engine.start_time_unix_nano
        assert engine.end_time_unix_nano <= operation.end_time_unix_nano
        reply = collector.child("POST /api/v1/retrieve_future", operation)
        assert [link.span_id for link in reply.links] == [submit.span_id]
        facts = {fact.key: fact.value for fact in operation.attributes}
        assert facts["tinsmith.loss"].double_value == result.loss
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert KEY not in server.log.read_text()
    (trained,) = [line for line in lines if line.get("route") == "/api/v1/forward_backward"]
    assert (trained["level"], trained["status"], trained["model_id"]) == ("info", 200, model_id)
    assert trained["session_id"] == model_id.partition(":")[0]
    assert any(line["logger"] == "tinsmith.engine" for line in lines), "engines write as the server does"
    assert lines[-1]["message"].startswith("Stopped")
