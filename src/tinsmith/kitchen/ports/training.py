"""The training port: where adapters are made, trained, stored and sampled."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tinsmith.data import ChatTokenizer
from tinsmith.types import AdamParams, Datum, ForwardBackwardOutput, OptimStepResponse, SampleResponse, SamplingParams

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A submitted operation. Wait for it from a thread, or await it in any event loop, as often as you like."""

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for it. Raises what the operation failed with; `TimeoutError` after `timeout` seconds."""

    async def result_async(self, timeout: float | None = None) -> T_co:
        """As `result`, without blocking the running event loop."""

    def __await__(self) -> Generator[Any, None, T_co]: ...


def adam_params(params: AdamParams | float) -> AdamParams:
    """A bare number is a learning rate; the rest are the defaults."""
    return params if isinstance(params, AdamParams) else AdamParams(learning_rate=params)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """What to train: a fresh LoRA adapter, or the one of a checkpoint with its optimizer."""

    model: str
    lora_rank: int
    seed: int
    """Fixes the adapter's initial weights."""
    resume_from: str | None = None
    """A `state` path of an earlier session of the same model; the rank and the seed are then the checkpoint's."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPaths:
    """Where one moment of an adapter is stored. Both outlive the session."""

    state: str
    """Weights and optimizer: to train on from."""
    sampler: str
    """Weights: to sample from."""


class Sampler(Protocol):
    """Fixed weights to draw from."""

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    def sample(self, prompt: Sequence[int], params: SamplingParams, *, num_samples: int) -> Pending[SampleResponse]: ...


class TrainingSession(Protocol):
    """One adapter in training. Operations take effect in the order they are submitted, whenever results are read."""

    @property
    def run_id(self) -> str: ...

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    def forward_backward(self, data: Sequence[Datum], loss_fn: str) -> Pending[ForwardBackwardOutput]:
        """Add the gradient of the loss, a sum over tokens, to what the next `optim_step` takes."""

    def forward(self, data: Sequence[Datum], loss_fn: str) -> Pending[ForwardBackwardOutput]: ...

    def optim_step(self, params: AdamParams | float) -> Pending[OptimStepResponse]:
        """A bare number is a learning rate."""

    def save(self, name: str) -> Pending[CheckpointPaths]:
        """Store weights and optimizer as of this point in the order of operations."""

    def sampler(self) -> Sampler:
        """The weights as of this point in the order of operations; later steps do not change them."""


class TrainingBackend(Protocol):
    """A server, an embedded engine, or a fake."""

    def start_session(self, spec: SessionSpec) -> TrainingSession: ...

    def open_sampler(self, model: str) -> Sampler:
        """`model` is a base model or a `tinker://` path of sampler weights."""

    @property
    def location(self) -> str | None:
        """Where the checkpoints can be reached again; `None` if they lie in the run's own folder."""

    def close(self, *, failed: bool = False) -> None:
        """Give everything back. Checkpoints stay."""
