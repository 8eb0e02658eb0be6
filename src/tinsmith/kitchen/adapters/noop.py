"""A training backend without a model: exact, instant, and with a loss that falls.

It answers every operation in order from a digest of everything it was given, so two runs that submit the same
operations report the same numbers, and any difference between them shows. It is for tests, dry runs and examples.
"""

# N token

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from tinsmith.data import ChatTokenizer, load_tokenizer
from tinsmith.kitchen.ports import CheckpointPaths, SessionSpec, adam_params
from tinsmith.models import TINY
from tinsmith.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
)
from tinsmith.types.errors import InvalidInput, NotFound

T = TypeVar("T")

FIRST_LOSS = 3.0
DECAY_PER_STEP = 0.1


class NoopFailure(RuntimeError):
    """The failure that a test asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    steps: int = 0
    digest: str = ""
    """Of every operation that changed the weights, in order."""

    def after(self, *parts: str) -> _Weights:
        return replace(self, digest=hashlib.sha256("\n".join((self.digest, *parts)).encode()).hexdigest())

    @property
    def loss(self) -> float:
        noise = int(self.digest[:8] or "0", 16) / 2**32
        return FIRST_LOSS * math.exp(-DECAY_PER_STEP * self.steps) * (1 + 0.02 * noise)


@dataclass(frozen=True, slots=True)
class NoopPending(Generic[T]):
    value: T
    on_read: Callable[[], None]

    def result(self, timeout: float | None = None) -> T:
        self.on_read()
        return self.value

    async def result_async(self, timeout: float | None = None) -> T:
        return self.result(timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()


@dataclass(slots=True)
class NoopBackend:
    """Keeps checkpoints in memory; give two backends the same `store` to let one resume what the other saved.

    With `fail_after_steps`, the first operation submitted after that many optimizer steps raises `NoopFailure`.
    """

    chat_tokenizer: ChatTokenizer | None = None
    """`None` takes that of tinsmith/tiny."""
    fail_after_steps: int | None = None
    store: dict[str, _Weights] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    """What was submitted and what was read, in order: `submit optim_step 1`, `read optim_step 1`."""
    adam_params: list[AdamParams] = field(default_factory=list)
    data: list[tuple[Datum, ...]] = field(default_factory=list)
    specs: list[SessionSpec] = field(default_factory=list)
    closed: bool = False

    @property
    def tokenizer(self) -> ChatTokenizer:
        if self.chat_tokenizer is None:
            self.chat_tokenizer = load_tokenizer(TINY)
        return self.chat_tokenizer

    def start_session(self, spec: SessionSpec) -> NoopSession:
        """Raises `NotFound` if there is no checkpoint under `resume_from`."""
        self.specs.append(spec)
        if spec.resume_from is None:
            weights = _Weights().after(spec.model, str(spec.lora_rank), str(spec.seed))
        elif spec.resume_from in self.store:
            weights = self.store[spec.resume_from]
        else:
            raise NotFound(f"no checkpoint {spec.resume_from!r}")
        return NoopSession(backend=self, run_id=f"noop-{len(self.specs)}", weights=weights)

    def open_sampler(self, model: str) -> NoopSampler:
        if model.startswith("tinker://") and model not in self.store:
            raise NotFound(f"no checkpoint {model!r}")
        return NoopSampler(tokenizer=self.tokenizer, text=f"I am {model}.")

    @property
    def location(self) -> str:
        return "noop:"

    def close(self, *, failed: bool = False) -> None:
        self.closed = True


@dataclass(slots=True, kw_only=True)
class NoopSession:
    backend: NoopBackend
    run_id: str
    weights: _Weights
    gradients: list[str] = field(default_factory=list)
    num_submitted: int = 0

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.backend.tokenizer

    def forward_backward(self, data: Sequence[Datum], loss_fn: str) -> NoopPending[ForwardBackwardOutput]:
        self.gradients.append(_digest(data))
        self.backend.data.append(tuple(data))
        return self._submit("forward_backward", self._output(data, loss_fn))

    def forward(self, data: Sequence[Datum], loss_fn: str) -> NoopPending[ForwardBackwardOutput]:
        return self._submit("forward", self._output(data, loss_fn))

    def optim_step(self, params: AdamParams | float) -> NoopPending[OptimStepResponse]:
        params = adam_params(params)
        self.backend.adam_params.append(params)
        moved = self.weights.after(*self.gradients, params.model_dump_json())
        pending = self._submit("optim_step", OptimStepResponse(metrics={"grad_norm:mean": moved.loss}))
        self.weights = replace(moved, steps=moved.steps + 1)
        self.gradients.clear()
        return pending

    def save(self, name: str) -> NoopPending[CheckpointPaths]:
        paths = CheckpointPaths(
            state=f"tinker://{self.run_id}/weights/{name}", sampler=f"tinker://{self.run_id}/sampler_weights/{name}"
        )
        self.backend.store |= {paths.state: self.weights, paths.sampler: self.weights}
        return self._submit("save", paths)

    def sampler(self) -> NoopSampler:
        return NoopSampler(tokenizer=self.tokenizer, text=f"I took {self.weights.steps} steps.")

    def _output(self, data: Sequence[Datum], loss_fn: str) -> ForwardBackwardOutput:
        """The loss is what a model would give whose every target has log-probability `-loss`."""
        if loss_fn != "cross_entropy":
            raise InvalidInput(f"loss_fn {loss_fn!r} is unknown to the noop backend; it has cross_entropy")
        loss = self.weights.after(_digest(data)).loss
        total = sum(float(datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64).sum()) for datum in data)
        return ForwardBackwardOutput(loss_fn, [{} for _ in data], {"loss:sum": loss * total})

    def _submit(self, operation: str, value: T) -> NoopPending[T]:
        backend, number = self.backend, self.weights.steps + 1
        if backend.fail_after_steps is not None and self.weights.steps >= backend.fail_after_steps:
            raise NoopFailure(f"{operation} after {self.weights.steps} steps, as asked")
        backend.calls.append(f"submit {operation} {number}")
        return NoopPending(value, lambda: backend.calls.append(f"read {operation} {number}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoopSampler:
    tokenizer: ChatTokenizer
    text: str

    def sample(self, prompt: Sequence[int], params: SamplingParams, *, num_samples: int) -> NoopPending[SampleResponse]:
        """Every sample spells `text`."""
        tokens = np.asarray(list(self.tokenizer(self.text, add_special_tokens=False)["input_ids"]), dtype=np.int64)
        if params.max_tokens is not None:
            tokens = tokens[: params.max_tokens]
        sequence = SampledSequence("stop", tokens_np=tokens, logprobs_np=np.zeros(len(tokens), dtype=np.float32))
        return NoopPending(SampleResponse([sequence] * num_samples), lambda: None)


def _digest(data: Sequence[Datum]) -> str:
    return hashlib.sha256(json.dumps([datum.model_dump() for datum in data]).encode()).hexdigest()
