"""What the ledger costs: `python -m bench.ledger`. Acknowledgements with 64 submitters, and training with and without.

`--quick` takes two minutes and writes no file.

The acknowledgement is timed inside one process, from `Control.submit` to the entry being on disk, beside an engine that
answers at once; training runs on the model that ships, through `Control`, in alternation with and without a ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.run import RESULTS
from tinsmith.control import ledger_codec
from tinsmith.control.futures import Outcome
from tinsmith.control.journal import RequestRecord
from tinsmith.control.ledger import _SCHEMA, Entry, put
from tinsmith.control.requests import ApplyOptimizer, CreateModel, ForwardBackward, ModelRequest, NewSession
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.models import TINY
from tinsmith.runtime.fake import FakeEngine
from tinsmith.runtime.handle import EngineHandle
from tinsmith.server.bodies import fingerprint
from tinsmith.server.tinker.decode import train_from_protobuf
from tinsmith.types import AdamParams, Datum, LoraConfig, ModelInput
from tinsmith.wire.tinker_proto import TrainRequest, encode_train_request

SUBMITTERS = 64
PER_SUBMITTER = 30
PAUSE_S = 0.1
"""Of a submitter, on average: 640 requests per second together."""
STEPS = 5
ROUNDS = 24
QUICK_ROUNDS = 8


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    figures: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "fsync_ms_p50": fsync_ms()}
    figures |= {f"cpu_us_{name}": value for name, value in parts().items()}
    figures |= asyncio.run(acknowledgements())
    figures |= asyncio.run(training_rates(QUICK_ROUNDS if quick else ROUNDS))
    print(json.dumps(figures, indent=2))
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "ledger.json").write_text(json.dumps(figures, indent=2) + "\n")


def parts() -> dict[str, float]:
    """Processor time of what one request costs on its way to the disk, in microseconds."""
    request = _forward_backward("sess-000000000000:train:0", 1, 128)
    fields = {name: getattr(request, name) for name in ("model_id", "seq_id", "data", "loss_fn", "loss_fn_config")}
    body = encode_train_request(TrainRequest(**fields, forward_only=False))
    record = RequestRecord(request_type="ForwardBackward", fingerprint=bytes(32), request=request)
    entry = put(Entry(kind="request", name="future", model_id=request.model_id, seq=1, value=record))
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.executescript(_SCHEMA)
    return {
        "decode": _cpu_us(lambda: train_from_protobuf(body)),
        "fingerprint": _cpu_us(lambda: fingerprint("train", body)),
        "encode": _cpu_us(lambda: ledger_codec.encode(record)),
        "encode_and_insert": _cpu_us(lambda: entry(database)),
    }


def _cpu_us(work: Callable[[], object], times: int = 500) -> float:
    work()
    start = time.process_time()
    for _ in range(times):
        work()
    return 1e6 * (time.process_time() - start) / times


def fsync_ms() -> float:
    """Of the disk alone: 4 KiB appended and synced."""
    times = []
    with tempfile.TemporaryFile() as file:
        for _ in range(50):
            start = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


async def acknowledgements() -> dict[str, float]:
    """Milliseconds from the submit to the entry on disk. The engine is paused: what it would compute is not measured.

    `ack` is of submitters who pause between two requests; `ack_at_capacity` of ones who do not, where the wait is the
    processor time of all others.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine = FakeEngine()
        control = await _started(Path(folder), engine, ledger=True)
        models = [await _model(control, "tinsmith/fake") for _ in range(SUBMITTERS)]
        engine.pause()
        paced, _ = await _submit_all(control, models, 1, PAUSE_S)
        hasty, cpu_us = await _submit_all(control, models, 1 + PER_SUBMITTER, 0.0)
        engine.resume()
        await control.close()
    figures = {"ack_ms": paced, "ack_at_capacity_ms": hasty}
    percentiles = {
        f"{name}_p{p}": float(np.percentile(times, p)) for name, times in figures.items() for p in (50, 90, 99)
    }
    return percentiles | {"cpu_us_per_ack": cpu_us}


