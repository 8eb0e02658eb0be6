"""A training backend without a model: exact, instant, and with a loss that falls.

Every token has one log-probability, which rises with the optimizer steps; a sequence that a loss of one's own pushed up
or down has more or less of it. From the first step on the numbers depend on a digest of everything that was given, so
two runs that submit the same operations report the same numbers, and any difference between them shows. A fresh adapter
is the base model, and a sampler scores as training does. It is for tests, dry runs and examples.
"""

# N token

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final, Generic, TypeVar

import numpy as np

from tinsmith.data import ChatTokenizer, load_tokenizer
from tinsmith.kitchen.ports import CheckpointPaths, CustomLoss, LossGradient, SessionSpec, TrainingBackend, adam_params
from tinsmith.models import TINY
from tinsmith.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)
from tinsmith.types.errors import InvalidInput, NotFound

T = TypeVar("T")

FIRST_LOSS = 3.0
DECAY_PER_STEP = 0.1
PUSH_PER_STEP = 0.1
"""How much a step moves the log-probability of each token of a sequence that a custom loss pushed."""
LOSSES: Final = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")


class NoopFailure(RuntimeError):
    """The failure that a test asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    steps: int = 0
    digest: str = ""
    """Of every operation that changed the weights, in order."""
    pushes: Mapping[str, int] = field(default_factory=dict)
    """Digests of sequences to how many steps pushed them up, less those that pushed them down."""

    def after(self, *parts: str) -> _Weights:
        return replace(self, digest=hashlib.sha256("\n".join((self.digest, *parts)).encode()).hexdigest())

    @property
    def loss(self) -> float:
        return self.level * (1 + 0.02 * self.noise)

    @property
    def level(self) -> float:
        """The loss per token, but for the noise."""
        return FIRST_LOSS * math.exp(-DECAY_PER_STEP * self.steps)

    @property
    def noise(self) -> float:
        """From 0 to 1, and 0 before the first step."""
        return int(self.digest[:8] or "0", 16) / 2**32 if self.steps else 0.0

    def logprob(self, tokens: Sequence[int]) -> float:
        """Of each token of a sequence."""
        return min(-1e-3, PUSH_PER_STEP * self.pushes.get(_key(tokens), 0) - self.level)

    def pushed(self, pushes: Mapping[str, int]) -> _Weights:
        return replace(
            self, pushes={key: self.pushes.get(key, 0) + pushes.get(key, 0) for key in {**self.pushes, **pushes}}
        )


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
class NoopBackend(TrainingBackend):
    """Keeps checkpoints in memory; give two backends the same `store` to let one resume what the other saved.

    With `fail_after_steps`, the first operation submitted after that many optimizer steps of its session raises
    `NoopFailure`; `fail_after_submitted_steps` counts those of all sessions.
    """

    chat_tokenizer: ChatTokenizer | None = None
    """`None` takes that of tinsmith/tiny."""
    max_context: int | None = None
    """Tokens that the model is said to take; `None` says nothing."""
    fail_after_steps: int | None = None
    fail_after_submitted_steps: int | None = None
    store: dict[str, _Weights] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    """What was submitted and what was read, in order: `submit optim_step 1`, `read optim_step 1`."""
    adam_params: list[AdamParams] = field(default_factory=list)
    data: list[tuple[Datum, ...]] = field(default_factory=list)
    loss_configs: list[tuple[str, Mapping[str, float | str]]] = field(default_factory=list)
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
        weights = self.store.get(model, _Weights())
        return NoopSampler(tokenizer=self.tokenizer, text=f"I am {model}.", weights=weights)

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
    pushes: dict[str, int] = field(default_factory=dict)

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.backend.tokenizer

    @property
    def max_context(self) -> int | None:
        return self.backend.max_context

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> NoopPending[ForwardBackwardOutput]:
        output = self._output(data, loss_fn)
        self.gradients.append(_digest(data) + json.dumps([loss_fn, dict(loss_fn_config or {})]))
        self.backend.data.append(tuple(data))
        self.backend.loss_configs.append((loss_fn, dict(loss_fn_config or {})))
        return self._submit("forward_backward", output)

    def forward_backward_custom(self, data: Sequence[Datum], loss: CustomLoss) -> NoopPending[ForwardBackwardOutput]:
        found = loss(list(data), self._logprobs(data))
        for datum, gradient in zip(data, found.gradients, strict=True):
            direction = float(np.sum(gradient))
            if direction:
                key = _key(datum.model_input.to_ints())
                self.pushes[key] = self.pushes.get(key, 0) + (1 if direction < 0 else -1)
        self.gradients.append(_digest(data) + repr(found.loss))
        self.backend.data.append(tuple(data))
        return self._submit("forward_backward", self._custom_output(data, found))

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> NoopPending[ForwardBackwardOutput]:
        return self._submit("forward", self._output(data, loss_fn))

    def optim_step(self, params: AdamParams | float) -> NoopPending[OptimStepResponse]:
        params = adam_params(params)
        self.backend.adam_params.append(params)
        moved = self.weights.after(*self.gradients, params.model_dump_json())
        pending = self._submit("optim_step", OptimStepResponse(metrics={"grad_norm:mean": moved.loss}))
        self.weights = replace(moved, steps=moved.steps + 1).pushed(self.pushes)
        self.gradients.clear()
        self.pushes = {}
        return pending

    def save(self, name: str) -> NoopPending[CheckpointPaths]:
        paths = CheckpointPaths(
            state=f"tinker://{self.run_id}/weights/{name}", sampler=f"tinker://{self.run_id}/sampler_weights/{name}"
        )
        self.backend.store |= {paths.state: self.weights, paths.sampler: self.weights}
        return self._submit("save", paths)

    def sampler(self) -> NoopSampler:
        text = f"I took {self.weights.steps} steps."
        return NoopSampler(tokenizer=self.tokenizer, text=text, weights=self.weights)

    def _output(self, data: Sequence[Datum], loss_fn: str) -> ForwardBackwardOutput:
        """As of a model whose every target has log-probability `-loss`; a policy loss is a tenth of that."""
        if loss_fn not in LOSSES:
            raise InvalidInput(f"loss_fn {loss_fn!r} is unknown to the noop backend; it has {', '.join(LOSSES)}")
        loss = self.weights.after(_digest(data)).loss
        total = 0.1
        if loss_fn == "cross_entropy":
            total = sum(float(datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64).sum()) for datum in data)
        outputs = [{"logprobs": TensorData.from_numpy(values)} for values in self._logprobs(data)]
        return ForwardBackwardOutput(loss_fn, outputs, {"loss:sum": loss * total})

    def _custom_output(self, data: Sequence[Datum], found: LossGradient) -> ForwardBackwardOutput:
        outputs = [{"logprobs": TensorData.from_numpy(values)} for values in self._logprobs(data)]
        return ForwardBackwardOutput("custom", outputs, {"loss:sum": found.loss, **found.metrics})

    def _logprobs(self, data: Sequence[Datum]) -> list[np.ndarray]:
        return [
            np.full(
                datum.loss_fn_inputs["target_tokens"].to_numpy().shape,
                self.weights.logprob(datum.model_input.to_ints()),
                dtype=np.float32,
            )
            for datum in data
        ]

    def _submit(self, operation: str, value: T) -> NoopPending[T]:
        backend, number = self.backend, self.weights.steps + 1
        if backend.fail_after_steps is not None and self.weights.steps >= backend.fail_after_steps:
            raise NoopFailure(f"{operation} after {self.weights.steps} steps, as asked")
        if backend.fail_after_submitted_steps is not None:
            submitted = sum(1 for call in backend.calls if call.startswith("submit optim_step"))
            if submitted >= backend.fail_after_submitted_steps:
                raise NoopFailure(f"{operation} after {submitted} steps of all sessions, as asked")
        backend.calls.append(f"submit {operation} {number}")
        return NoopPending(value, lambda: backend.calls.append(f"read {operation} {number}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoopSampler:
    """Without a seed every sample spells `text`; with one, samples are digits that the seed draws."""

    tokenizer: ChatTokenizer
    text: str
    weights: _Weights = field(default_factory=_Weights)

    def sample(self, prompt: Sequence[int], params: SamplingParams, *, num_samples: int) -> NoopPending[SampleResponse]:
        texts = [self.text] * num_samples
        if params.seed is not None:
            rng = Random(f"{params.seed}/{list(prompt)}")
            texts = [str(rng.randrange(10)) for _ in range(num_samples)]
        return NoopPending(SampleResponse([self._sequence(text, prompt, params) for text in texts]), lambda: None)

    def compute_logprobs(self, tokens: Sequence[int]) -> NoopPending[list[float | None]]:
        logprob = self.weights.logprob(list(tokens)[:-1])
        return NoopPending([None, *[logprob] * (len(tokens) - 1)], lambda: None)

    def topk_logprobs(self, tokens: Sequence[int], k: int) -> NoopPending[list[list[tuple[int, float]] | None]]:
        """The token itself as `compute_logprobs` scores it, then the ids after it, each a nat less likely."""
        logprob = self.weights.logprob(list(tokens)[:-1])
        rows = [[(token + place, logprob - place) for place in range(k)] for token in list(tokens)[1:]]
        return NoopPending([None, *rows], lambda: None)

    def _sequence(self, text: str, prompt: Sequence[int], params: SamplingParams) -> SampledSequence:
        tokens = np.asarray(list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), dtype=np.int64)
        if params.max_tokens is not None:
            tokens = tokens[: params.max_tokens]
        logprob = self.weights.logprob([*prompt, *tokens.tolist()][:-1])
        return SampledSequence("stop", tokens_np=tokens, logprobs_np=np.full(len(tokens), logprob, dtype=np.float32))


def _key(tokens: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(tokens)).encode()).hexdigest()


def _digest(data: Sequence[Datum]) -> str:
    return hashlib.sha256(json.dumps([datum.model_dump() for datum in data]).encode()).hexdigest()
