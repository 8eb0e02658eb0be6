"""The training port over any server that speaks the Tinker API, or over the one embedded in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlencode

from tinsmith.data import ChatTokenizer
from tinsmith.kitchen.ports import (
    CheckpointPaths,
    CustomLoss,
    Pending,
    Sampler,
    SessionSpec,
    TrainingBackend,
    TrainingSession,
    adam_params,
)
from tinsmith.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    OptimStepResponse,
    SampleResponse,
    SamplingParams,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from tinsmith.types.engine_options import ModelSource
from tinsmith.types.errors import Unsupported

if TYPE_CHECKING:
    import torch

    from tinsmith.client import SamplingClient, TrainingClient

CLOSE_TIMEOUT_S = 10.0


def open_backend(*, base_url: str | None, model: str, store: Path | None = None) -> TinkerBackend:
    """Connect to `base_url`, or to the server that the environment names, or to an embedded engine.

    An embedded engine loads `model` and keeps its checkpoints in `store` (`None`: in the user's data folder), unless
    the URL itself says otherwise. Raises `InvalidInput` if `model` looks like a folder and is none.
    """
    from tinsmith.client.config import is_local_url, resolve_config

    url = resolve_config(base_url=base_url).base_url
    if not is_local_url(url):
        return TinkerBackend(url, location=url)
    in_own_store = store is not None and "data_dir" not in _options(url)
    return TinkerBackend(_complete(url, model=model, store=store), location=None if in_own_store else url)


def _complete(url: str, *, model: str, store: Path | None) -> str:
    options = _options(url)
    if "base_model" not in options:
        options["base_model"] = [model]
    if store is not None:
        options.setdefault("data_dir", [str(store.absolute())])
    return "local:?" + urlencode(options, doseq=True)


def _options(url: str) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    for name, value in parse_qsl(url.partition("?")[2], keep_blank_values=True):
        options.setdefault(name, []).append(value)
    return options


class TinkerBackend(TrainingBackend):
    """One service client, and with it one session on the server."""

    def __init__(self, base_url: str, *, location: str | None, api_key: str | None = None) -> None:
        from tinsmith.client import ServiceClient

        self._service = ServiceClient(base_url=base_url, api_key=api_key)
        self.base_url = base_url
        self._location = location

    @property
    def location(self) -> str | None:
        return self._location

    def start_session(self, spec: SessionSpec) -> TrainingSession:
        metadata, name = dict(spec.metadata), _served_name(spec.model, self.base_url)
        if spec.resume_from is not None:
            client = self._service.create_training_client_from_state_with_optimizer(
                spec.resume_from, user_metadata=metadata
            ).result()
        else:
            client = self._service.create_lora_training_client(
                name, rank=spec.lora_rank, seed=spec.seed, user_metadata=metadata
            ).result()
        return TinkerSession(client=client, max_context=self._max_context(name))

    def _max_context(self, name: str) -> int | None:
        from tinsmith.client import RestClient

        served = RestClient(self._service.holder).get_server_capabilities().result().supported_models
        return next((model.max_context_length for model in served if model.model_name == name), None)

    def open_sampler(self, model: str) -> Sampler:
        if model.startswith("tinker://"):
            return TinkerSampler(client=self._service.create_sampling_client(model_path=model).result())
        name = _served_name(model, self.base_url)
        return TinkerSampler(client=self._service.create_sampling_client(base_model=name).result())

    def close(self, *, failed: bool = False) -> None:
        self._service.close("errored" if failed else "success").result(timeout=CLOSE_TIMEOUT_S)


def _served_name(model: str, base_url: str) -> str:
    """What the server calls `model`: an embedded one was given it as ID, FOLDER or NAME=FOLDER."""
    return ModelSource.parse(model).name if base_url.startswith("local:") else model


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerSession:
    client: TrainingClient
    max_context: int | None
    """As the server says; `None` if it does not."""

    @property
    def run_id(self) -> str:
        return str(self.client.model_id)

    @property
    def tokenizer(self) -> ChatTokenizer:
        return cast(ChatTokenizer, self.client.get_tokenizer())

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Pending[ForwardBackwardOutput]:
        return self.client.forward_backward(list(data), loss_fn, loss_fn_config)

    def forward_backward_custom(self, data: Sequence[Datum], loss: CustomLoss) -> Pending[ForwardBackwardOutput]:
        return self.client.forward_backward_custom(list(data), _as_torch(loss))

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Pending[ForwardBackwardOutput]:
        return self.client.forward(list(data), loss_fn, loss_fn_config)

    def optim_step(self, params: AdamParams | float) -> Pending[OptimStepResponse]:
        return self.client.optim_step(adam_params(params))

    def save(self, name: str) -> Pending[CheckpointPaths]:
        return _BothSaved(state=self.client.save_state(name), sampler=self.client.save_weights_for_sampler(name))

    def sampler(self) -> Sampler:
        return TinkerSampler(client=self.client.save_weights_and_get_sampling_client().result())


def _as_torch(loss: CustomLoss) -> Any:
    """The loss in the form the client takes: a tensor whose value is the loss and whose gradient is its gradient."""

    def function(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        import torch

        found = loss(data, [values.detach().float().numpy() for values in logprobs])
        total = torch.tensor(found.loss, dtype=torch.float64)
        for values, gradient in zip(logprobs, found.gradients, strict=True):
            total = total + (torch.from_numpy(gradient) * (values - values.detach())).sum()
        return total, found.metrics

    return function


@dataclass(frozen=True, slots=True, kw_only=True)
class _BothSaved:
    state: Pending[SaveWeightsResponse]
    sampler: Pending[SaveWeightsForSamplerResponse]

    def result(self, timeout: float | None = None) -> CheckpointPaths:
        return CheckpointPaths(state=self.state.result(timeout).path, sampler=self.sampler.result(timeout).path)

    async def result_async(self, timeout: float | None = None) -> CheckpointPaths:
        async with asyncio.timeout(timeout):
            return CheckpointPaths(state=(await self.state).path, sampler=(await self.sampler).path)

    def __await__(self) -> Generator[Any, None, CheckpointPaths]:
        return self.result_async().__await__()


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerSampler:
    client: SamplingClient

    @property
    def tokenizer(self) -> ChatTokenizer:
        return cast(ChatTokenizer, self.client.get_tokenizer())

    def sample(self, prompt: Sequence[int], params: SamplingParams, *, num_samples: int) -> Pending[SampleResponse]:
        return self.client.sample(ModelInput.from_ints(prompt), num_samples, params)

    def compute_logprobs(self, tokens: Sequence[int]) -> Pending[list[float | None]]:
        return self.client.compute_logprobs(ModelInput.from_ints(tokens))

    def topk_logprobs(self, tokens: Sequence[int], k: int) -> Pending[list[list[tuple[int, float]] | None]]:
        asked = self.client.sample(
            ModelInput.from_ints(tokens), 1, SamplingParams(max_tokens=1), True, topk_prompt_logprobs=k
        )
        return _TopK(asked=asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TopK:
    """What a scored prompt says of its positions."""

    asked: Pending[SampleResponse]

    def result(self, timeout: float | None = None) -> list[list[tuple[int, float]] | None]:
        return _topk_of(self.asked.result(timeout))

    async def result_async(self, timeout: float | None = None) -> list[list[tuple[int, float]] | None]:
        return _topk_of(await self.asked.result_async(timeout))

    def __await__(self) -> Generator[Any, None, list[list[tuple[int, float]] | None]]:
        return self.result_async().__await__()


def _topk_of(response: SampleResponse) -> list[list[tuple[int, float]] | None]:
    """Raises `Unsupported` if the server left them out."""
    found = response.topk_prompt_logprobs
    if found is None:
        raise Unsupported("the server gives no likeliest tokens of a prompt (topk_prompt_logprobs)")
    return found
