"""`/metrics` says what was done, in Prometheus' own format."""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.server.keyed import keyed_server
from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.runtime.fake import FAKE_CARD
from tinsmith.server.metrics import CountedFigures
from tinsmith.types.errors import InvalidInput
from tinsmith.types.pulse import PHASES, Pulse

pytestmark = pytest.mark.anyio

PULSE = Pulse(
    number=1,
    slice_s=0.0,
    num_slices=9,
    phase_s={phase: float(index) for index, phase in enumerate(PHASES)},
    tokens_trained=100,
    tokens_prefilled=40,
    tokens_sampled=30,
    num_training_passes=2,
    num_decode_passes=10,
    num_decode_rows=35,
    training_pass_tokens_max=2048,
    decode_batch_max=256,
    num_running=3,
    num_waiting=4,
    num_adapters=5,
    num_snapshots=6,
    cache_blocks=100,
    cache_blocks_free=90,
    rss_bytes=1000,
    device_bytes=0,
)


async def scrape(client: Client) -> dict[str, float]:
    """Every sample by `name{label="value",…}`, labels in order of their names."""
    answer = await client.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
    return {name_of(s.name, s.labels): s.value for s in samples}


def name_of(name: str, labels: dict[str, str]) -> str:
    pairs = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
    return f"{name}{{{pairs}}}" if pairs else name


async def test_the_figures_are_the_work_that_was_done(open_server: OpenServer) -> None:
    async with open_server({"ledger": True}) as client:
        session = await client.session()
        model = await client.model(session)
        for seq in range(1, 4):
            await client.result(await client.train(model, seq))
        client.engine.fail_items(model, InvalidInput("bad datum"))
        await client.result(await client.train(model, 4))
        sampler = await client.sampler(session)
        await client.result(await client.sample(sampler, num_samples=2))
        seen = await scrape(client)
    assert seen['tinsmith_requests_total{outcome="ok",type="ForwardBackward"}'] == 3
    assert seen['tinsmith_requests_total{outcome="user",type="ForwardBackward"}'] == 1
    assert seen['tinsmith_requests_total{outcome="ok",type="CreateModel"}'] == 1
    assert seen['tinsmith_errors_total{category="user"}'] == 1
    assert seen['tinsmith_errors_total{category="server"}'] == 0
    assert seen['tinsmith_request_wait_seconds_count{class="training"}'] == 4
    assert seen['tinsmith_request_run_seconds_count{class="sampling"}'] == 1
    base = 'base_model="tinsmith/fake"'
    assert seen[f'tinsmith_tokens_total{{{base},kind="training"}}'] == 9
    assert seen[f'tinsmith_tokens_total{{{base},kind="prefill"}}'] == 3
    assert seen[f'tinsmith_tokens_total{{{base},kind="sampled"}}'] == 8
    assert seen['tinsmith_models{state="live"}'] == 1
    assert seen['tinsmith_model_adapters{place="device"}'] == 1
    assert seen["tinsmith_sessions"] == 1
    assert seen['tinsmith_futures{state="kept"}'] == 6
    assert seen['tinsmith_queue_depth{class="training"}'] == 0
    assert seen["tinsmith_ledger_writes_total"] >= 8
    assert seen["tinsmith_ledger_commit_seconds_count"] > 0
    assert seen["tinsmith_ready"] == 1
    route = 'route="/api/v1/forward_backward"'
    assert seen[f'tinsmith_http_requests_total{{method="POST",{route},status="200"}}'] == 4


async def test_what_waits_is_seen_by_class(client: Client) -> None:
    model = await client.model()
    client.engine.pause()
    receipts = [await client.train(model, seq) for seq in range(1, 5)]
    waiting = [await client.train(model, 9)]
    seen = await scrape(client)
    depth, running = seen['tinsmith_queue_depth{class="training"}'], seen['tinsmith_requests_running{class="training"}']
    assert depth + running == 5
    assert depth >= 1
    client.engine.resume()
    for receipt in receipts:
        await client.result(receipt)
    seen = await scrape(client)
    assert (seen['tinsmith_queue_depth{class="training"}'], seen['tinsmith_futures{state="queued"}']) == (1, 1)
    assert waiting[0].status_code == 200


