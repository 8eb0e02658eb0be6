"""Records of the REST part of the wire: runs, sessions, samplers, capabilities, and a model's description."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from tinsmith.types.checkpoint import Checkpoint, ParsedCheckpointTinkerPath
from tinsmith.types.params import AdamOptimizerConfig, OptimizerConfig

HOSTED_CONSOLE = "https://tinker.thinkingmachines.ai"


def is_hosted(base_url: str) -> bool:
    return "thinkingmachines" in base_url


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
    corrupted_training_run_ids: list[str] = Field(default_factory=list)
    """Of those the ones that refuse training."""
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
    optimizer_config: AdamOptimizerConfig | OptimizerConfig = AdamOptimizerConfig()


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
    type: Literal["get_info"] | None = None
    model_id: str
    model_data: ModelData
    optimizer_config: AdamOptimizerConfig | OptimizerConfig = AdamOptimizerConfig()
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    corrupted: bool | None = None
    """Its numbers are no longer finite; it refuses training until a checkpoint is loaded into it."""


class SavedWeights(WireModel):
    """A checkpoint that was just written."""

    path: str
    _server: str = PrivateAttr(default="")
    """The base URL of the server that wrote it; set by the client."""

    def get_console_url(self) -> str:
        """A page about the checkpoint at the hosted service; elsewhere the server's own pages."""
        if not is_hosted(self._server):
            return self._server
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(self.path)
        run, checkpoint = quote(parsed.training_run_id, safe=""), quote(parsed.checkpoint_id, safe="")
        return f"{HOSTED_CONSOLE}/checkpoints/{run}/{checkpoint}"


class SaveWeightsResponse(SavedWeights):
    type: Literal["save_weights"] | None = None


class SaveWeightsForSamplerResponse(SavedWeights):
    type: Literal["save_weights_for_sampler"] | None = None

    def get_playground_url(self) -> str:
        """Where to talk to the checkpoint at the hosted service; elsewhere the server's own pages."""
        if not is_hosted(self._server):
            return self._server
        return f"{HOSTED_CONSOLE}/playground?mode=checkpoint&checkpoint={quote(self.path, safe='')}"


class LoadWeightsResponse(WireModel):
    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] | None = None
