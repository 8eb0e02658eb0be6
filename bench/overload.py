"""A crowd of samples through the official SDK, and others beside it: `python -m bench.overload [--samples 2000]`.

One process sends all samples of one project at once. Meanwhile a heartbeat goes out ten times a second, and another
project asks for one sample after the other; the memory of the server and its engine is watched.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from bench.admission import pulse
from bench.compare import write_record
from bench.run import MODEL, Server, serving

SCRIPT = Path(__file__).with_name("official_crowd.py")
SDK_PYTHON = Path(__file__).parents[1] / ".venv-tinker" / "bin" / "python"
SMALL_TOKENS = 8
BEAT_S = 0.1
CALM_S = 5.0


class Neighbour:
    """A project of its own that asks for one small sample after the other."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self.seconds: list[float] = []
        self.session_id = ""

    async def _json(self, path: str, **body: Any) -> dict[str, Any]:
        answer = await self._http.post(path, json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    async def join(self) -> str:
        self.session_id = (await self._json("create_session", project_id="neighbour"))["session_id"]
        made = await self._json(
            "create_sampling_session", session_id=self.session_id, sampling_session_seq_id=0, base_model=MODEL
        )
        sampler_id: str = made["sampling_session_id"]
        return sampler_id

    async def ask(self, sampler_id: str, seq_id: int) -> None:
        start = time.perf_counter()
        receipt = await self._json(
            "asample",
            sampling_session_id=sampler_id,
            seq_id=seq_id,
            num_samples=1,
            prompt={"chunks": [{"type": "encoded_text", "tokens": [20, 21, 22, seq_id % 1000 + 3]}]},
            sampling_params={"max_tokens": SMALL_TOKENS, "seed": seq_id, "stop": []},
        )
        for _ in range(50):
            answer = await self._http.post("retrieve_future", json={"request_id": receipt["request_id"]})
            if answer.status_code == 200:
                self.seconds.append(time.perf_counter() - start)
                return
        raise RuntimeError("a small sample did not end")

    async def ask_on(self, sampler_id: str) -> None:
        seq_id = 0
        while True:
            seq_id += 1
            await self.ask(sampler_id, seq_id)
            await asyncio.sleep(0.2)


async def watch(read: Callable[[], float], peak: list[float]) -> None:
    while True:
        peak[0] = max(peak[0], await asyncio.to_thread(read))
        await asyncio.sleep(0.25)


async def crowd(python: str, url: str, num_samples: int, max_tokens: int) -> dict[str, Any]:
    """What the script reports. Raises `RuntimeError` with its last words if it fails."""
    arguments = [str(SCRIPT), url, MODEL, "crowd", str(num_samples), str(max_tokens)]
    script = await asyncio.create_subprocess_exec(
        python, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await script.communicate()
    if script.returncode != 0:
        raise RuntimeError(errors.decode()[-4000:])
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


async def calm_heartbeats(http: httpx2.AsyncClient, session_id: str) -> list[float]:
    """Before the crowd comes: what the machine itself allows."""
    seconds: list[float] = []
    beating = asyncio.create_task(pulse(http, "session_heartbeat", {"session_id": session_id}, seconds, BEAT_S))
    await asyncio.sleep(CALM_S)
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    return seconds


async def overload(server: Server, python: str, num_samples: int, max_tokens: int) -> dict[str, float]:
    """Raises `RuntimeError` if a sample fails."""
    heartbeats: list[float] = []
    peak = [server.rss_mb()]
    async with httpx2.AsyncClient(base_url=f"{server.url}/api/v1/", timeout=120) as http:
        neighbour = Neighbour(http)
        sampler_id = await neighbour.join()
        for seq_id in range(1_000_000, 1_000_005):
            await neighbour.ask(sampler_id, seq_id)
        alone_s = statistics.median(neighbour.seconds)
        neighbour.seconds.clear()
        idle_mb = server.rss_mb()
        calm_s = await calm_heartbeats(http, neighbour.session_id)
        beat = pulse(http, "session_heartbeat", {"session_id": neighbour.session_id}, heartbeats, BEAT_S)
        beside = [
            asyncio.create_task(beat),
            asyncio.create_task(neighbour.ask_on(sampler_id)),
            asyncio.create_task(watch(server.rss_mb, peak)),
        ]
        report = await crowd(python, server.url, num_samples, max_tokens)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    if report["num_failed"]:
        raise RuntimeError(f"{report['num_failed']} samples failed, the first with {report['first_error']}")
    return {
        "samples": num_samples,
        "failed": report["num_failed"],
        "tokens_each": report["num_tokens"] / num_samples,
        "seconds": report["seconds"],
        "heartbeat_calm_p95_ms": 1e3 * float(np.quantile(calm_s, 0.95)),
        "heartbeat_p50_ms": 1e3 * statistics.median(heartbeats),
        "heartbeat_p95_ms": 1e3 * float(np.quantile(heartbeats, 0.95)),
        "heartbeat_max_ms": 1e3 * max(heartbeats),
        "small_sample_alone_ms": 1e3 * alone_s,
        "small_sample_beside_p50_ms": 1e3 * statistics.median(neighbour.seconds),
        "small_sample_beside_p95_ms": 1e3 * float(np.quantile(neighbour.seconds, 0.95)),
        "small_sample_beside_max_ms": 1e3 * max(neighbour.seconds),
        "rss_idle_mb": idle_mb,
        "rss_peak_mb": peak[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--python", default=str(SDK_PYTHON), help="an interpreter that has the official SDK")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), "auto") as server:
        figures = asyncio.run(overload(server, arguments.python, arguments.samples, arguments.max_tokens))
    write_record("overload", MODEL, figures)


if __name__ == "__main__":
    main()
