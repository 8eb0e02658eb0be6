"""Finding sessions among many: by what their user called and labelled them, and by how they ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import sqlalchemy as sa

from tinsmith.control.records import SessionRow, fetch_sessions
from tinsmith.control.registry import CHECKPOINTS, RUNS, SESSIONS

DEFAULT_PROJECT = "default"
"""The project of sessions that name none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusFilter:
    is_active: bool = False
    end_reasons: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuery:
    session_id: str | None = None
    display_name: str | None = None
    """Words that must all appear, in any case. With `session_id`, either is enough."""
    owners: Sequence[str] | None = None
    """Users; `None` takes all sessions, here and below."""
    project_ids: Sequence[str] | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    statuses: Sequence[StatusFilter] | None = None
    """Any of them; `None` takes all sessions."""
    limit: int = 50
    after: str | None = None
    """The last session of the page before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSession:
    row: SessionRow
    checkpoints_count: int
    checkpoint_bytes: int


def search(connection: sa.Connection, query: SessionQuery, now: float) -> list[FoundSession]:
    """Newest first; at most `limit`."""
    found = sa.select(SESSIONS).where(*_conditions(query))
    found = found.order_by(SESSIONS.c.created_at.desc(), SESSIONS.c.session_id)
    if query.display_name is None and not query.user_metadata:
        found = found.limit(query.limit)
    rows = (row for row in fetch_sessions(connection, found) if _has_labels(row, query))
    return [_with_checkpoints(connection, row, now) for row in islice(rows, query.limit)]


def shown_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """As clients are told of it, and search for it."""
    return {key: str(value) for key, value in metadata.items()}


def _has_labels(row: SessionRow, query: SessionQuery) -> bool:
    """Not asked of the database: no two compare text alike, and SQLite finds no key that holds a quote."""
    if query.user_metadata.items() - shown_metadata(row.user_metadata).items():
        return False
    if query.display_name is None or row.session_id == query.session_id:
        return True
    name = (row.display_name or "").casefold()
    return all(word in name for word in query.display_name.casefold().split())


def _conditions(query: SessionQuery) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if query.session_id is not None and query.display_name is None:
        conditions.append(SESSIONS.c.session_id == query.session_id)
    if query.owners is not None:
        conditions.append(SESSIONS.c.owner.in_(query.owners))
    if query.project_ids is not None:
        project = sa.func.coalesce(SESSIONS.c.project_id, DEFAULT_PROJECT)
        conditions.append(project.in_(query.project_ids))
    if query.statuses is not None:
        conditions.append(_has_status(query.statuses))
    if query.after is not None:
        conditions.append(_comes_after(query.after, query.owners))
    return conditions


def _comes_after(session_id: str, owners: Sequence[str] | None) -> sa.ColumnElement[bool]:
    """By the stored moment: one that came back over the wire has lost its last digits."""
    mine = sa.true() if owners is None else SESSIONS.c.owner.in_(owners)
    last = sa.select(SESSIONS.c.created_at).where(SESSIONS.c.session_id == session_id, mine).scalar_subquery()
    same_moment = (SESSIONS.c.created_at == last) & (SESSIONS.c.session_id > session_id)
    return (SESSIONS.c.created_at < last) | same_moment


def _has_status(statuses: Sequence[StatusFilter]) -> sa.ColumnElement[bool]:
    has_ended = SESSIONS.c.end_reason.in_({reason for status in statuses for reason in status.end_reasons})
    is_active = SESSIONS.c.ended_at.is_(None)
    return sa.or_(has_ended, is_active) if any(status.is_active for status in statuses) else has_ended


def _with_checkpoints(connection: sa.Connection, row: SessionRow, now: float) -> FoundSession:
    alive = CHECKPOINTS.c.deleted_at.is_(None) & (CHECKPOINTS.c.expires_at.is_(None) | (CHECKPOINTS.c.expires_at > now))
    totals = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(CHECKPOINTS.c.size_bytes), 0))
    totals = totals.select_from(CHECKPOINTS).join(RUNS, RUNS.c.run_id == CHECKPOINTS.c.run_id)
    count, size_bytes = connection.execute(totals.where(RUNS.c.session_id == row.session_id, alive)).one()
    return FoundSession(row=row, checkpoints_count=count, checkpoint_bytes=size_bytes)
