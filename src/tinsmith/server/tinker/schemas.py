"""JSON bodies of the Tinker dialect, as the official SDK sends them.

Numbers are strict (`true` is no number, `1.0` no integer). A null counts as absent. A field that is not listed is one
whose meaning this server does not implement: it is let through where it holds a value that says "off", and is an error
elsewhere, so that newer SDKs work and nothing is ignored silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from tinsmith.server.errors import brief

OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
MOST_LEVELS = 32
"""Of free-form JSON: what writes and reads it again goes down level by level."""

Int64 = Annotated[int, Field(ge=0, lt=2**63)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for text in _texts(value):
            _check_unicode(text)
        return {key: item for key, item in value.items() if item is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """In the words of JSON Schema: a null counts as absent, and what is not listed may only be off."""
        schema = handler.resolve_ref_schema(handler(core))
        required = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            if name not in required and {"type": "null"} not in field.get("anyOf", ()):
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        schema["properties"] = {"type": {}} | schema.get("properties", {})
        schema["additionalProperties"] = {"enum": [*OFF, 0.0]}
        return schema

    @model_validator(mode="after")
    def _unknown_fields_are_off(self) -> Body:
        self._check_unknown_fields()
        return self

    def _check_unknown_fields(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if name != "type" and value not in OFF:
                raise PydanticCustomError(
                    "unknown_field",
                    "{name} = {value} is not implemented by this server; leave the field out",
                    {"name": name, "value": brief(value)},
                )


def _check_storable(value: Any, where: str, depth: int = 0) -> None:
    """Free-form JSON that every store can hold, and give back as it was."""
    if depth > MOST_LEVELS:
        raise PydanticCustomError(
            "value_error", "{where} is nested deeper than {most} levels", {"where": where, "most": MOST_LEVELS}
        )
    if isinstance(value, str):
        _check_unicode(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError(
            "value_error", "{where} holds {value}, which is no JSON", {"where": where, "value": value}
        )
    elif isinstance(value, (dict, list)):
        for item in (part for pair in value.items() for part in pair) if isinstance(value, dict) else value:
            _check_storable(item, where, depth + 1)


def _texts(fields: dict[str, Any]) -> Iterator[str]:
    """Those that may be stored: of the body itself, and of what lies directly in it."""
    for key, item in fields.items():
        yield key
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from (text for pair in item.items() for text in pair if isinstance(text, str))
        elif isinstance(item, list):
            yield from (text for text in item if isinstance(text, str))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "value_error", "{text} is no Unicode text: it holds half a character", {"text": brief(text)}
        ) from error


# ---- service and sessions ----


class ClientBody(Body):
    """`client/config` and `client/dynamic_config`."""

    sdk_version: str = ""


class CreateSessionBody(Body):
    tags: list[str] = []
    user_metadata: dict[str, Any] = {}
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None

    @field_validator("user_metadata")
    @classmethod
    def _can_be_stored(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        _check_storable(metadata, "user_metadata")
        return metadata


class SessionBody(Body):
    session_id: str


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"]


class FinishBody(Body):
    reason: FinishReason
    detail: str | None = None


# ---- models ----


class LoraBody(Body):
    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    alpha: float | None = None
    """Not sent by the official SDK."""


class OptimizerConfigBody(Body):
    type: str = "adamw"

    def _check_unknown_fields(self) -> None:
        """Those of other optimizers are not read: the optimizer itself is refused, by its name."""
        if self.type == "adamw":
            super()._check_unknown_fields()


class CreateModelBody(Body):
    session_id: str
    model_seq_id: Int64
    base_model: str
    user_metadata: dict[str, str] = {}
    lora_config: LoraBody = LoraBody()
    optimizer_config: OptimizerConfigBody = OptimizerConfigBody()


class CustomLossInputBody(Body):
    name: str
    rank: int


class CreateCustomLossBody(Body):
    session_id: str
    custom_loss_seq_id: Int64
    name: str
    inputs: list[CustomLossInputBody]
    graph: dict[str, Any]
    """`format` and `nodes`; read elsewhere."""


class ModelBody(Body):
    model_id: str


class ModelOperationBody(Body):
    """What every operation in the order of a model has."""

    model_id: str = Field(min_length=1)
    seq_id: Int64


class AdamBody(Body):
    learning_rate: float = 0.0001
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStepBody(ModelOperationBody):
    adam_params: AdamBody | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeightsBody(ModelOperationBody):
    path: str
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveWeightsForSamplerBody(ModelOperationBody):
    path: str | None = None
    sampling_session_seq_id: Int64 | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class LoadIntoModelBody(ModelOperationBody):
    """`load_weights` into a live model."""

    path: str
    optimizer: bool = False
    weights_access_token: str | None = None
    """Of the hosted service. It opens nothing here: who shall read a checkpoint of another's has it published."""


