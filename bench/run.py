"""Speed and memory of a server with the model that ships, through our client: `python -m bench.run [--quick]`.

Every figure is a median over repetitions in one run; machines differ and are noisy, so compare ratios within a run.
Writes `bench/results/<date>-<cpu>.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

import tinsmith
from tinsmith.types import AdamParams, Datum, ModelInput, SamplingParams

RESULTS = Path(__file__).parent / "results"
MODEL = "tinsmith/tiny"
VOCAB = 1500
_READY = re.compile(r"http://127\.0\.0\.1:\d+")


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    process: psutil.Process
    start_s: float

    def rss_mb(self) -> float:
        family = [self.process, *self.process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    repeat = 2 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), arguments.dtype) as server:
        figures = {"start_to_ready_s": server.start_s, "rss_idle_mb": server.rss_mb()}
        with tinsmith.ServiceClient(base_url=server.url, api_key="tml-bench") as service:
            figures |= measure(service, repeat)
        figures["rss_after_mb"] = server.rss_mb()
    report(figures, arguments.dtype)


def measure(service: tinsmith.ServiceClient, repeat: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    trainer = service.create_lora_training_client(MODEL, rank=16, seed=0).result()
    sampler = trainer.save_weights_and_get_sampling_client().result()
    data = [datum(rng, int(length)) for length in rng.integers(16, 128, 128)]
    sixteen_tokens = datum(rng, 16)
    tokens = sum(d.model_input.length for d in data)
    tenants = [service.create_lora_training_client(MODEL, rank=rank, seed=rank).result() for rank in (2, 4, 8, 16)]

    def step() -> None:
        future = trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(AdamParams(learning_rate=1e-4)).result()
        future.result()

    def four_tenants() -> None:
        futures = [t.forward_backward(data[i::4], "cross_entropy") for i, t in enumerate(tenants)]
        futures += [t.optim_step(AdamParams(learning_rate=1e-4)) for t in tenants]
        for future in futures:
            future.result()

    def smallest() -> None:
        trainer.forward_backward([sixteen_tokens], "cross_entropy").result()

    def publish_and_sample() -> None:
        trainer.optim_step(AdamParams(learning_rate=1e-5))
        fresh = trainer.save_weights_and_get_sampling_client().result()
        fresh.sample(prompt(rng), 1, SamplingParams(max_tokens=1)).result()

    def many_prompts() -> None:
        draw(sampler, [prompt(rng) for _ in range(256)], 1, 64)

    def group() -> None:
        draw(sampler, [prompt(rng) for _ in range(16)], 16, 64)

    def score() -> None:
        for future in [sampler.compute_logprobs(d.model_input) for d in data]:
            future.result()

    return {
        "train_tokens_per_s": tokens / median_s(step, repeat),
        "train_tokens_per_s_4_tenants": tokens / median_s(four_tenants, repeat),
        "smallest_forward_backward_ms": 1e3 * median_s(smallest, 4 * repeat),
        "step_to_first_sample_ms": 1e3 * median_s(publish_and_sample, 4 * repeat),
        "sample_tokens_per_s_256x1": 256 * 64 / median_s(many_prompts, repeat),
        "sample_tokens_per_s_16x16": 256 * 64 / median_s(group, repeat),
        "score_tokens_per_s": tokens / median_s(score, repeat),
    }


def draw(sampler: tinsmith.SamplingClient, prompts: list[ModelInput], num_samples: int, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, stop=[], seed=1)
    for future in [sampler.sample(p, num_samples, params) for p in prompts]:
        future.result()


def datum(rng: np.random.Generator, length: int) -> Datum:
    tokens = rng.integers(3, VOCAB, length + 1)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


def prompt(rng: np.random.Generator) -> ModelInput:
    return ModelInput.from_ints(rng.integers(3, VOCAB, int(rng.integers(16, 48))))


def median_s(work: Callable[[], None], repeat: int) -> float:
    work()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def serving(data_dir: Path, dtype: str, *options: str) -> Iterator[Server]:
    """`tinsmith serve` on a free port of the loopback interface; ended by its own process id."""
    command = [
        sys.executable,
        "-m",
        "tinsmith",
        "serve",
        "--port",
        "0",
        "--dtype",
        dtype,
        "--data-dir",
        str(data_dir),
        *options,
    ]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        found = _READY.search(line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line!r}")
        yield Server(found.group(), psutil.Process(child.pid), time.perf_counter() - start)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(timeout=30)
        child.stdout.close()


def report(figures: dict[str, float], dtype: str) -> None:
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "version": tinsmith.__version__,
        "model": MODEL,
        "dtype": dtype,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[1],
        "figures": rounded,
    }
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{record['cpu']}-{record['cores']}-cores".lower()).strip("-")
    path = RESULTS / f"{record['date']}-{slug}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    width = max(map(len, rounded))
    print("\n".join(f"{name:<{width}}  {value:>10,.4g}" for name, value in rounded.items()))
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
