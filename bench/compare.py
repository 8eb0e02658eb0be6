"""The engine beside what it is measured against, in one run: `python -m bench.compare [--width 768] [--quick]`.

Against the machine's own matrix products (share of the rate measured here), a transformers + PEFT loop over padded
batches, and `generate`. All sides use random weights of the same Qwen3 shape, the same data and the same threads; read
the ratios, not the times. Writes `bench/results/<date>-compare-<width>-<cpu>.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinsmith.runtime.threads import spin_briefly

spin_briefly()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.run import RESULTS, cpu_name
from tinsmith.engine.engine import Engine
from tinsmith.types import AdamParams, Datum, ModelInput
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import TinsmithError
from tinsmith.types.operations import (
    CancelSample,
    CreateAdapter,
    LoraSpec,
    OptimStep,
    PublishSnapshot,
    Sample,
    TrainItem,
)

VOCAB = 8192
LAYERS = 8
WIDE, WIDE_LAYERS = 2048, 2
RANK = 16
_APART = 10**6
"""Tickets of what runs in the background begin here."""
PEFT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


class Bench:
    """One engine and the figures taken of it."""

    def __init__(self, folder: Path, repeat: int) -> None:
        self.folder = folder
        self.repeat = repeat
        self.rng = np.random.default_rng(0)
        self.engine = Engine(ModelSource(name="bench", location=str(folder)), EngineOptions(dtype="bfloat16"))
        self.engine.own_process()
        for _ in range(1200):  # two minutes at most; without a compiler the model's own layers are measured
            if self.engine._base.kernels.is_compiled:
                break
            time.sleep(0.1)

    def run(self, *operations: Any) -> list[Any]:
        for ticket, operation in enumerate(operations):
            self.engine.accept(ticket, operation)
        answers: dict[int, Any] = {}
        while len(answers) < len(operations):
            answers.update(self.engine.work())
        for answer in answers.values():
            if isinstance(answer, TinsmithError):
                raise answer
        return [answers[ticket] for ticket in range(len(operations))]

    def median_s(self, work: Callable[[], object]) -> float:
        work()
        seconds = []
        for _ in range(self.repeat):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def datum(self, length: int) -> Datum:
        tokens = self.rng.integers(0, VOCAB, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
        return Datum(ModelInput.from_ints(tokens[:-1]), inputs)

    def create(self, model_id: str, rank: int) -> None:
        self.run(CreateAdapter(model_id=model_id, lora=LoraSpec(rank=rank, seed=1)))

    def pass_through(self, work: dict[str, list[Datum]]) -> None:
        self.run(*_requests(work))

    def train(self, work: dict[str, list[Datum]]) -> None:
        self.run(*_requests(work), *(OptimStep(model_id=m, params=AdamParams()) for m in work))


def _requests(work: dict[str, list[Datum]]) -> list[TrainItem]:
    return [TrainItem(model_id=m, data=tuple(d), loss_fn="cross_entropy") for m, d in work.items()]


def training(bench: Bench) -> dict[str, float]:
    """32 sequences of 32 to 512 tokens in random order; a step each."""
    lengths = np.linspace(32, 512, 32).astype(int)
    bench.rng.shuffle(lengths)
    data = [bench.datum(int(n)) for n in lengths]
    tokens = int(lengths.sum())
    bench.create("one", RANK)
    ours_s = bench.median_s(lambda: bench.train({"one": data}))
    theirs_s = min(peft_step_s(bench, data, dtype) for dtype in (torch.float32, torch.bfloat16))
    parameters = sum(p.numel() for p in load(bench.folder, torch.bfloat16).parameters())
    peak = gemm_flops_per_s()
    return {
        "train_tokens_per_s": tokens / ours_s,
        "peft_tokens_per_s": tokens / theirs_s,
        "train_over_peft": theirs_s / ours_s,
        "bf16_gemm_gflops": peak / 1e9,
        "train_share_of_gemm_rate": 4 * parameters * tokens / ours_s / peak,
    }


def wide_training(repeat: int) -> dict[str, float]:
    """Two layers 2,048 wide, where matrix products are most of a step: 8 sequences of 256 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), WIDE, WIDE_LAYERS)
        bench = Bench(Path(folder), repeat)
        data = [bench.datum(256) for _ in range(8)]
        bench.create("wide", RANK)
        step_s = bench.median_s(lambda: bench.train({"wide": data}))
        parameters = sum(p.numel() for p in load(bench.folder, torch.bfloat16).parameters())
    return {
        "wide_train_tokens_per_s": 8 * 256 / step_s,
        "wide_train_share_of_gemm_rate": 4 * parameters * 8 * 256 / step_s / gemm_flops_per_s(),
    }


