"""What paging costs: `python -m bench.paging`. One tenant trains without a pause while others come and go beside it.

Every other tenant owns a model, asks for one step, waits for its answer, and hands over to the next, so that models are
used in the worst order there is. With room for all and with room for a few; the model that ships, rank 32.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.run import RESULTS
from tinsmith.control.futures import Outcome
from tinsmith.control.requests import ApplyOptimizer, CreateModel, ForwardBackward, ModelRequest, NewSession
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.models import TINY
from tinsmith.runtime.process import ProcessEngine
from tinsmith.types import AdamParams, Datum, LoraConfig, ModelInput
from tinsmith.types.engine_options import EngineOptions, ModelSource

NUM_OTHERS = 8
ROOM = 4
"""Adapters that fit, where not all do; the busy one is among them."""
ADAPTER_BYTES = 9_568_256
SECONDS = 25.0
OTHERS_AT_ONCE = 2


def main() -> None:
    figures = {
        "alone": asyncio.run(measure(0, NUM_OTHERS + 1)),
        "all fit": asyncio.run(measure(NUM_OTHERS, NUM_OTHERS + 1)),
        "paged": asyncio.run(measure(NUM_OTHERS, ROOM)),
    }
    print(json.dumps(figures, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "paging.json").write_text(json.dumps(figures, indent=2) + "\n")


async def measure(num_others: int, room: int) -> dict[str, float]:
    options = EngineOptions(dtype="float32", device="cpu", threads=1, adapter_memory_bytes=room * ADAPTER_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        engine = ProcessEngine(ModelSource.parse(TINY), options)
        control = Control(ControlSettings(data_dir=Path(folder), ledger=True), [engine])
        await control.start()
        try:
            models = [await _model(control, seed) for seed in range(num_others + 1)]
            until = time.perf_counter() + SECONDS
            turns = iter(models[1:] * 10_000)
            others = [_visits(control, turns, until) for _ in range(OTHERS_AT_ONCE if num_others else 0)]
            steps, *waits = await asyncio.gather(_train(control, models[0], until), *others)
            paging = control.paging_stats()[TINY]
        finally:
            await control.close()
    waited = sorted(wait for one in waits for wait in one)
    figures = {"busy_steps_per_s": steps / SECONDS, "other_steps_per_s": len(waited) / SECONDS}
    if waited:
        figures |= {"other_wait_s_p50": statistics.median(waited), "other_wait_s_max": waited[-1]}
    reads = max(paging.pages_in, 1)
    figures |= {"pages_in": paging.pages_in, "read_s": paging.read_s / reads, "leave_s": paging.write_s / reads}
    return {name: round(value, 4) for name, value in figures.items()}


async def _model(control: Control, seed: int) -> str:
    session_id = await control.create_session(NewSession())
    config = LoraConfig(rank=32, seed=seed)
    asked = CreateModel(session_id=session_id, model_seq_id=0, base_model=TINY, lora_config=config)
    receipt = await control.create_model(asked)
    await _result(control, receipt.request_id)
    assert receipt.model_id is not None
    return receipt.model_id


async def _train(control: Control, model_id: str, until: float) -> int:
    """Two steps ahead of the answers; how many were done."""
    steps, pending = 0, []
    while time.perf_counter() < until:
        pending += _step(control, model_id, 2 * steps + 1, count=8)
        steps += 1
        while len(pending) > 4:
            await _result(control, pending.pop(0))
    for request_id in pending:
        await _result(control, request_id)
    return steps


_seqs: dict[tuple[int, str], int] = {}


async def _visits(control: Control, turns: Any, until: float) -> list[float]:
    waits = []
    while time.perf_counter() < until:
        model_id, began = next(turns), time.perf_counter()
        seq = _seqs.get((id(control), model_id), 1)
        _seqs[id(control), model_id] = seq + 2
        for request_id in _step(control, model_id, seq, count=1):
            await _result(control, request_id)
        waits.append(time.perf_counter() - began)
    return waits


def _step(control: Control, model_id: str, seq: int, count: int) -> list[str]:
    tokens = [(seq * 31 + i) % 400 for i in range(129)]
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": [1.0] * 128})
    requests: list[ModelRequest] = [
        ForwardBackward(model_id=model_id, seq_id=seq, data=(datum,) * count, loss_fn="cross_entropy"),
        ApplyOptimizer(model_id=model_id, seq_id=seq + 1, params=AdamParams(learning_rate=1e-4)),
    ]
    return [control.submit(request, f"{model_id} {request.seq_id}".encode()).request_id for request in requests]


async def _result(control: Control, request_id: str) -> Any:
    outcome = await control.wait_future(request_id, 300)
    assert isinstance(outcome, Outcome)
    assert outcome.error is None, outcome.error
    return outcome.result


if __name__ == "__main__":
    main()
