"""What HTTP and the official SDK cost: the same work through a server and on an engine alone, turn by turn in one run.

`python -m bench.wire [--width 768] [--quick]`; needs the official SDK in `.venv-tinker` (`make test` installs it).
Also what live adapters that do nothing cost the one that trains. Writes `bench/results/<date>-wire-<width>-<cpu>.json`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.compare import LAYERS, RANK, VOCAB, Bench, make_model, write_record
from bench.run import serving
from tinsmith.types import AdamParams
from tinsmith.types.operations import DropAdapter, OptimStep, PublishSnapshot, Sample

OFFICIAL = Path(__file__).parent.parent / ".venv-tinker" / "bin" / "python"


class OfficialClient:
    """The official SDK in a process of its own, one task at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def seconds(self, task: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{task}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


@contextmanager
def official_client(url: str, lengths: list[int]) -> Iterator[OfficialClient]:
    arguments = [url, "bench", str(RANK), str(VOCAB), ",".join(map(str, lengths))]
    script = str(Path(__file__).parent / "official_client.py")
    process = subprocess.Popen(
        [str(OFFICIAL), script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError("the official SDK's process ended before it was ready")
        yield OfficialClient(process)
    finally:
        process.stdin.close() if process.stdin is not None else None
        process.wait(timeout=30)


def through_http(bench: Bench, client: OfficialClient, lengths: list[int]) -> dict[str, float]:
    """Medians of both sides, one repetition of each after the other."""
    data = [bench.datum(length) for length in lengths]
    sixteen = [bench.datum(16)]
    prompt = bench.rng.integers(0, VOCAB, 16)
    bench.create("m", RANK)
    bench.run(PublishSnapshot(model_id="m", snapshot_id="s"))

    def draw() -> Sample:
        return Sample(prompt=prompt, num_samples=1, snapshot_id="s", seed=0, max_tokens=1)

    def publish() -> None:
        bench.run(OptimStep(model_id="m", params=AdamParams()), PublishSnapshot(model_id="m", snapshot_id="s"))
        bench.run(draw())

    sides = {
        "train": lambda: bench.train({"m": data}),
        "smallest": lambda: bench.pass_through({"m": sixteen}),
        "publish": publish,
        "sample": lambda: bench.run(draw()),
    }
    http_s, engine_s = {}, {}
    for task, work in sides.items():
        repeat = bench.repeat if task == "train" else 8 * bench.repeat
        pairs = [(client.seconds(task), seconds(work)) for _ in range(repeat + 1)][1:]
        http_s[task], engine_s[task] = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "http_train_tokens_per_s": sum(lengths) / http_s["train"],
        "http_train_over_engine_alone": engine_s["train"] / http_s["train"],
        "http_smallest_forward_backward_ms": 1e3 * http_s["smallest"],
        "http_smallest_overhead_ms": 1e3 * (http_s["smallest"] - engine_s["smallest"]),
        "http_step_to_first_token_ms": 1e3 * http_s["publish"],
        "http_step_to_first_token_over_token_ms": 1e3 * (http_s["publish"] - http_s["sample"]),
    }


def idle_adapters(bench: Bench) -> dict[str, float]:
    """One tenant's step with nobody else there, over its step beside 32 adapters that do nothing."""
    data = [bench.datum(128) for _ in range(16)]
    alone_s, beside_s = [], []
    for _ in range(bench.repeat):
        alone_s.append(bench.median_s(lambda: bench.train({"m": data})))
        for i in range(32):
            bench.create(f"idle-{i}", RANK)
        beside_s.append(bench.median_s(lambda: bench.train({"m": data})))
        bench.run(*(DropAdapter(model_id=f"idle-{i}") for i in range(32)))
    return {"train_alone_over_beside_32_idle": statistics.median(alone_s) / statistics.median(beside_s)}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--quick", action="store_true", help="one repetition each")
    arguments = parser.parse_args()
    lengths = [int(n) for n in np.linspace(32, 512, 32)]
    with tempfile.TemporaryDirectory() as folder:
        model, data_dir = Path(folder) / "model", Path(folder) / "data"
        make_model(model, arguments.width)
        options = ("--base-model", f"bench={model}")
        with serving(data_dir, "bfloat16", *options) as server, official_client(server.url, lengths) as client:
            bench = Bench(model, 1 if arguments.quick else 3)
            figures = through_http(bench, client, lengths)
        figures |= idle_adapters(bench)  # when the server's engine is gone
    write_record(f"wire-{arguments.width}", f"Qwen3, {arguments.width} wide, {LAYERS} layers, random", figures)


if __name__ == "__main__":
    main()
