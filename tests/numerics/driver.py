"""An engine one can call like a function, and data to feed it."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinsmith.engine.engine import Engine
from tinsmith.engine.process_settings import process_settings
from tinsmith.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput, SampleResponse
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import TinsmithError
from tinsmith.types.operations import CreateAdapter, LoraSpec, OptimStep, Sample, TrainItem

VOCAB = 160


def plain_model(folder: Path) -> PreTrainedModel:
    """The same model as transformers runs it, for reference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class Driver:
    """An engine, one operation at a time."""

    def __init__(self, folder: Path, **options: Any) -> None:
        source = ModelSource(name="test/model", location=str(folder))
        chosen = EngineOptions(**{"dtype": "float32", "device": "cpu", **options})
        settings = ExitStack()
        settings.enter_context(process_settings(chosen))
        weakref.finalize(self, settings.close)
        self.engine = Engine(source, chosen)

    def __call__(self, operation: Any) -> Any:
        (outcome,) = self.all([operation])
        if isinstance(outcome, TinsmithError):
            raise outcome
        return outcome

    def all(self, operations: list[Any]) -> list[Any]:
        """Submit all, then work until every one is answered; outcomes in the order of submission."""
        for ticket, operation in enumerate(operations):
            self.engine.accept(ticket, operation)
        outcomes: dict[int, Any] = {}
        for _ in range(100_000):
            outcomes.update(self.engine.work())
            if len(outcomes) == len(operations):
                return [outcomes[ticket] for ticket in range(len(operations))]
        raise AssertionError("the engine never finished")

    def create(self, model_id: str, *, rank: int = 4, seed: int = 1, **flags: Any) -> None:
        self(CreateAdapter(model_id=model_id, lora=LoraSpec(rank=rank, seed=seed, **flags)))

    def train(self, *items: TrainItem) -> list[ForwardBackwardOutput]:
        outcomes = self.all(list(items))
        for outcome in outcomes:
            if isinstance(outcome, TinsmithError):
                raise outcome
        return outcomes

    def step(self, model_id: str, **params: float) -> dict[str, float]:
        return self(OptimStep(model_id=model_id, params=AdamParams(**params)))

    def sample(self, prompt: list[int], **fields: Any) -> SampleResponse:
        return self(sample_operation(prompt, **fields))

    def weights(self, model_id: str) -> np.ndarray:
        return self.engine._adapters[model_id].weights.flat_P.numpy().copy()

    def grads(self, model_id: str) -> np.ndarray:
        return self.engine._adapters[model_id].grads_P.numpy().copy()

    def randomize(self, model_id: str, seed: int = 7, scale: float = 0.05) -> None:
        """Weights as after training: B is no longer zero."""
        adapter = self.engine._adapters[model_id]
        noise = torch.randn(adapter.weights.flat_P.shape, generator=torch.Generator().manual_seed(seed))
        adapter.weights.flat_P.add_(noise * scale)
        adapter.weights.changed()


def sample_operation(prompt: list[int], **fields: Any) -> Sample:
    defaults: dict[str, Any] = {"num_samples": 1, "snapshot_id": None, "seed": 0, "max_tokens": 8}
    return Sample(prompt=np.asarray(prompt, dtype=np.int64), **{**defaults, **fields})


def random_datum(rng: np.random.Generator, length: int, **inputs: Any) -> Datum:
    tokens = rng.integers(0, VOCAB, length + 1)
    weights = rng.random(length).astype(np.float32)
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights, **inputs})


def rl_datum(rng: np.random.Generator, length: int) -> Datum:
    tokens = rng.integers(0, VOCAB, length + 1)
    return Datum(
        ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": (rng.normal(-5, 0.5, length)).astype(np.float32),
            "advantages": rng.normal(0, 1, length).astype(np.float32),
        },
    )


def item(model_id: str, *data: Datum, loss_fn: str = "cross_entropy", **fields: Any) -> TrainItem:
    return TrainItem(model_id=model_id, data=tuple(data), loss_fn=loss_fn, **fields)