class LoadNewModelBody(Body):
    """`load_weights` that makes a new model."""

    session_id: str
    model_seq_id: Int64
    path: str
    optimizer: bool = False
    base_model: str | None = None
    user_metadata: dict[str, str] = {}
    optimizer_config: OptimizerConfigBody = OptimizerConfigBody()
    weights_access_token: str | None = None


class UnloadBody(Body):
    model_id: str = Field(min_length=1)
    seq_id: Int64 | None = None


class TrainBody(ModelOperationBody):
    """`forward_backward` and `forward` of SDKs older than the protobuf body; the data are decoded elsewhere."""

    forward_backward_input: TrainInput | None = None
    forward_input: TrainInput | None = None


class TrainInput(Body):
    data: list[Any]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = {}


# ---- sampling ----


class CreateSamplingSessionBody(Body):
    session_id: str
    sampling_session_seq_id: Int64
    base_model: str | None = None
    model_path: str | None = None


class SamplingSessionBody(Body):
    sampling_session_id: str


class SamplingParamsBody(Body):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SampleBody(Body):
    sampling_session_id: str
    seq_id: Int64
    num_samples: int = 1
    prompt: dict[str, Any]
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0


# ---- futures ----


class RetrieveFutureBody(Body):
    request_id: str
    allow_metadata_only: bool = False


class CancelFutureBody(Body):
    request_id: str


class FuturesTarget(Body):
    sampling_session_id: str
    cloned_sampler_id: Int64 = 0


class RetrieveFuturesBody(Body):
    target: FuturesTarget
    prev_cursor: Int64 = 0
    timeout: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    retrieved_request_ids: list[str] = []


# ---- checkpoints ----


class WeightsInfoBody(Body):
    tinker_path: str


class CopyWeightsBody(Body):
    source_path: str
    destination_project_id: str | None = None
    session_id: str | None = None
    model_seq_id: Int64 | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


class MergedBody(Body):
    name: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    ttl_seconds: int | None = None


class SaveWeightsExternalBody(ModelOperationBody):
    path: str
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] = []


class ProjectBody(Body):
    project_id: str = Field(min_length=1)


class OwnerBody(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] | None = Field(default=None, min_length=1, max_length=10)

    @model_validator(mode="after")
    def _urns_are_those_of_users(self) -> OwnerBody:
        if (self.type == "user") != (self.owner_urns is not None):
            raise PydanticCustomError("value_error", "owner_urns belong to the type 'user', and it to them")
        return self


class StatusBody(Body):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None


class SearchCursorBody(Body):
    last_created_at: str
    last_session_id: str


class SessionSearchBody(Body):
    session_id: str | None = None
    project_ids: list[str] | None = Field(default=None, max_length=1000)
    user_metadata: dict[str, str] = {}
    display_name: str | None = Field(default=None, min_length=1)
    owner: OwnerBody = OwnerBody()
    statuses: list[StatusBody] | None = Field(default=None, min_length=1)
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SearchCursorBody | None = None


class TtlBody(Body):
    ttl_seconds: int | None = None
