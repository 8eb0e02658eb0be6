"""The training and the sampling port: where adapters are made, trained, stored and sampled."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from tinsmith.data import ChatTokenizer
from tinsmith.types import AdamParams, Datum, ForwardBackwardOutput, OptimStepResponse, SampleResponse, SamplingParams

T_co = TypeVar("T_co", covariant=True)
LossConfig: TypeAlias = "Mapping[str, float | str] | None"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LossGradient:
    """What a loss of one's own came to."""

    loss: float
    gradients: Sequence[np.ndarray]
    """dloss/dlogprobs of each datum, in the shape of its `target_tokens`, float32."""
    metrics: Mapping[str, float] = field(default_factory=dict)


CustomLoss: TypeAlias = Callable[[Sequence[Datum], Sequence[np.ndarray]], LossGradient]
"""A loss of log-probabilities: the datums, and for each those of its target tokens."""


class Sampler(Protocol):
    """Fixed weights to draw from."""

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    def sample(self, prompt: Sequence[int], params: SamplingParams, *, num_samples: int) -> Pending[SampleResponse]: ...

    def compute_logprobs(self, tokens: Sequence[int]) -> Pending[list[float | None]]:
        """Of each token after those before it; the first has none."""

    def topk_logprobs(self, tokens: Sequence[int], k: int) -> Pending[list[list[tuple[int, float]] | None]]:
        """For each token the `k` likeliest in its place and their log-probabilities, the likeliest first.

        The first token has none.
        """


class TrainingSession(Protocol):
    """One adapter in training. Operations take effect in the order they are submitted, whenever results are read.

    One that also has a `max_context`, in tokens, is sent no data that is longer: it is refused while it is read.
    """

    @property
    def run_id(self) -> str: ...

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> Pending[ForwardBackwardOutput]:
        """Add the gradient of the loss, a sum over tokens, to what the next `optim_step` takes."""

    def forward_backward_custom(self, data: Sequence[Datum], loss: CustomLoss) -> Pending[ForwardBackwardOutput]:
        """As `forward_backward`, with a loss that is computed here, between a forward and a backward pass."""

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> Pending[ForwardBackwardOutput]: ...

    def optim_step(self, params: AdamParams | float) -> Pending[OptimStepResponse]:
        """A bare number is a learning rate."""

    def save(self, name: str) -> Pending[CheckpointPaths]:
        """Store weights and optimizer as of this point in the order of operations."""

    def sampler(self) -> Sampler:
        """The weights as of this point in the order of operations; later steps do not change them."""


class TrainingClient(Protocol):
    """Training, as workflows call it. `session` is whatever `start_session` returned.

    An adapter that inherits from this class and whose sessions are `TrainingSession`s needs `start_session` alone.
    """

    def start_session(self, spec: SessionSpec) -> Any: ...

    def forward_backward(
        self, session: Any, datums: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: LossConfig = None
    ) -> Pending[ForwardBackwardOutput]:
        found: Pending[ForwardBackwardOutput] = session.forward_backward(datums, loss_fn, loss_fn_config)
        return found

    def forward_backward_custom(
        self, session: Any, datums: Sequence[Datum], loss: CustomLoss
    ) -> Pending[ForwardBackwardOutput]:
        found: Pending[ForwardBackwardOutput] = session.forward_backward_custom(datums, loss)
        return found

    def forward(
        self, session: Any, datums: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: LossConfig = None
    ) -> Pending[ForwardBackwardOutput]:
        found: Pending[ForwardBackwardOutput] = session.forward(datums, loss_fn, loss_fn_config)
        return found

    def optim_step(self, session: Any, params: AdamParams | float) -> Pending[OptimStepResponse]:
        found: Pending[OptimStepResponse] = session.optim_step(params)
        return found

    def save_checkpoint(self, session: Any, name: str) -> Pending[CheckpointPaths]:
        """Both paths survive the session, and a crash of this program."""
        found: Pending[CheckpointPaths] = session.save(name)
        return found

    def load_checkpoint(self, spec: SessionSpec, path: str) -> Any:
        """A session that goes on from a `state` path, with its optimizer."""
        return self.start_session(
            SessionSpec(
                model=spec.model, lora_rank=spec.lora_rank, seed=spec.seed, resume_from=path, metadata=spec.metadata
            )
        )

    def sampler(self, session: Any) -> Sampler:
        found: Sampler = session.sampler()
        return found

    def get_tokenizer(self, session: Any) -> ChatTokenizer:
        found: ChatTokenizer = session.tokenizer
        return found

    def run_id(self, session: Any) -> str:
        return str(session.run_id)

    def close_session(self, session: Any) -> None:
        """The session will not be used again. Its checkpoints stay."""
        return


class SamplingClient(Protocol):
    """Sampling from a base model or a checkpoint."""

    def open_sampler(self, model: str) -> Sampler:
        """`model` is a base model or a `tinker://` path of sampler weights."""

    def sample(
        self, sampler: Sampler, prompt: Sequence[int], params: SamplingParams, num_samples: int = 1
    ) -> Pending[SampleResponse]:
        return sampler.sample(prompt, params, num_samples=num_samples)

    def compute_logprobs(self, sampler: Sampler, tokens: Sequence[int]) -> Pending[list[float | None]]:
        return sampler.compute_logprobs(tokens)

    def close_sampler(self, sampler: Sampler) -> None:
        """The sampler will not be used again."""
        return


class TrainingBackend(TrainingClient, SamplingClient, Protocol):
    """A server, an embedded engine, or a fake: both ports in one."""

    @property
    def location(self) -> str | None:
        """Where the checkpoints can be reached again; `None` if they lie in the run's own folder."""

    def close(self, *, failed: bool = False) -> None:
        """Give everything back. Checkpoints stay."""
