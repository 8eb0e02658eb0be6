"""Records of the administrative part of the wire: identity, found sessions, audit, usage, storage, downloads."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from tinsmith.types.rest import WireModel

# ---- identity ----


class AuthTokenResponse(WireModel):
    jwt: str


class OrganizationDetails(WireModel):
    name: str


class UserDetails(WireModel):
    email: str


class ApiKeyDetails(WireModel):
    org_details: OrganizationDetails
    user_details: UserDetails


class ApiKeyResponse(WireModel):
    key_id: int
    name: str
    note: str
    details: ApiKeyDetails


# ---- found sessions ----


class ActiveStatus(WireModel):
    type: Literal["active"] = "active"


class ClientFinish(WireModel):
    type: Literal["success", "errored", "interrupted"]


class ClientFinishedStatus(WireModel):
    type: Literal["client_finished"] = "client_finished"
    reason: ClientFinish
    detail: str | None = None


SessionStatus: TypeAlias = Annotated[ActiveStatus | ClientFinishedStatus, Field(discriminator="type")]


class SessionSummary(WireModel):
    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    status: SessionStatus | None = None
    """`None` for a session that was lost: neither finished by its client nor running."""
    checkpoints_count: int
    checkpoint_storage_bytes: int | None = None
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None


class SessionSearchCursor(WireModel):
    last_created_at: datetime
    last_session_id: str


class SessionSearchResponse(WireModel):
    sessions: list[SessionSummary] = Field(default_factory=list)
    next_cursor: SessionSearchCursor | None = None


# ---- audit, usage, storage ----


class AuditLogEntry(WireModel):
    timestamp: datetime
    event: str
    event_details: dict[str, Any] = Field(default_factory=dict)
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLogResponse(WireModel):
    entries: list[AuditLogEntry] = Field(default_factory=list)


class TrainingUsage(WireModel):
    type: Literal["training"] = "training"
    token_count: int


class PrefillUsage(WireModel):
    type: Literal["sampling_prefill"] = "sampling_prefill"
    cached: bool
    token_count: int


class SampledUsage(WireModel):
    type: Literal["sampling_sample"] = "sampling_sample"
    token_count: int


class CheckpointUsage(WireModel):
    type: Literal["checkpoint"] = "checkpoint"
    count: int


class StorageUsage(WireModel):
    type: Literal["storage"] = "storage"
    free: bool | None = None
    """Not said here: SDKs before 0.35 refuse a field they do not know."""
    gigabyte_hours: float


UsageInfo: TypeAlias = Annotated[
    TrainingUsage | PrefillUsage | SampledUsage | CheckpointUsage | StorageUsage, Field(discriminator="type")
]


class BillingUsageEvent(WireModel):
    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None = None
    user_id: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    event_info: UsageInfo


class BillingUsageSession(WireModel):
    user_metadata: dict[str, str] | None = None


class BillingUsageResponse(WireModel):
    data: list[BillingUsageEvent] = Field(default_factory=list)
    sessions: dict[str, BillingUsageSession] = Field(default_factory=dict)


class CheckpointStorageItem(WireModel):
    project_id: str | None = None
    org_user_urn: str | None = None
    user_name: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float


class CheckpointStorageResponse(WireModel):
    data: list[CheckpointStorageItem] = Field(default_factory=list)


# ---- downloads and copies ----


class CopyWeightsResponse(WireModel):
    tinker_path: str


class ExternalWeightsUrlsResponse(WireModel):
    urls: dict[str, str]
    """By file name, relative to the checkpoint."""
    expires: datetime


class TraceExportResponse(WireModel):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


class FutureCompletion(WireModel):
    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None


class RetrieveFuturesResponse(WireModel):
    completions: list[FutureCompletion] = Field(default_factory=list)
    cursor: int
