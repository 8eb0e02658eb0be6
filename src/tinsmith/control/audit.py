"""Who did what to which checkpoint, project and account. Written in the transaction of what it tells of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa

from tinsmith.control.records import CheckpointRow, moment
from tinsmith.control.registry import AUDIT

AuditEvent: TypeAlias = Literal[
    "checkpoint_create",
    "checkpoint_copy",
    "checkpoint_import",
    "checkpoint_export",
    "checkpoint_read",
    "checkpoint_publish",
    "checkpoint_unpublish",
    "checkpoint_ttl_set",
    "checkpoint_delete",
    "checkpoint_expire",
    "checkpoint_evict",
    "checkpoint_retire",
    "checkpoint_pin",
    "checkpoint_unpin",
    "session_expire",
    "sampler_expire",
    "project_session_assign",
    "project_create",
    "project_weight_set",
    "project_member_add",
    "project_member_remove",
    "organization_user_create",
    "organization_user_role_set",
    "organization_user_disable",
    "organization_user_enable",
    "organization_key_create",
    "organization_key_revoke",
    "organization_quota_set",
]
"""`<resource>_<action>`."""

EventType: TypeAlias = Literal["all", "checkpoints", "projects", "teams", "organizations"]

DAY_S = 86_400

_PREFIX: dict[str, str] = {
    "all": "",
    "checkpoints": "checkpoint_",
    "projects": "project_",
    "teams": "team_",
    "organizations": "organization_",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    at: datetime
    owner: str
    event: str
    details: dict[str, Any]


def note(connection: sa.Connection, event: AuditEvent, at: float, owner: str, **details: Any) -> None:
    """`owner` is the user whose log it belongs to: whoever did it, or whose object it happened to."""
    values = {"at": at, "owner": owner, "event": event, "details": details}
    connection.execute(sa.insert(AUDIT).values(**values))


def note_checkpoint(
    connection: sa.Connection, event: AuditEvent, row: CheckpointRow, at: float, **details: Any
) -> None:
    note(connection, event, at, row.owner, tinker_path=row.path, training_run_id=row.run_id, **details)


def entries(connection: sa.Connection, event_type: EventType, day: date, owner: str | None = None) -> list[AuditEntry]:
    """Of one day, midnight to midnight UTC, in the order they happened; of one user, or of all."""
    start = datetime.combine(day, time(), tzinfo=UTC).timestamp()
    query = sa.select(AUDIT).where(
        AUDIT.c.at >= start,
        AUDIT.c.at < start + DAY_S,
        AUDIT.c.event.startswith(_PREFIX[event_type], autoescape=True),
        sa.true() if owner is None else AUDIT.c.owner == owner,
    )
    rows = connection.execute(query.order_by(AUDIT.c.at, AUDIT.c.entry_id)).mappings()
    return [
        AuditEntry(at=moment(row["at"]), owner=row["owner"], event=row["event"], details=dict(row["details"]))
        for row in rows
    ]
