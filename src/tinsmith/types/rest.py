"""Records of the REST part of the wire: runs, sessions, samplers, capabilities, and a model's description."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tinsmith.types.checkpoint import Checkpoint
from tinsmith.types.params import OptimizerConfig


class WireModel(BaseModel):
    """A response-side model: fields of newer servers are ignored."""

    model_config = ConfigDict(protected_namespaces=())


class Cursor(WireModel):
    offset: int
    limit: int
    total_count: int


class TrainingRun(WireModel):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None

    @field_validator("corrupted", mode="before")
    @classmethod
    def _none_is_false(cls, value: Any) -> Any:
        return False if value is None else value


class TrainingRunsResponse(WireModel):
    training_runs: list[TrainingRun] = Field(default_factory=list)
    cursor: Cursor | None = None


class CheckpointsListResponse(WireModel):
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    cursor: Cursor | None = None


class GetSessionResponse(WireModel):
    training_run_ids: list[str] = Field(default_factory=list)
    sampler_ids: list[str] = Field(default_factory=list)
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class ListSessionsResponse(WireModel):
    sessions: list[str] = Field(default_factory=list)
    cursor: Cursor | None = None


class GetSamplerResponse(WireModel):
    sampler_id: str
    base_model: str
    model_path: str | None = None
    tokenizer_id: str | None = None
    """Where the tokenizer really is, for base models served under a name of their own."""


class WeightsInfoResponse(WireModel):
    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: OptimizerConfig | None = None


class SupportedModel(WireModel):
    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class GetServerCapabilitiesResponse(WireModel):
    supported_models: list[SupportedModel] = Field(default_factory=list)


class ModelData(WireModel):
    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(WireModel):
    model_id: str
    model_data: ModelData
    optimizer_config: OptimizerConfig = OptimizerConfig()
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


class SaveWeightsResponse(WireModel):
    path: str


class SaveWeightsForSamplerResponse(WireModel):
    path: str


class LoadWeightsResponse(WireModel):
    path: str | None = None
    model_id: str | None = None