async def test_an_engines_pulse_is_shown_under_its_base_model(client: Client) -> None:
    client.engine.pulse = PULSE
    seen = await scrape(client)
    base = f'base_model="{FAKE_CARD.name}"'
    assert seen[f'tinsmith_engine_seconds_total{{{base},phase="backward"}}'] == PHASES.index("backward")
    assert seen[f'tinsmith_engine_pass_rows_total{{{base},kind="decode"}}'] == 35
    assert seen[f'tinsmith_engine_passes_total{{{base},kind="decode"}}'] == 10
    assert seen[f'tinsmith_engine_cache_blocks{{{base},state="used"}}'] == 10
    assert seen[f'tinsmith_engine_samples{{{base},state="waiting"}}'] == 4
    assert seen[f'tinsmith_engine_memory_bytes{{{base},kind="rss"}}'] == 1000
    client.engine.pulse = replace(PULSE, number=2)
    client.engine.die("killed")
    client.app.state.service.control._check_engines()
    seen = await scrape(client)
    assert seen[f"tinsmith_engine_up{{{base}}}"] == 0
    assert seen[f"tinsmith_engine_deaths_total{{{base}}}"] == 1
    assert seen["tinsmith_ready"] == 0


async def test_no_label_holds_what_a_user_wrote(client: Client) -> None:
    session = await client.session()
    model = await client.model(session)
    await client.get(f"sessions/{session}")
    await client.http.get("/a-path-of-somebody?key=secret")
    await client.http.request("BREW", "/api/v1/healthz")
    text = (await client.http.get("/metrics")).text
    for word in (session, model, "a-path-of-somebody", "secret", "BREW"):
        assert word not in text
    assert 'route="/api/v1/sessions/{session_id}"' in text
    assert 'method="other"' in text


async def test_names_follow_prometheus_conventions(client: Client) -> None:
    client.engine.pulse = PULSE
    await client.model()
    families = list(text_string_to_metric_families((await client.http.get("/metrics")).text))
    for family in families:
        assert re.fullmatch(r"(tinsmith|process)_[a-z_]+", family.name), family.name
        assert family.documentation
        assert not re.search(r"_(ms|milliseconds|mb|kb|total)$", family.name), family.name


async def test_two_servers_in_one_process_count_apart(open_server: OpenServer, tmp_path_factory: object) -> None:
    one, two = CollectorRegistry(), CollectorRegistry()
    CountedFigures(one).tokens("sampled", "m", 3)
    CountedFigures(two).tokens("sampled", "m", 5)
    labels = {"base_model": "m", "kind": "sampled"}
    assert one.get_sample_value("tinsmith_tokens_total", labels) == 3
    assert two.get_sample_value("tinsmith_tokens_total", labels) == 5


async def test_a_request_is_one_line_of_the_log_with_its_ids(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    model = await client.model()
    with caplog.at_level(logging.DEBUG, "tinsmith.server.requests"):
        receipt = await client.train(model, 1)
        await client.result(receipt)
    trained, polled = caplog.records
    assert trained.levelno == logging.INFO
    assert re.fullmatch(r"POST /api/v1/forward_backward 200 [\d.]+ ms", trained.getMessage())
    assert polled.levelno == logging.DEBUG, "polls come all the time"
    assert receipt.headers["x-request-id"]


async def test_counting_costs_next_to_nothing() -> None:
    """About a dozen microseconds; a hundred would still not show beside a request of a millisecond."""
    figures = CountedFigures(CollectorRegistry())
    began = time.process_time()
    for _ in range(2000):
        figures.http_began()
        figures.http_ended("POST", "/api/v1/asample", 200, 0.001)
    assert (time.process_time() - began) / 2000 < 1e-3


async def test_the_dashboard_and_the_docs_name_figures_that_exist(client: Client) -> None:
    """And the names are those that operators rely on."""
    client.engine.pulse = PULSE
    service = client.app.state.service.control
    service.observers.tokens("sampled", "m", 1)
    await client.result(await client.train(await client.model(), 1))
    text = (await client.http.get("/metrics")).text
    names = {s.name for family in text_string_to_metric_families(text) for s in family.samples}
    waiting = {"tinsmith_ledger_lag_seconds", "tinsmith_disk_fsync_seconds", "tinsmith_disk_free_bytes"}
    docs = Path(__file__).parents[3] / "docs"
    board = json.loads((docs / "grafana-dashboard.json").read_text())
    asked = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    word = r"\b(?:tinsmith|process)_[a-z_]+"
    told = set(re.findall(word, asked)) | set(re.findall(word, (docs / "operating.md").read_text()))
    missing = {name for name in told - waiting if name not in names and f"{name}_count" not in names}
    assert not missing


async def test_where_keys_are_needed_figures_are_for_administrators_and_keys_for_figures_alone(
    open_server: OpenServer,
) -> None:
    async with keyed_server(open_server) as server:
        member, admin = await server.member("anna"), await server.member("root", "admin")
        watcher = server.client((await server.key("root", scopes=["metrics"]))[0])
        statuses = [(await who.http.get("/metrics")).status_code for who in (member, admin, watcher)]
        assert statuses == [403, 200, 200]
        assert (await watcher.get("sessions")).status_code == 403
        assert (await watcher.http.get("/readyz")).status_code == 200
