"""What the ledger costs: `python -m bench.ledger`. Acknowledgements with 64 submitters, and training with and without.

The acknowledgement is timed inside one process, from `Control.submit` to the entry being on disk, beside an engine that
answers at once; training runs on the model that ships, through `Control`, in alternation with and without a ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.run import RESULTS
from tinsmith.control.futures import Outcome
from tinsmith.control.requests import ApplyOptimizer, CreateModel, ForwardBackward, ModelRequest, NewSession
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.models import TINY
from tinsmith.runtime.fake import FakeEngine
from tinsmith.runtime.handle import EngineHandle
from tinsmith.types import AdamParams, Datum, LoraConfig, ModelInput

SUBMITTERS = 64
PER_SUBMITTER = 30
STEPS = 10
ROUNDS = 2


def main() -> None:
    figures: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "fsync_ms_p50": fsync_ms()}
    figures |= {f"ack_ms_{name}": value for name, value in asyncio.run(acknowledgements()).items()}
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for ledger in (False, True):
            rates[ledger].append(asyncio.run(training_rate(ledger)))
    figures["steps_per_s_off"], figures["steps_per_s_on"] = max(rates[False]), max(rates[True])
    figures["on_over_off"] = figures["steps_per_s_on"] / figures["steps_per_s_off"]
    print(json.dumps(figures, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ledger.json").write_text(json.dumps(figures, indent=2) + "\n")


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
    with tempfile.TemporaryDirectory() as folder:
        control = await _started(Path(folder), FakeEngine(), ledger=True)
        models = [await _model(control, "tinsmith/fake") for _ in range(SUBMITTERS)]
        times: list[float] = []

        async def submitter(model_id: str) -> None:
            for seq in range(1, PER_SUBMITTER + 1):
                start = time.perf_counter()
                await control.durable(_submit(control, _forward_backward(model_id, seq, 128)))
                times.append(1000 * (time.perf_counter() - start))

        await asyncio.gather(*(submitter(model_id) for model_id in models))
        await control.close()
    low, high = np.percentile(times, [50, 99])
    return {"p50": float(low), "p99": float(high)}


async def training_rate(ledger: bool) -> float:
    from tinsmith.runtime.process import ProcessEngine
    from tinsmith.types.engine_options import EngineOptions, ModelSource

    with tempfile.TemporaryDirectory() as folder:
        engine = ProcessEngine(ModelSource.parse(TINY), EngineOptions(dtype="float32", threads=1))
        control = await _started(Path(folder), engine, ledger=ledger)
        model_id = await _model(control, TINY)
        await _train(control, model_id, 1, 3)
        start = time.perf_counter()
        await _train(control, model_id, 7, STEPS)
        elapsed = time.perf_counter() - start
        await control.close()
    return STEPS / elapsed


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
