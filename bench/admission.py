"""Heartbeats and polls while 200 large requests are on their way: `python -m bench.admission [--requests 200]`.

Every request is 3 MB of protobuf (64 positions with 4,000 weighted targets each); another process sends all of them at
once, for 8 models. Meanwhile a heartbeat and a poll of a finished future go out twice a second; their round trips are
timed until all the work is done.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from bench.compare import write_record
from bench.run import MODEL, serving
from tinsmith.types import Datum, ModelInput
from tinsmith.wire.tinker_proto import CONTENT_TYPE, TrainRequest, encode_train_request

POSITIONS, TARGETS = 64, 4000
MODELS = 8
PULSE_S = 0.5


def large_request(model_id: str, seq_id: int) -> bytes:
    rng = np.random.default_rng(seq_id)
    inputs = {
        "target_tokens": rng.integers(0, 1500, (POSITIONS, TARGETS)),
        "weights": np.full((POSITIONS, TARGETS), 1 / TARGETS, np.float32),
    }
    datum = Datum(ModelInput.from_ints(rng.integers(0, 1500, POSITIONS)), inputs)
    return encode_train_request(
        TrainRequest(
            model_id=model_id,
            seq_id=seq_id,
            data=(datum,),
            loss_fn="cross_entropy",
            loss_fn_config={},
            forward_only=True,
        )
    )


class Burst:
    """A session on one server, and its requests."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self.acknowledged_s: list[float] = []
        self.finished_id = ""
        """Of a request whose result is there."""

    async def json(self, path: str, **body: Any) -> dict[str, Any]:
        answer = await self._http.post(path, json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    async def finished(self, request_id: str) -> None:
        for _ in range(100):
            answer = await self._http.post("retrieve_future", json={"request_id": request_id})
            if answer.status_code == 200 and b"try_again" not in answer.content[:200]:
                return
        raise RuntimeError(f"request {request_id} did not end")

    async def model(self, session_id: str, number: int) -> str:
        body = {"session_id": session_id, "model_seq_id": number, "base_model": MODEL, "lora_config": {"rank": 4}}
        receipt = await self.json("create_model", **body)
        await self.finished(receipt["request_id"])
        self.finished_id = receipt["request_id"]
        return f"{session_id}:train:{number}"

    async def send(self, body: bytes) -> str:
        start = time.perf_counter()
        answer = await self._http.post("forward_backward", content=body, headers={"content-type": CONTENT_TYPE})
        answer.raise_for_status()
        self.acknowledged_s.append(time.perf_counter() - start)
        request_id: str = answer.json()["request_id"]
        return request_id


async def pulse(
    http: httpx2.AsyncClient, path: str, body: dict[str, Any], seconds: list[float], every_s: float = PULSE_S
) -> None:
    while True:
        start = time.perf_counter()
        (await http.post(path, json=body)).raise_for_status()
        seconds.append(time.perf_counter() - start)
        await asyncio.sleep(max(0.0, every_s - seconds[-1]))


async def send_all(url: str, models: list[str], num_requests: int) -> dict[str, float]:
    bodies = [large_request(models[i % MODELS], 1 + i // MODELS) for i in range(num_requests)]
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=f"{url}/api/v1/", timeout=300, limits=limits) as http:
        burst = Burst(http)
        start = time.perf_counter()
        ids = await asyncio.gather(*(burst.send(body) for body in bodies))
        accepted_s = time.perf_counter() - start
        await asyncio.gather(*(burst.finished(request_id) for request_id in ids))
        done_s = time.perf_counter() - start
    return {
        "body_mb": len(bodies[0]) / 1e6,
        "acknowledged_p50_ms": 1e3 * statistics.median(burst.acknowledged_s),
        "acknowledged_all_s": accepted_s,
        "done_all_s": done_s,
    }


def send_from_elsewhere(url: str, models: list[str], num_requests: int) -> dict[str, float]:
    """`send_all` for a process of its own: sending must not delay what is timed here."""
    return asyncio.run(send_all(url, models, num_requests))


async def measure(url: str, num_requests: int) -> dict[str, float]:
    heartbeats: list[float] = []
    polls: list[float] = []
    async with httpx2.AsyncClient(base_url=f"{url}/api/v1/", timeout=120) as http:
        burst = Burst(http)
        session_id = (await burst.json("create_session"))["session_id"]
        models = [await burst.model(session_id, number) for number in range(MODELS)]
        pulses = [
            asyncio.create_task(pulse(http, "session_heartbeat", {"session_id": session_id}, heartbeats)),
            asyncio.create_task(pulse(http, "retrieve_future", {"request_id": burst.finished_id}, polls)),
        ]
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere:
            loop = asyncio.get_running_loop()
            figures = await loop.run_in_executor(elsewhere, send_from_elsewhere, url, models, num_requests)
        for task in pulses:
            task.cancel()
    for name, seconds in (("heartbeat", heartbeats), ("poll", polls)):
        figures[f"{name}_p50_ms"] = 1e3 * statistics.median(seconds)
        figures[f"{name}_p95_ms"] = 1e3 * float(np.quantile(seconds, 0.95))
        figures[f"{name}_max_ms"] = 1e3 * max(seconds)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), "auto") as server:
        figures = asyncio.run(measure(server.url, arguments.requests))
    write_record("admission", MODEL, figures)


if __name__ == "__main__":
    main()
