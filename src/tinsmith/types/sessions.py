"""Sessions as a server lists them, and how to search them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import AwareDatetime, Field

from tinsmith.types.replies import ReplyModel
from tinsmith.types.requests import RequestModel

ClientSessionFinishReasonType: TypeAlias = Literal["success", "errored", "interrupted"]


class ClientSessionFinishSuccess(ReplyModel):
    type: Literal["success"] = "success"


class ClientSessionFinishErrored(ReplyModel):
    type: Literal["errored"] = "errored"


class ClientSessionFinishInterrupted(ReplyModel):
    type: Literal["interrupted"] = "interrupted"


ClientSessionFinishReason: TypeAlias = Annotated[
    ClientSessionFinishSuccess | ClientSessionFinishErrored | ClientSessionFinishInterrupted,
    Field(discriminator="type"),
]


class SessionActive(ReplyModel):
    type: Literal["active"] = "active"


class SessionCancelled(ReplyModel):
    type: Literal["cancelled"] = "cancelled"
    detail: str | None = None


class ClientSessionFinished(ReplyModel):
    type: Literal["client_finished"] = "client_finished"
    reason: ClientSessionFinishReason
    detail: str | None = None


class SessionFailedRequestReason(ReplyModel):
    type: Literal["request"] = "request"
    request_id: str
    request_type: str


class SessionFailedTrainingRunReason(ReplyModel):
    type: Literal["training_run"] = "training_run"
    training_run_id: str


class SessionFailedSamplingSessionReason(ReplyModel):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str


SessionFailedReason: TypeAlias = Annotated[
    SessionFailedRequestReason | SessionFailedTrainingRunReason | SessionFailedSamplingSessionReason,
    Field(discriminator="type"),
]


class SessionFailed(ReplyModel):
    type: Literal["failed"] = "failed"
    category: Literal["user", "internal"]
    reason: SessionFailedReason
    message: str


SessionStatus: TypeAlias = Annotated[
    SessionFailed | SessionCancelled | ClientSessionFinished | SessionActive, Field(discriminator="type")
]


class SessionSummary(ReplyModel):
    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    status: SessionStatus | None = None
    checkpoints_count: int
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


class OwnSearchOwner(RequestModel):
    type: Literal["own"] = "own"


class AccessibleSearchOwner(RequestModel):
    type: Literal["accessible"] = "accessible"


class UserSearchOwner(RequestModel):
    type: Literal["user"] = "user"
    owner_urns: list[str] = Field(min_length=1, max_length=10)


SearchOwner: TypeAlias = OwnSearchOwner | AccessibleSearchOwner | UserSearchOwner


class ActiveSessionStatusQuery(RequestModel):
    type: Literal["active"] = "active"


class CancelledSessionStatusQuery(RequestModel):
    type: Literal["cancelled"] = "cancelled"


class FailedSessionStatusQuery(RequestModel):
    type: Literal["failed"] = "failed"


class ClientFinishedSessionStatusQuery(RequestModel):
    type: Literal["client_finished"] = "client_finished"
    reasons: list[ClientSessionFinishReasonType] | None = None


SessionStatusQuery: TypeAlias = (
    ActiveSessionStatusQuery | CancelledSessionStatusQuery | FailedSessionStatusQuery | ClientFinishedSessionStatusQuery
)


class SessionSearchCursor(ReplyModel):
    last_created_at: AwareDatetime
    last_session_id: str


class SessionSearchRequest(RequestModel):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    display_name: str | None = None
    owner: SearchOwner = OwnSearchOwner()
    statuses: list[SessionStatusQuery] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SessionSearchCursor | None = None


class SessionSearchResponse(ReplyModel):
    sessions: list[SessionSummary]
    next_cursor: SessionSearchCursor | None = None
