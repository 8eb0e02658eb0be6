"""What an account did and what it costs: audit log, billing, storage."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tinsmith.types.replies import ReplyModel
from tinsmith.types.requests import RequestModel


class AuditLogEntry(ReplyModel):
    timestamp: datetime
    event: str
    event_details: dict[str, object] = Field(default_factory=dict)
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLogResponse(ReplyModel):
    entries: list[AuditLogEntry]


class TrainingBillingEvent(ReplyModel):
    type: Literal["training"] = "training"
    token_count: int


class SamplingPrefillBillingEvent(ReplyModel):
    type: Literal["sampling_prefill"] = "sampling_prefill"
    cached: bool
    token_count: int


class SamplingSampleBillingEvent(ReplyModel):
    type: Literal["sampling_sample"] = "sampling_sample"
    token_count: int


class CheckpointBillingEvent(ReplyModel):
    type: Literal["checkpoint"] = "checkpoint"
    count: int


class StorageBillingEvent(ReplyModel):
    type: Literal["storage"] = "storage"
    free: bool = False
    gigabyte_hours: float


BillingEventInfo: TypeAlias = Annotated[
    TrainingBillingEvent
    | SamplingPrefillBillingEvent
    | SamplingSampleBillingEvent
    | CheckpointBillingEvent
    | StorageBillingEvent,
    Field(discriminator="type"),
]


class BillingUsageEvent(ReplyModel):
    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None = None
    user_id: str | None = None
    user_name: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None
    event_info: BillingEventInfo


class BillingUsageSession(ReplyModel):
    user_metadata: dict[str, str] | None = None


class BillingUsageResponse(ReplyModel):
    data: list[BillingUsageEvent]
    sessions: dict[str, BillingUsageSession] = Field(default_factory=dict)
    cost_data_through: datetime | None = None


class GetBillingUsageRequest(RequestModel):
    starting_on: datetime
    ending_before: datetime


class CurrentCheckpointStorageUsageItem(ReplyModel):
    project_id: str | None = None
    org_user_urn: str | None = None
    user_email: str | None = None
    user_name: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None = None


class CurrentCheckpointStorageUsageResponse(ReplyModel):
    effective_rate_usd_per_gigabyte_month: float | None = None
    data: list[CurrentCheckpointStorageUsageItem]


class GetCurrentCheckpointStorageUsageRequest(RequestModel):
    project_id: str | None = None
