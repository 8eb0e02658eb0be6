"""What was done and used: audit log, usage, storage; and sessions found by their labels."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from tinsmith.control.audit import AuditEntry, EventType
from tinsmith.control.identities import Caller
from tinsmith.control.records import moment
from tinsmith.control.session_search import (
    DEFAULT_PROJECT,
    FoundSession,
    SessionQuery,
    StatusFilter,
    shown_metadata,
)
from tinsmith.control.sessions import FINISH_REASONS
from tinsmith.control.signing import user_of_urn, user_urn
from tinsmith.control.usage import GIGABYTE, HOUR_S, UsageEvent
from tinsmith.server.errors import brief
from tinsmith.server.service import ServiceDep
from tinsmith.server.tinker.schemas import OwnerBody, ProjectBody, SessionSearchBody, StatusBody
from tinsmith.types.errors import InvalidInput
from tinsmith.types.rest_admin import (
    ActiveStatus,
    AuditLogEntry,
    AuditLogResponse,
    BillingUsageEvent,
    BillingUsageResponse,
    BillingUsageSession,
    CheckpointStorageItem,
    CheckpointStorageResponse,
    CheckpointUsage,
    ClientFinish,
    ClientFinishedStatus,
    PrefillUsage,
    SampledUsage,
    SessionSearchCursor,
    SessionSearchResponse,
    SessionSummary,
    StorageUsage,
    TrainingUsage,
    UsageInfo,
)

router = APIRouter(tags=["administration"])

MAX_USAGE_SPAN = timedelta(days=14)
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


# ---- sessions ----


@router.post("/sessions/search", response_model_exclude_none=True)
async def search_sessions(body: SessionSearchBody, service: ServiceDep) -> SessionSearchResponse:
    """Newest first, a page at a time."""
    found = await service.control.library.search_sessions(
        SessionQuery(
            owners=_owners(body.owner, service.control.caller),
            session_id=body.session_id,
            display_name=body.display_name,
            project_ids=body.project_ids,
            user_metadata=body.user_metadata,
            statuses=None if body.statuses is None else [_status_filter(status) for status in body.statuses],
            limit=body.limit,
            after=None if body.cursor is None else body.cursor.last_session_id,
        )
    )
    last = found[-1].row if len(found) == body.limit else None
    return SessionSearchResponse(
        sessions=[_summary(session) for session in found],
        next_cursor=None
        if last is None
        else SessionSearchCursor(last_created_at=moment(last.created_at), last_session_id=last.session_id),
    )


def _owners(owner: OwnerBody, caller: Caller) -> list[str] | None:
    """`accessible` is what the caller may see; control knows what that is."""
    if owner.owner_urns is not None:
        return [user_of_urn(urn) for urn in owner.owner_urns]
    return [caller.user_id] if owner.type == "own" and not caller.is_local else None


def _status_filter(status: StatusBody) -> StatusFilter:
    """Nothing here cancels or fails a session, so nobody is found under those."""
    match status.type:
        case "active":
            return StatusFilter(is_active=True)
        case "client_finished":
            return StatusFilter(end_reasons=status.reasons or FINISH_REASONS)
        case _:
            return StatusFilter()


def _summary(found: FoundSession) -> SessionSummary:
    row = found.row
    status: ActiveStatus | ClientFinishedStatus | None = None
    if row.ended_at is None:
        status = ActiveStatus()
    elif row.end_reason in FINISH_REASONS:
        reason = ClientFinish.model_validate({"type": row.end_reason})
        status = ClientFinishedStatus(reason=reason, detail=row.end_detail)
    return SessionSummary(
        session_id=row.session_id,
        created_at=moment(row.created_at),
        owner=user_urn(row.owner),
        project_id=row.project_id or DEFAULT_PROJECT,
        status=status,
        checkpoints_count=found.checkpoints_count,
        checkpoint_storage_bytes=found.checkpoint_bytes,
        display_name=row.display_name,
        user_metadata=shown_metadata(row.user_metadata),
    )


@router.put("/sessions/{session_id}/project", status_code=204)
async def assign_session_project(session_id: str, body: ProjectBody, service: ServiceDep) -> Response:
    """On a server without keys a project is a label, and any name will do."""
    await service.control.library.assign_project(session_id, body.project_id)
    return Response(status_code=204)


# ---- audit ----


@router.get("/audit", response_model_exclude_none=True)
async def audit_log(
    service: ServiceDep, event_type: EventType = "all", day: Annotated[str | None, Query()] = None
) -> AuditLogResponse:
    """Of one day, midnight to midnight UTC; today by default."""
    entries = await service.control.library.audit_log(event_type, None if day is None else _day(day))
    return AuditLogResponse(entries=[_entry(entry) for entry in entries])


def _day(text: str) -> date:
    try:
        if _DAY.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass  # refused below
    raise InvalidInput(f"day must be a date like 2026-01-31, not {brief(text)}")


def _entry(entry: AuditEntry) -> AuditLogEntry:
    details = entry.details
    return AuditLogEntry(
        timestamp=entry.at,
        event=entry.event,
        event_details={"owner": user_urn(entry.owner), **details},
        model_id=details.get("training_run_id"),
        tinker_path=details.get("tinker_path"),
        purpose=details.get("purpose"),
    )


# ---- usage ----


@router.get("/billing/usage/events", response_model_exclude_none=True)
async def usage_events(
    service: ServiceDep, starting_on: Annotated[str, Query()], ending_before: Annotated[str, Query()]
) -> BillingUsageResponse:
    """Tokens, checkpoints and storage per hour and session. Nothing is billed: there are no costs in it."""
    start, end = _hour("starting_on", starting_on), _hour("ending_before", ending_before)
    if not timedelta(0) < end - start <= MAX_USAGE_SPAN:
        raise InvalidInput(
            f"ending_before {ending_before!r} must be after starting_on {starting_on!r}, "
            f"by at most {MAX_USAGE_SPAN.days} days"
        )
    report = await service.control.library.usage(start.timestamp(), end.timestamp())
    return BillingUsageResponse(
        data=[_usage_event(event) for event in report.events],
        sessions={
            session_id: BillingUsageSession(user_metadata={key: str(value) for key, value in metadata.items()})
            for session_id, metadata in report.session_metadata.items()
        },
    )


def _hour(name: str, text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput(f"{name} must be a moment like 2026-01-31T13:00:00Z, not {brief(text)}") from error
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when
    if not 1970 < when.year < 9999 or when.timestamp() % HOUR_S:
        raise InvalidInput(f"{name} must be a full hour, not {brief(text)}")
    return when


def _usage_event(event: UsageEvent) -> BillingUsageEvent:
    return BillingUsageEvent(
        bucket_start=moment(event.hour),
        bucket_end=moment(event.hour + HOUR_S),
        base_model=event.base_model,
        user_id=user_urn(event.user_id),
        session_id=event.session_id,
        project_id=event.project_id,
        event_info=_usage_info(event),
    )


def _usage_info(event: UsageEvent) -> UsageInfo:
    amount = int(event.amount)
    match event.kind:
        case "training":
            return TrainingUsage(token_count=amount)
        case "prefill" | "cached_prefill":
            return PrefillUsage(cached=event.kind == "cached_prefill", token_count=amount)
        case "sampled":
            return SampledUsage(token_count=amount)
        case "checkpoint":
            return CheckpointUsage(count=amount)
        case "storage":
            return StorageUsage(gigabyte_hours=event.amount)


@router.get("/billing/usage/checkpoints/current", response_model_exclude_none=True)
async def current_checkpoint_storage(
    service: ServiceDep, project_id: Annotated[str | None, Query()] = None
) -> CheckpointStorageResponse:
    shares = await service.control.library.stored_checkpoints(project_id)
    return CheckpointStorageResponse(
        data=[
            CheckpointStorageItem(
                project_id=share.project_id,
                org_user_urn=user_urn(share.user_id),
                user_name=share.user_id,
                checkpoint_count=share.count,
                size_bytes=share.size_bytes,
                size_gigabytes=share.size_bytes / GIGABYTE,
            )
            for share in shares
        ]
    )