def peft_step_s(bench: Bench, data: list[Datum], dtype: torch.dtype) -> float:
    """A step of the usual loop: padded batches of 8, the loss over all tokens, AdamW at the end."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=PEFT_TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(load(bench.folder, dtype), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batches = [data[start : start + 8] for start in range(0, len(data), 8)]

    def step() -> None:
        for batch in batches:
            rows = [torch.from_numpy(d.model_input.to_numpy()) for d in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
            model(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return bench.median_s(step)


def tenants(bench: Bench) -> dict[str, float]:
    """Small work of many models with mixed ranks: together, and one after the other."""
    figures = {}
    for count in (4, 8, 32):
        names = [f"{count}-{i}" for i in range(count)]
        for i, name in enumerate(names):
            bench.create(name, (4, 8, 16, 32)[i % 4])
        small = {name: [bench.datum(64)] for name in names}
        together_s = bench.median_s(lambda small=small: bench.train(small))
        alone_s = bench.median_s(lambda small=small: [bench.train({name: data}) for name, data in small.items()])
        figures[f"tenants_{count}x64_tokens_per_s"] = 64 * count / together_s
        figures[f"tenants_{count}x64_over_one_by_one"] = alone_s / together_s
    batch = [bench.datum(128) for _ in range(32)]
    spread = {f"8-{i}": batch[i::8] for i in range(8)}
    one_s = bench.median_s(lambda: bench.train({"one": batch}))
    figures["tenants_8_over_one_same_tokens"] = one_s / bench.median_s(lambda: bench.train(spread))
    return figures


def sampling(bench: Bench) -> dict[str, float]:
    """64 prompts, 4 samples each, 64 tokens, with 0, 1 and 8 adapters."""
    prompts = [bench.rng.integers(0, VOCAB, int(n)) for n in bench.rng.integers(16, 64, 64)]
    for i in range(8):
        bench.run(PublishSnapshot(model_id=f"8-{i}", snapshot_id=f"s{i}"))

    def draw(num_adapters: int) -> None:
        bench.run(
            *(
                Sample(
                    prompt=prompt,
                    num_samples=4,
                    snapshot_id=f"s{i % num_adapters}" if num_adapters else None,
                    seed=int(bench.rng.integers(2**31)),
                    max_tokens=64,
                )
                for i, prompt in enumerate(prompts)
            )
        )

    tokens = 64 * 4 * 64
    rates = {n: tokens / bench.median_s(lambda n=n: draw(n)) for n in (0, 1, 8)}
    theirs = max(generate_rate(bench, prompts, size) for size in (16, 64))
    figures = {f"sample_tokens_per_s_{n}_adapters": rate for n, rate in rates.items()}
    figures |= {"generate_tokens_per_s": theirs, "sample_over_generate": rates[0] / theirs}
    figures["sample_8_over_1_adapter"] = rates[8] / rates[1]
    return figures | repeated_prompt(bench)


def generate_rate(bench: Bench, prompts: list[np.ndarray], batch_size: int) -> float:
    """Tokens per second of `generate` over left-padded batches, on a part of the prompts."""
    model = load(bench.folder, torch.bfloat16)
    part = prompts[: max(batch_size // 4, 4)]
    rows = [torch.from_numpy(p) for p in part for _ in range(4)][:batch_size]
    ids = torch.nn.utils.rnn.pad_sequence([r.flip(0) for r in rows], batch_first=True).flip(1)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).flip(1)

    def draw() -> None:
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=real, do_sample=True, max_new_tokens=64, min_new_tokens=64, pad_token_id=0
            )

    return len(rows) * 64 / bench.median_s(draw)


def repeated_prompt(bench: Bench) -> dict[str, float]:
    """Time to the first token of a 512-token prompt, new and seen before."""

    def first_token_s(prompt: np.ndarray) -> float:
        start = time.perf_counter()
        bench.run(Sample(prompt=prompt, num_samples=1, snapshot_id=None, seed=0, max_tokens=1))
        return time.perf_counter() - start

    pairs = []
    for _ in range(3 * bench.repeat):
        prompt = bench.rng.integers(0, VOCAB, 512)
        pairs.append((first_token_s(prompt), first_token_s(prompt)))
    new_s, again_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "first_token_512_ms": 1e3 * new_s,
        "first_token_512_again_ms": 1e3 * again_s,
        "prompt_again_speedup": new_s / again_s,
    }


def beside_samples(bench: Bench) -> dict[str, float]:
    """A training step of 64 tokens, alone and while 256 sequences are drawn."""
    bench.create("small", RANK)
    work = {"small": [bench.datum(64)]}
    idle_s = statistics.median(bench.median_s(lambda: bench.train(work)) for _ in range(3))
    drawing = [
        Sample(prompt=bench.rng.integers(0, VOCAB, 40), num_samples=4, snapshot_id=None, seed=i, max_tokens=200)
        for i in range(64)
    ]
    for ticket, operation in enumerate(drawing, start=_APART):
        bench.engine.accept(ticket, operation)
    while bench.engine.status().num_running < len(drawing):
        bench.engine.work()
    beside_s = statistics.median(bench.median_s(lambda: bench.train(work)) for _ in range(3))
    assert bench.engine.status().num_running == len(drawing), "the samples ended too early to be company"
    for ticket in range(_APART, _APART + len(drawing)):
        bench.engine.accept(0, CancelSample(ticket=ticket))
    while bench.engine.has_work:
        bench.engine.work()
    return {
        "small_step_ms": 1e3 * idle_s,
        "small_step_beside_256_samples_ms": 1e3 * beside_s,
        "small_step_beside_over_idle": beside_s / idle_s,
    }


def gemm_flops_per_s() -> float:
    """The best rate of a large bfloat16 product on this machine."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return float(2 * 2048**3 / best)


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def make_model(folder: Path, width: int, num_layers: int = LAYERS) -> None:
    torch.manual_seed(0)
    num_heads = width // 64
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(n for n in range(1, max(1, num_heads // 3) + 1) if num_heads % n == 0),
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--quick", action="store_true", help="one repetition each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), arguments.width)
        bench = Bench(Path(folder), 1 if arguments.quick else 3)
        figures = training(bench) | wide_training(bench.repeat) | tenants(bench)
        figures |= sampling(bench) | beside_samples(bench)
    model = f"Qwen3, {arguments.width} wide, {LAYERS} layers, {VOCAB} vocabulary, random"
    write_record(f"compare-{arguments.width}", model, figures)


def write_record(name: str, model: str, figures: dict[str, float]) -> None:
    """Keep the figures with the machine described, and print them."""
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "model": model,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[1],
        "figures": rounded,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", str(record["cpu"]).lower()).strip("-")
    path = RESULTS / f"{record['date']}-{name}-{slug}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    width = max(map(len, rounded))
    print("\n".join(f"{name:<{width}}  {value:>10,.4g}" for name, value in rounded.items()))


if __name__ == "__main__":
    main()
