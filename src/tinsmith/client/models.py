"""Answers of the server that are not among `tinsmith.types`: the rarer corners of the REST part."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class SaveWeightsExternalResponse(BaseModel):
    path: str
    size_bytes: int | None = None


class EphemeralSampler(BaseModel):
    """What a save for sampling without a name gives."""

    sampling_session_id: str
    path: str | None = None


class CreatedModel(BaseModel):
    model_id: str


class SamplingSessionReply(BaseModel):
    sampling_session_id: str


class JoinReply(BaseModel):
    client_counter: int


class ExternalWeightsUrls(BaseModel):
    """Signed addresses of the files of an external checkpoint, by file name."""

    urls: dict[str, str]
    expires: datetime


class CopyWeightsReply(BaseModel):
    tinker_path: str


class TraceExport(BaseModel):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


class AnyObject(BaseModel):
    """An answer passed on as it is."""

    model_config = ConfigDict(extra="allow")

    def as_dict(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class SessionSearchRequest(BaseModel):
    """Which sessions to look for; see the Tinker protocol for the forms of `owner`, `statuses` and `cursor`."""

    model_config = ConfigDict(extra="forbid")

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    display_name: str | None = None
    owner: dict[str, Any] = Field(default_factory=lambda: {"type": "own"})
    statuses: list[dict[str, Any]] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: dict[str, Any] | None = None
