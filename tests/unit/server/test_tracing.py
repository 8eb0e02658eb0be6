"""One request as one trace: HTTP, queue, engine, reply; with the caller's own trace if there is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.unit.control.harness import draw
from tests.unit.server.tinker_client import Client
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FAKE_CARD, FakeEngine
from tinsmith.server import create_app
from tinsmith.server.assemble import open_tracing
from tinsmith.server.tracing import Tracing
from tinsmith.types.errors import InvalidInput

pytestmark = pytest.mark.anyio

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


class Seen:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def one(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@asynccontextmanager
async def traced(folder: Path, seen: Seen) -> AsyncIterator[Client]:
    engine = FakeEngine(FAKE_CARD)
    app = create_app(Control(ControlSettings(data_dir=folder / "data"), [engine]), tracing=Tracing(seen.provider))
    async with app.router.lifespan_context(app):
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as http:
            yield Client(http, engine, app)


def parent(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


async def test_a_request_is_one_trace_from_its_submit_to_its_reply(tmp_path: Path) -> None:
    seen = Seen()
    async with traced(tmp_path, seen) as client:
        model = await client.model()
        seen.exporter.clear()
        receipt = await client.train(model, 1)
        await client.result(receipt)
    submit, work = seen.one("POST /api/v1/forward_backward"), seen.one("ForwardBackward")
    reply = seen.one("POST /api/v1/retrieve_future")
    assert submit.parent is None
    assert parent(work) == submit.context.span_id
    queue, engine = seen.one("queue"), seen.one("engine")
    assert {parent(queue), parent(engine)} == {work.context.span_id}
    assert work.start_time == queue.start_time
    assert queue.end_time == engine.start_time
    assert engine.end_time == work.end_time
    assert [link.context.span_id for link in reply.links] == [submit.context.span_id]
    request_id = receipt.json()["request_id"]
    assert work.attributes is not None
    assert work.attributes["tinsmith.request_id"] == request_id
    assert work.attributes["tinsmith.model_id"] == model
    assert submit.attributes is not None
    assert submit.attributes["http.response.status_code"] == 200
    assert submit.attributes["tinsmith.request_id"] == request_id


async def test_the_callers_trace_goes_on(tmp_path: Path) -> None:
    seen = Seen()
    async with traced(tmp_path, seen) as client:
        model = await client.model()
        seen.exporter.clear()
        header = f"00-{TRACE}-{CALLER}-01"
        body = {"model_id": model, "seq_id": 1, "path": "kept", "type": "save_weights"}
        await client.result(await client.post("save_weights", body, headers={"traceparent": header}))
    submit, work = seen.one("POST /api/v1/save_weights"), seen.one("SaveWeights")
    assert f"{submit.context.trace_id:032x}" == f"{work.context.trace_id:032x}" == TRACE
    assert f"{parent(submit):016x}" == CALLER


async def test_a_failure_is_marked_and_no_message_leaves_the_server(tmp_path: Path) -> None:
    seen = Seen()
    async with traced(tmp_path, seen) as client:
        model = await client.model()
        client.engine.fail_items(model, InvalidInput("the secret datum"))
        await client.result(await client.train(model, 1))
    work = seen.one("ForwardBackward")
    assert (work.status.status_code.name, work.status.description) == ("ERROR", "user")
    assert "secret" not in "".join(span.to_json() for span in seen.spans)


async def test_a_chat_is_told_within_its_http_request(tmp_path: Path) -> None:
    seen = Seen()
    async with traced(tmp_path, seen) as client:
        sampler = await client.sampler()
        seen.exporter.clear()
        control = client.app.state.service.control

        @client.app.post("/wait-in-place")
        async def wait_in_place() -> None:
            await control.draw_samples(draw(sampler))

        assert (await client.http.post("/wait-in-place")).status_code == 200
    assert parent(seen.one("Sample")) == seen.one("POST /wait-in-place").context.span_id


async def test_heartbeats_and_probes_leave_no_span(tmp_path: Path) -> None:
    seen = Seen()
    async with traced(tmp_path, seen) as client:
        session = await client.session()
        seen.exporter.clear()
        await client.post("session_heartbeat", {"session_id": session})
        await client.http.get("/readyz")
        await client.http.get("/metrics")
    assert seen.spans == ()


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for() -> None:
    program = (
        "import sys, tinsmith, tinsmith.server, tinsmith.client, tinsmith.observe, tinsmith.cli.serve, "
        "tinsmith.server.assemble as a\n"
        "assert a.open_tracing(None) is None\n"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter', 'tinsmith.observe.otel', 'tinsmith.server.tracing')\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_collector_without_an_address_is_refused() -> None:
    with pytest.raises(InvalidInput, match="--otel-endpoint: 'collector:4318' is no address of a collector"):
        open_tracing("collector:4318")
