"""A backend that is opened when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tinsmith.data import ChatTokenizer
from tinsmith.kitchen.ports import CheckpointPaths, CustomLoss, Pending, Sampler, SessionSpec, TrainingBackend
from tinsmith.kitchen.ports.training import LossConfig
from tinsmith.types import AdamParams, Datum, ForwardBackwardOutput, OptimStepResponse, SampleResponse, SamplingParams


class DeferredBackend(TrainingBackend):
    """Opens at the first call: data that cannot be read is found before a model is loaded. Hands everything on."""

    def __init__(self, connect: Callable[[], TrainingBackend]) -> None:
        self._connect = connect
        self._opened: TrainingBackend | None = None

    @property
    def _backend(self) -> TrainingBackend:
        if self._opened is None:
            self._opened = self._connect()
        return self._opened

    @property
    def location(self) -> str | None:
        return self._backend.location

    def start_session(self, spec: SessionSpec) -> Any:
        return self._backend.start_session(spec)

    def load_checkpoint(self, spec: SessionSpec, path: str) -> Any:
        return self._backend.load_checkpoint(spec, path)

    def forward_backward(
        self, session: Any, datums: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: LossConfig = None
    ) -> Pending[ForwardBackwardOutput]:
        return self._backend.forward_backward(session, datums, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self, session: Any, datums: Sequence[Datum], loss: CustomLoss
    ) -> Pending[ForwardBackwardOutput]:
        return self._backend.forward_backward_custom(session, datums, loss)

    def forward(
        self, session: Any, datums: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: LossConfig = None
    ) -> Pending[ForwardBackwardOutput]:
        return self._backend.forward(session, datums, loss_fn, loss_fn_config)

    def optim_step(self, session: Any, params: AdamParams | float) -> Pending[OptimStepResponse]:
        return self._backend.optim_step(session, params)

    def save_checkpoint(self, session: Any, name: str) -> Pending[CheckpointPaths]:
        return self._backend.save_checkpoint(session, name)

    def sampler(self, session: Any) -> Sampler:
        return self._backend.sampler(session)

    def get_tokenizer(self, session: Any) -> ChatTokenizer:
        return self._backend.get_tokenizer(session)

    def run_id(self, session: Any) -> str:
        return self._backend.run_id(session)

    def close_session(self, session: Any) -> None:
        self._backend.close_session(session)

    def open_sampler(self, model: str) -> Sampler:
        return self._backend.open_sampler(model)

    def sample(
        self, sampler: Sampler, prompt: Sequence[int], params: SamplingParams, num_samples: int = 1
    ) -> Pending[SampleResponse]:
        return self._backend.sample(sampler, prompt, params, num_samples)

    def compute_logprobs(self, sampler: Sampler, tokens: Sequence[int]) -> Pending[list[float | None]]:
        return self._backend.compute_logprobs(sampler, tokens)

    def close_sampler(self, sampler: Sampler) -> None:
        self._backend.close_sampler(sampler)

    def close(self, *, failed: bool = False) -> None:
        if self._opened is not None:
            self._opened.close(failed=failed)