async def _submit_all(control: Control, models: list[str], first_seq: int, pause_s: float) -> tuple[list[float], float]:
    """Milliseconds of every acknowledgement, and microseconds of processor time per request."""
    times: list[float] = []
    chance = random.Random(0)

    async def submitter(model_id: str) -> None:
        requests = [_forward_backward(model_id, first_seq + n, 128) for n in range(PER_SUBMITTER)]
        for request in requests:
            await asyncio.sleep(pause_s * 2 * chance.random())
            start = time.perf_counter()
            await control.durable(_submit(control, request))
            times.append(1000 * (time.perf_counter() - start))

    start = time.process_time()
    await asyncio.gather(*(submitter(model_id) for model_id in models))
    return times, 1e6 * (time.process_time() - start) / len(times)


async def training_rates(rounds: int) -> dict[str, float]:
    """Steps per second with and without a ledger. Both servers live side by side and take turns of a few steps, each
    first as often as second, so that whatever else the machine does meets both alike."""
    with tempfile.TemporaryDirectory() as folder:
        controls = {ledger: await _trainer(Path(folder) / str(ledger), ledger=ledger) for ledger in (False, True)}
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(rounds):
            for ledger in (False, True) if number % 2 else (True, False):
                control, model_id = controls[ledger]
                start = time.perf_counter()
                await _train(control, model_id, 1 + 2 * STEPS * (number + 1), STEPS)
                times[ledger].append(time.perf_counter() - start)
        for control, _ in controls.values():
            await control.close()
    off, on = (STEPS / statistics.median(times[ledger]) for ledger in (False, True))
    ratios = [without / with_ for without, with_ in zip(times[False], times[True], strict=True)]
    return {"steps_per_s_off": off, "steps_per_s_on": on, "on_over_off": statistics.median(ratios)}


async def _trainer(folder: Path, *, ledger: bool) -> tuple[Control, str]:
    """A server and a model that has warmed up."""
    from tinsmith.runtime.process import ProcessEngine
    from tinsmith.types.engine_options import EngineOptions, ModelSource

    engine = ProcessEngine(ModelSource.parse(TINY), EngineOptions(dtype="float32", threads=1))
    control = await _started(folder, engine, ledger=ledger)
    model_id = await _model(control, TINY)
    await _train(control, model_id, 1, STEPS)
    return control, model_id


async def _started(folder: Path, engine: EngineHandle, *, ledger: bool) -> Control:
    control = Control(ControlSettings(data_dir=folder, ledger=ledger, max_live_models=100), [engine])
    await control.start()
    return control


async def _model(control: Control, base_model: str) -> str:
    session_id = await control.create_session(NewSession())
    config = LoraConfig(rank=8, seed=1)
    asked = CreateModel(session_id=session_id, model_seq_id=0, base_model=base_model, lora_config=config)
    receipt = await control.create_model(asked)
    await _result(control, receipt.request_id)
    assert receipt.model_id is not None
    return receipt.model_id


async def _train(control: Control, model_id: str, first_seq: int, steps: int) -> None:
    """Steps of 16 datums of 128 tokens, each submitted when the one before has been acknowledged."""
    ids = []
    for seq in range(first_seq, first_seq + 2 * steps, 2):
        step = ApplyOptimizer(model_id=model_id, seq_id=seq + 1, params=AdamParams(learning_rate=1e-4))
        for request in (_forward_backward(model_id, seq, 128, 16), step):
            receipt = _submit(control, request)
            await control.durable(receipt)
            ids.append(receipt.request_id)
    for request_id in ids:
        await _result(control, request_id)


def _forward_backward(model_id: str, seq: int, length: int, count: int = 1) -> ForwardBackward:
    tokens = [(seq * 31 + i) % 400 for i in range(length + 1)]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * length}
    data = tuple(Datum(ModelInput.from_ints(tokens[:-1]), inputs) for _ in range(count))
    return ForwardBackward(model_id=model_id, seq_id=seq, data=data, loss_fn="cross_entropy")


def _submit(control: Control, request: ModelRequest) -> Any:
    return control.submit(request, hashlib.sha256(f"{request.model_id} {request.seq_id}".encode()).digest())


async def _result(control: Control, request_id: str) -> Any:
    outcome = await control.wait_future(request_id, 300)
    assert isinstance(outcome, Outcome)
    assert outcome.error is None, outcome.error
    return outcome.result


if __name__ == "__main__":
    main()
