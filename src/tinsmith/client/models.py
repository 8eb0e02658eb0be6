"""Answers of the server that users never see: parts of larger operations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class EphemeralSampler(BaseModel):
    """What a save for sampling without a name gives."""

    sampling_session_id: str
    path: str | None = None


class TraceExport(BaseModel):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


class AnyObject(BaseModel):
    """An answer passed on as it is."""

    model_config = ConfigDict(extra="allow")

    def as_dict(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
