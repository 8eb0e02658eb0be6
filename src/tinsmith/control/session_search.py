"""Finding sessions among many: by what their user called and labelled them, and by how they ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    found = found.order_by(SESSIONS.c.created_at.desc(), SESSIONS.c.session_id).limit(query.limit)
    return [_with_checkpoints(connection, row, now) for row in fetch_sessions(connection, found)]


def _conditions(query: SessionQuery) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    named = _named(query)
    if named:
        conditions.append(sa.or_(*named))
    if query.owners is not None:
        conditions.append(SESSIONS.c.owner.in_(query.owners))
    if query.project_ids is not None:
        project = sa.func.coalesce(SESSIONS.c.project_id, DEFAULT_PROJECT)
        conditions.append(project.in_(query.project_ids))
    for key, value in query.user_metadata.items():
        conditions.append(SESSIONS.c.user_metadata[key].as_string() == value)
    if query.statuses is not None:
        conditions.append(sa.or_(sa.false(), *(_has_status(status) for status in query.statuses)))
    if query.after is not None:
        conditions.append(_comes_after(query.after, query.owners))
    return conditions


def _comes_after(session_id: str, owners: Sequence[str] | None) -> sa.ColumnElement[bool]:
    """By the stored moment: one that came back over the wire has lost its last digits."""
    mine = sa.true() if owners is None else SESSIONS.c.owner.in_(owners)
    last = sa.select(SESSIONS.c.created_at).where(SESSIONS.c.session_id == session_id, mine).scalar_subquery()
    same_moment = (SESSIONS.c.created_at == last) & (SESSIONS.c.session_id > session_id)
    return (SESSIONS.c.created_at < last) | same_moment


def _named(query: SessionQuery) -> list[sa.ColumnElement[bool]]:
    named: list[sa.ColumnElement[bool]] = []
    if query.session_id is not None:
        named.append(SESSIONS.c.session_id == query.session_id)
    if query.display_name is not None:
        words = query.display_name.split()
        named.append(sa.and_(sa.true(), *(SESSIONS.c.display_name.icontains(word, autoescape=True) for word in words)))
    return named


def _has_status(status: StatusFilter) -> sa.ColumnElement[bool]:
    if status.is_active:
        return SESSIONS.c.ended_at.is_(None)
    return SESSIONS.c.end_reason.in_(status.end_reasons)


def _with_checkpoints(connection: sa.Connection, row: SessionRow, now: float) -> FoundSession:
    alive = CHECKPOINTS.c.deleted_at.is_(None) & (CHECKPOINTS.c.expires_at.is_(None) | (CHECKPOINTS.c.expires_at > now))
    totals = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(CHECKPOINTS.c.size_bytes), 0))
    totals = totals.select_from(CHECKPOINTS).join(RUNS, RUNS.c.run_id == CHECKPOINTS.c.run_id)
    count, size_bytes = connection.execute(totals.where(RUNS.c.session_id == row.session_id, alive)).one()
    return FoundSession(row=row, checkpoints_count=count, checkpoint_bytes=size_bytes)
