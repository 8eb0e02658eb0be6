"""Overload: a crowd of samples hurts nobody, a thousand waiting batches delay nobody, and a quota loses nothing."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.overload import overload
from bench.run import Server, serving
from tests.faults.conftest import at_length
from tests.unit.control.harness import forward_backward
from tinsmith.control import account_records
from tinsmith.control.futures import RequestSpan
from tinsmith.control.identities import Quota
from tinsmith.control.registry import Registry
from tinsmith.control.requests import CreateModel, NewSession
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.thread import ThreadEngine
from tinsmith.types import LoraConfig
from tinsmith.types.engine_options import EngineOptions, ModelSource

MODEL = "tinsmith/tiny"
MOST_GROWTH_MB = 400
"""Of the memory of server and engine: cache, results and connections of 2,000 samples."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, "float32") as running:
        yield running


def test_a_crowd_of_samples_through_the_official_sdk(server: Server, tinker_python: str) -> None:
    figures = asyncio.run(overload(server, tinker_python, 200, 8))
    assert figures["failed"] == 0
    assert figures["rss_peak_mb"] - figures["rss_idle_mb"] < MOST_GROWTH_MB


@at_length
@pytest.mark.timeout(900)
def test_two_thousand_samples_at_once_through_the_official_sdk(server: Server, tinker_python: str) -> None:
    figures = asyncio.run(overload(server, tinker_python, 2000, 32))
    print(json.dumps(figures))
    assert figures["failed"] == 0
    assert figures["tokens_each"] == 32
    assert figures["rss_peak_mb"] - figures["rss_idle_mb"] < MOST_GROWTH_MB


# ---- a thousand batches ----

BATCH_TOKENS = 128


async def new_model(control: Control, project_id: str) -> str:
    session_id = await control.create_session(NewSession(project_id=project_id))
    lora = LoraConfig(rank=2, seed=1)
    made = await control.create_model(
        CreateModel(session_id=session_id, model_seq_id=0, base_model=MODEL, lora_config=lora)
    )
    await control.wait_future(made.request_id, 60)
    assert made.model_id is not None
    return made.model_id


async def beside_a_thousand_batches(folder: Path, num_small: int) -> list[int]:
    """How many batches of the large project were finished while each request of the small one waited and was done."""
    source = ModelSource.parse(MODEL)
    engine = ThreadEngine(source, EngineOptions(dtype="float32", threads=1))
    settings = ControlSettings(data_dir=folder, max_batch_tokens=BATCH_TOKENS)
    control = Control(settings, [engine])
    await control.start()
    spans: dict[str, RequestSpan] = {}
    control._futures.on_finish = lambda span: spans.__setitem__(span.request_id, span)
    try:
        large, small = await new_model(control, "large"), await new_model(control, "small")
        queued = [
            control.submit(forward_backward(large, n, length=BATCH_TOKENS), str(n).encode()) for n in range(1, 1001)
        ]
        await control.wait_future(queued[10].request_id, 120)
        singles = []
        for n in range(1, num_small + 1):
            singles.append(control.submit(forward_backward(small, n, length=8), str(n).encode()))
            await control.wait_future(singles[-1].request_id, 120)
        assert queued[-1].request_id not in spans, "the large project had nothing waiting any more"
        ends = [spans[one.request_id].finished_at or 0 for one in queued if one.request_id in spans]
        waits = [spans[one.request_id] for one in singles]
        return [sum(span.opened_at < end < (span.finished_at or 0) for end in ends) for span in waits]
    finally:
        await control.close()


@pytest.mark.timeout(300)
def test_single_requests_beside_a_thousand_queued_batches_wait_for_two(tmp_path: Path) -> None:
    batches = asyncio.run(beside_a_thousand_batches(tmp_path, 25))
    assert statistics.median(batches) <= 2
    assert max(batches) <= 3


# ---- a quota ----

FRUGAL = """
import time, tinker
from tinker import types
service = tinker.ServiceClient(project_id="frugal")
trainer = service.create_lora_training_client("tinsmith/tiny", rank=2).result()
sampler = service.create_sampling_client(base_model="tinsmith/tiny")
tokens = [3 + i % 1000 for i in range(401)]
data = [types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 400})]
for _ in range(2):
    trainer.forward_backward(data, "cross_entropy").result()
started = time.monotonic()
drawn = sampler.sample(types.ModelInput.from_ints([20, 21]), 1, types.SamplingParams(max_tokens=80, stop=[])).result()
assert len(drawn.sequences[0].tokens) == 80
print("sample waited", time.monotonic() - started)
started = time.monotonic()
passed = trainer.forward_backward(data, "cross_entropy")
step = trainer.optim_step(types.AdamParams(learning_rate=1e-4))
assert passed.result().metrics["loss:sum"] > 0
assert step.result().metrics["step_applied"] == 1.0
print("training waited", time.monotonic() - started)
"""


async def limit_project(data_dir: Path, quota: Quota) -> None:
    registry = Registry(data_dir / "registry.sqlite3")
    registry.open()
    await registry.write(lambda c: account_records.create_project(c, "frugal", weight=1.0, at=1.0))
    await registry.write(lambda c: account_records.set_quota(c, "project", "frugal", quota))
    registry.close()


@pytest.mark.timeout(300)
def test_the_official_sdk_waits_out_a_quota_and_loses_nothing(
    server: Server, tmp_path: Path, tinker_python: str
) -> None:
    asyncio.run(limit_project(tmp_path, Quota(tokens_per_minute=600)))
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
    command = [tinker_python, "-c", FRUGAL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    waited = {line.split()[0]: float(line.split()[-1]) for line in done.stdout.splitlines() if " waited " in line}
    assert waited["sample"] > 2
    assert waited["training"] > 2
