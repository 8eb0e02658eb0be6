"""Bodies of requests on the Tinker wire, as models: for tools that build or read them.

The clients send the same fields; absent means null. Unknown fields are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, model_serializer

from tinsmith.types.datum import Datum, ModelInput, StrictModel
from tinsmith.types.params import (
    AdamOptimizerConfig,
    AdamParams,
    DimuonParams,
    LoraConfig,
    LossFnType,
    OptimizerConfig,
    OptimParams,
    SamplingParams,
)
from tinsmith.types.tensor import TensorData

ModelID: TypeAlias = str
RequestID: TypeAlias = str
AnyOptimizerConfig: TypeAlias = AdamOptimizerConfig | OptimizerConfig
CustomLossInputRank: TypeAlias = Literal[0, 1, 2]


class RequestModel(StrictModel):
    model_config = ConfigDict(defer_build=True, protected_namespaces=())


class ClientConfigRequest(RequestModel):
    sdk_version: str


class CreateSessionRequest(RequestModel):
    tags: list[str]
    user_metadata: dict[str, Any] | None
    sdk_version: str
    project_id: str | None = None
    display_name: str | None = None
    type: Literal["create_session"] = "create_session"


class SessionHeartbeatRequest(RequestModel):
    session_id: str
    type: Literal["session_heartbeat"] = "session_heartbeat"


class CreateModelRequest(RequestModel):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: AnyOptimizerConfig = AdamOptimizerConfig()
    type: Literal["create_model"] = "create_model"


class GetInfoRequest(RequestModel):
    model_id: ModelID
    type: Literal["get_info"] = "get_info"


class UnloadModelRequest(RequestModel):
    model_id: ModelID
    type: Literal["unload_model"] = "unload_model"


class OptimStepRequest(RequestModel):
    """On the wire the parameters are called `adam_params` for Adam and `optimizer_params` for other families."""

    optim_params: OptimParams
    model_id: ModelID
    seq_id: int | None = None
    type: Literal["optim_step"] = "optim_step"

    @model_serializer
    def _as_sent(self) -> dict[str, Any]:
        name = "adam_params" if isinstance(self.optim_params, AdamParams) else "optimizer_params"
        return {
            name: self.optim_params.model_dump(),
            "model_id": self.model_id,
            "seq_id": self.seq_id,
            "type": self.type,
        }


class LoadWeightsRequest(RequestModel):
    """With `session_id` and `model_seq_id` it makes a new model; with `model_id` and `seq_id` it changes one."""

    model_id: ModelID | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    path: str
    optimizer: bool
    optimizer_config: AnyOptimizerConfig | None = None
    weights_access_token: str | None = Field(default=None, repr=False)
    type: Literal["load_weights"] = "load_weights"


class SaveWeightsRequest(RequestModel):
    model_id: ModelID
    path: str | None = None
    seq_id: int | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsForSamplerRequest(RequestModel):
    model_id: ModelID
    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: int | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternalRequest(RequestModel):
    model_id: ModelID
    path: str
    seq_id: int | None = None
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class CopyWeightsRequest(RequestModel):
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    source_path: str
    ttl_seconds: int | None = None
    weights_access_token: str | None = Field(default=None, repr=False)
    """Travels in a header, not in the body."""


class CreateSamplingSessionRequest(RequestModel):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class JoinSamplingSessionRequest(RequestModel):
    sampling_session_id: str
    type: Literal["join_sampling_session"] = "join_sampling_session"


class SampleRequest(RequestModel):
    num_samples: int = 1
    prompt: ModelInput
    sampling_params: SamplingParams
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"


class FutureRetrieveRequest(RequestModel):
    request_id: RequestID
    allow_metadata_only: bool = False


class SamplingSessionFuturesTarget(RequestModel):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: int = 0


class FuturesRetrieveRequest(RequestModel):
    target: SamplingSessionFuturesTarget
    prev_cursor: int = 0
    timeout: float | None = None
    """`None` lets the server hold the request; 0 only acknowledges."""
    retrieved_request_ids: list[str] = Field(default_factory=list)


class CustomLossInput(RequestModel):
    name: str
    rank: CustomLossInputRank


class CustomLossNode(RequestModel):
    """One operation of a traced loss (a torch.fx node)."""

    op: Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
    name: str
    target: str
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)


class CustomLossGraph(RequestModel):
    format: Literal[1] = 1
    nodes: list[CustomLossNode]


class CreateCustomLossRequest(RequestModel):
    session_id: str
    custom_loss_seq_id: int
    name: str
    inputs: list[CustomLossInput]
    graph: CustomLossGraph
    type: Literal["create_custom_loss"] = "create_custom_loss"


@dataclass(slots=True)
class ForwardBackwardInput:
    data: list[Datum]
    loss_fn: LossFnType
    loss_fn_config: Mapping[str, float | str] | None = None


@dataclass(slots=True)
class ForwardBackwardRequest:
    """Travels as protobuf: see `tinsmith.wire.tinker_proto`."""

    forward_backward_input: ForwardBackwardInput
    model_id: ModelID
    seq_id: int | None = None


@dataclass(slots=True)
class ForwardRequest:
    forward_input: ForwardBackwardInput
    model_id: ModelID
    seq_id: int | None = None


__all__ = [
    "AnyOptimizerConfig",
    "ClientConfigRequest",
    "CopyWeightsRequest",
    "CreateCustomLossRequest",
    "CreateModelRequest",
    "CreateSamplingSessionRequest",
    "CreateSessionRequest",
    "CustomLossGraph",
    "CustomLossInput",
    "CustomLossInputRank",
    "CustomLossNode",
    "DimuonParams",
    "ForwardBackwardInput",
    "ForwardBackwardRequest",
    "ForwardRequest",
    "FutureRetrieveRequest",
    "FuturesRetrieveRequest",
    "GetInfoRequest",
    "JoinSamplingSessionRequest",
    "LoadWeightsRequest",
    "ModelID",
    "OptimStepRequest",
    "RequestID",
    "SampleRequest",
    "SamplingSessionFuturesTarget",
    "SaveWeightsExternalRequest",
    "SaveWeightsForSamplerRequest",
    "SaveWeightsRequest",
    "SessionHeartbeatRequest",
    "UnloadModelRequest",
]
