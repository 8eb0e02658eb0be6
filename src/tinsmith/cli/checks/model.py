"""The base model in an engine of its own, as a server would run it: does it load, in which dtype, and do its two sides
agree on what is likely?

A short text is learnt at a large step size, so that the adapter says something; its weights are published, sampled, and
what was drawn is scored by a training pass. Both sides must give every token the same log-probability, up to rounding.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinsmith.cli.checks.finding import Finding, fail, ok, warn
from tinsmith.runtime.process import ProcessEngine
from tinsmith.types.datum import Datum, ModelInput
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import TinsmithError
from tinsmith.types.operations import (
    BaseModelCard,
    CreateAdapter,
    LoraSpec,
    OptimStep,
    PublishSnapshot,
    Sample,
    TrainItem,
)
from tinsmith.types.params import AdamParams

AGREEMENT = {"float32": 1e-3, "bfloat16": 0.15}
"""Largest difference of a log-probability (nats) that rounding explains, by dtype."""
_SAMPLES = 4
_NEW_TOKENS = 24
_STEPS = 4
_START_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Between what the sampler and the trainer say of the same tokens, in nats."""

    num_tokens: int
    largest: float
    mean: float


def model(source: ModelSource, options: EngineOptions) -> Iterator[Finding]:
    began = time.perf_counter()
    try:
        card, agreement, loaded_s = asyncio.run(_try(source, options))
    except TinsmithError as error:
        yield fail("model", f"{source.name}: {error}", "give another --base-model, --dtype or --device")
        return
    except TimeoutError:
        yield fail("model", f"{source.name} did not load within {_START_S:.0f} s", "look at memory and disk")
        return
    took = time.perf_counter() - began
    size = f"{card.num_parameters / 1e6:,.1f} M parameters"
    yield ok("model", f"{card.name}: {card.architecture}, {size}, loads in {loaded_s:.1f} s, tried in {took:.1f} s")
    yield ok("dtype", f"{card.dtype} on {card.device}{_measured(source, options, card)}")
    yield judge(agreement, card.dtype)


def judge(agreement: Agreement, dtype: str) -> Finding:
    limit = AGREEMENT.get(dtype, AGREEMENT["bfloat16"])
    found = (
        f"sampler and trainer differ by {agreement.largest:.2g} nats at most, {agreement.mean:.2g} on average, "
        f"over {agreement.num_tokens} tokens (limit {limit:g})"
    )
    if not np.isfinite(agreement.largest) or agreement.largest > 10 * limit:
        return fail("agreement", found, "reinforcement learning would be biased: report the model, use --dtype float32")
    if agreement.largest > limit:
        return warn(
            "agreement", found, "use --dtype float32 for reinforcement learning, or correct by importance weights"
        )
    return ok("agreement", found)


def _measured(source: ModelSource, options: EngineOptions, card: BaseModelCard) -> str:
    """What `auto` goes by, in its own words."""
    if options.dtype != "auto":
        return ", as asked"
    import torch
    from transformers import AutoConfig

    from tinsmith.engine.hardware import pick_dtype

    width = AutoConfig.from_pretrained(source.load_from).get_text_config().hidden_size
    return f" ({pick_dtype('auto', torch.device(card.device), width).reason})"


async def _try(source: ModelSource, options: EngineOptions) -> tuple[BaseModelCard, Agreement, float]:
    engine = ProcessEngine(source, options)
    began = time.perf_counter()
    try:
        card = await asyncio.wait_for(engine.start(), _START_S)
        loaded_s = time.perf_counter() - began
        return card, await _measure(engine, card), loaded_s
    finally:
        await engine.close()


async def _measure(engine: ProcessEngine, card: BaseModelCard) -> Agreement:
    prompt = (np.arange(1, 17) * 7919 % (card.vocab_size - 1) + 1).astype(np.int64)
    spec = LoraSpec(rank=min(8, card.max_rank), seed=1, train_unembed=False)
    await engine.submit(CreateAdapter(model_id="doctor", lora=spec)).answer
    for _ in range(_STEPS):
        await engine.submit(_train([prompt], forward_only=False)).answer
        await engine.submit(OptimStep(model_id="doctor", params=AdamParams(learning_rate=3e-3))).answer
    await engine.submit(PublishSnapshot(model_id="doctor", snapshot_id="doctor")).answer
    draw = Sample(prompt=prompt, num_samples=_SAMPLES, snapshot_id="doctor", seed=1, max_tokens=_NEW_TOKENS)
    drawn = (await engine.submit(draw).answer).sequences
    texts = [np.concatenate([prompt, sequence.tokens_np]) for sequence in drawn]
    scored = await engine.submit(_train(texts, forward_only=True)).answer
    differences = [_difference(sequence, output["logprobs"].to_numpy()) for sequence, output in _pairs(drawn, scored)]
    apart = np.abs(np.concatenate(differences))
    return Agreement(num_tokens=len(apart), largest=float(apart.max()), mean=float(apart.mean()))


def _pairs(drawn: Any, scored: Any) -> Iterator[tuple[Any, Any]]:
    return zip(drawn, scored.loss_fn_outputs, strict=True)


def _difference(sequence: Any, logprobs_N: np.ndarray) -> np.ndarray:
    """The drawn tokens are the last of the text, and so are their scores."""
    return np.asarray(sequence.logprobs_np - logprobs_N[-len(sequence.tokens_np) :], dtype=np.float64)


def _train(texts: list[np.ndarray], *, forward_only: bool) -> TrainItem:
    data = tuple(
        Datum(
            ModelInput.from_ints(text[:-1].tolist()),
            {"target_tokens": text[1:].tolist(), "weights": [1.0] * (len(text) - 1)},
        )
        for text in texts
    )
    return TrainItem(model_id="doctor", data=data, loss_fn="cross_entropy", forward_only=forward_only)
