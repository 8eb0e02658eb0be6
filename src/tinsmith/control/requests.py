"""What a dialect asks of control: one immutable value per submitted request, free of any wire format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.types.custom_loss import CustomLoss
from tinsmith.types.datum import Datum, ModelInput
from tinsmith.types.errors import TinsmithError
from tinsmith.types.params import AdamParams, LoraConfig, SamplingParams
from tinsmith.types.tensor import TensorData


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
    tags: tuple[str, ...] = ()
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None
    owner: str = LOCAL_USER_ID
    timeout_s: float | None = None
    """Silence after which the session ends; `None` takes the server's."""
    orders_by_arrival: bool = False
    """Whether requests of its models come without numbers and are done in the order they arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateModel:
    session_id: str
    model_seq_id: int
    base_model: str
    lora_config: LoraConfig
    alpha: float | None = None
    """LoRA alpha; `None` takes the default of 32."""
    optimizer_type: str = "adamw"
    user_metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateModelFromCheckpoint:
    """A new model whose first operation is the load (create-via-load)."""

    session_id: str
    model_seq_id: int
    path: str
    optimizer: bool
    base_model: str | None = None
    optimizer_type: str = "adamw"
    user_metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateCustomLoss:
    session_id: str
    custom_loss_seq_id: int
    loss: CustomLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackward:
    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False
    custom_loss: CustomLoss | None = None
    """What a `loss_id` in `loss_fn_config` stands for; filled in when the request is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyOptimizer:
    model_id: str
    seq_id: int
    params: AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveState:
    """A checkpoint with optimizer state, to train on from."""

    model_id: str
    seq_id: int
    name: str
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveForSampler:
    """A named sampler checkpoint (`name`), or an ephemeral sampler (`sampling_session_seq_id`)."""

    model_id: str
    seq_id: int
    name: str | None = None
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveExternal:
    """A checkpoint to be downloaded: weights in PEFT's layout, no optimizer state. It cannot be loaded again."""

    model_id: str
    seq_id: int
    name: str
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadState:
    """Overwrite a live model's weights (and optimizer) with a checkpoint's."""

    model_id: str
    seq_id: int
    path: str
    optimizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadModel:
    """End a model; in the model's order if it has a `seq_id`."""

    model_id: str
    seq_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Work that a dialect does, as the ledger can hold it: after a crash it is done again from here (`Recipes`)."""

    kind: str
    details: Mapping[str, Any]
    """JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """A training request that has its turn already; its data come of the recipe."""

    model_id: str
    recipe: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A request whose content was found bad while decoding; it consumes its `seq_id` and fails its future."""

    model_id: str
    seq_id: int
    error: TinsmithError


ModelRequest: TypeAlias = (
    ForwardBackward | ApplyOptimizer | SaveState | SaveForSampler | SaveExternal | LoadState | UnloadModel | Rejected
)
"""Requests that wait in the queue of one model, in the order of their `seq_id`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSamples:
    sampling_session_id: str
    seq_id: int
    prompt: ModelInput
    num_samples: int
    params: SamplingParams
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    more_stop_tokens: tuple[int, ...] = ()
    """Token ids that end a sequence beside what `params.stop` says; so texts and tokens can be given together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedSample:
    """A sample request whose content was found bad while decoding; its future fails with `error`."""

    sampling_session_id: str
    seq_id: int
    num_samples: int
    """As asked for, if that could be read; the reply needs as many sequence ids."""
    error: TinsmithError


SampleRequest: TypeAlias = DrawSamples | RejectedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The receipt of a request."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: tuple[str, ...] = ()
