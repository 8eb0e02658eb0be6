"""Rows of the registry, and the questions asked of them. Functions take an open connection; times are Unix seconds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar

import sqlalchemy as sa

from tinsmith.control.database import insert_into
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.registry import CHECKPOINTS, RUNS, SAMPLERS, SESSIONS
from tinsmith.types.checkpoint import PATH_KINDS, Checkpoint
from tinsmith.types.errors import AlreadyExists

LOCAL_OWNER = LOCAL_USER_ID
PIN, PINNED = "tinsmith.pin", "true"
"""Metadata of a checkpoint that no rule removes."""
LOST = "lost"
"""How a session ended that its client did not finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    session_id: str
    owner: str = LOCAL_OWNER
    created_at: float
    ended_at: float | None = None
    end_reason: str | None = None
    end_detail: str | None = None
    tags: Sequence[str] = ()
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    run_id: str
    session_id: str
    owner: str = LOCAL_OWNER
    base_model: str
    lora: Mapping[str, Any]
    """A `LoraSpec` as a dict."""
    parent: str | None = None
    """Path of the checkpoint it was created from."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    created_at: float
    last_request_at: float
    ended_at: float | None = None
    corrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    checkpoint_id: str
    run_id: str
    owner: str = LOCAL_OWNER
    kind: str
    """Middle segment of its path: `weights`, `sampler_weights` or `external_weights`."""
    name: str
    version: int
    """Counts the saves under this name in this run, from 1."""
    folder: str
    """Relative to the data directory."""
    base_model: str
    tokenizer: str
    lora: Mapping[str, Any]
    has_optimizer: bool
    step: int
    metrics: Mapping[str, float]
    """The run's last training metrics when it was saved."""
    digest: str
    size_bytes: int
    parent: str | None = None
    """`checkpoint_id` of the run's checkpoint saved or loaded before it."""
    user_metadata: Mapping[str, str] | None = None
    public: bool = False
    created_at: float
    expires_at: float | None = None
    superseded_at: float | None = None
    deleted_at: float | None = None

    @property
    def path(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def address(self) -> str:
        """Of this version, whatever is saved under its name later."""
        return f"{self.path}~{self.version}"

    @property
    def present_path(self) -> str:
        """Its path, or where that now means a newer version, its address."""
        return self.path if self.superseded_at is None else self.address

    @property
    def is_pinned(self) -> bool:
        """Whether no rule may remove it."""
        return (self.user_metadata or {}).get(PIN) == PINNED

    def as_checkpoint(self, parent: str | None = None) -> Checkpoint:
        """`parent` is the address of the one named by the field."""
        return Checkpoint(
            checkpoint_id=f"{self.kind}/{self.name}",
            checkpoint_type=PATH_KINDS[self.kind],
            time=moment(self.created_at),
            tinker_path=self.path,
            size_bytes=self.size_bytes,
            public=self.public,
            user_metadata=None if self.user_metadata is None else dict(self.user_metadata),
            expires_at=None if self.expires_at is None else moment(self.expires_at),
            version=self.version,
            step=self.step,
            metrics=dict(self.metrics),
            digest=self.digest,
            parent=parent,
            pinned=self.is_pinned,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRow:
    sampler_id: str
    session_id: str
    owner: str = LOCAL_OWNER
    base_model: str
    model_path: str | None = None
    digest: str | None = None
    """Of the adapter it samples; `None` for the base model."""
    created_at: float


Register: TypeAlias = Callable[[sa.Connection, CheckpointRow], None]
"""Write the row of a checkpoint that is whole in its store, and what belongs to it, in one transaction."""

RowT = TypeVar("RowT", SessionRow, RunRow, CheckpointRow, SamplerRow)


def moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)


def insert(connection: sa.Connection, table: sa.Table, row: SessionRow | RunRow | CheckpointRow | SamplerRow) -> None:
    connection.execute(sa.insert(table).values(**asdict(row)))


def insert_if_new(connection: sa.Connection, table: sa.Table, row: RunRow | SamplerRow) -> None:
    """Nothing if a row of this key exists: the request that wrote it is done again after a crash."""
    connection.execute(insert_into(connection, table).values(**asdict(row)).on_conflict_do_nothing())


def _fetch(connection: sa.Connection, query: sa.Select[Any], row_type: type[RowT]) -> list[RowT]:
    names = [f.name for f in fields(row_type)]
    return [row_type(**{name: row[name] for name in names}) for row in connection.execute(query).mappings()]


def _count(connection: sa.Connection, table: sa.Table, *where: sa.ColumnElement[bool]) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(table).where(*where)).scalar_one())


# ---- sessions, runs, samplers ----


def session(connection: sa.Connection, session_id: str) -> SessionRow | None:
    rows = _fetch(connection, sa.select(SESSIONS).where(SESSIONS.c.session_id == session_id), SessionRow)
    return rows[0] if rows else None


def fetch_sessions(connection: sa.Connection, query: sa.Select[Any]) -> list[SessionRow]:
    return _fetch(connection, query, SessionRow)


def assign_project(connection: sa.Connection, session_id: str, project_id: str) -> bool:
    """Whether there is such a session."""
    mine = sa.update(SESSIONS).where(SESSIONS.c.session_id == session_id)
    return connection.execute(mine.values(project_id=project_id)).rowcount > 0


def sessions(connection: sa.Connection, limit: int, offset: int, owner: str | None = None) -> tuple[list[str], int]:
    """Ids, newest first, and how many there are; of one user, or of all."""
    mine = _owned(SESSIONS, owner)
    newest = sa.select(SESSIONS.c.session_id).where(mine).order_by(SESSIONS.c.created_at.desc(), SESSIONS.c.session_id)
    ids = [row.session_id for row in connection.execute(newest.limit(limit).offset(offset))]
    return ids, _count(connection, SESSIONS, mine)


def _owned(table: sa.Table, owner: str | None) -> sa.ColumnElement[bool]:
    return sa.true() if owner is None else table.c.owner == owner


def owner_of_session(connection: sa.Connection, session_id: str) -> str | None:
    query = sa.select(SESSIONS.c.owner).where(SESSIONS.c.session_id == session_id)
    return connection.execute(query).scalar_one_or_none()


def end_session(connection: sa.Connection, session_id: str, at: float, reason: str, detail: str | None) -> None:
    """The first reason stays."""
    values = {"ended_at": at, "end_reason": reason, "end_detail": detail}
    open_one = (SESSIONS.c.session_id == session_id) & SESSIONS.c.ended_at.is_(None)
    connection.execute(sa.update(SESSIONS).where(open_one).values(**values))
    connection.execute(
        sa.update(RUNS).where(RUNS.c.session_id == session_id, RUNS.c.ended_at.is_(None)).values(ended_at=at)
    )


def end_everything(connection: sa.Connection, at: float, detail: str, *, but: Collection[str] = ()) -> None:
    """What a stopped server left open; not the sessions `but`, nor their runs."""
    values = {"ended_at": at, "end_reason": LOST, "end_detail": detail}
    for table, more in ((SESSIONS, values), (RUNS, {"ended_at": at})):
        left_open = table.c.ended_at.is_(None) & table.c.session_id.not_in(list(but))
        connection.execute(sa.update(table).where(left_open).values(**more))


def projects_of_live_sessions(connection: sa.Connection) -> dict[str, str | None]:
    """As they were assigned last."""
    query = sa.select(SESSIONS.c.session_id, SESSIONS.c.project_id).where(SESSIONS.c.ended_at.is_(None))
    return {row.session_id: row.project_id for row in connection.execute(query)}


def live_session_ids(connection: sa.Connection) -> set[str]:
    return set(connection.execute(sa.select(SESSIONS.c.session_id).where(SESSIONS.c.ended_at.is_(None))).scalars())


def run(connection: sa.Connection, run_id: str) -> RunRow | None:
    rows = _fetch(connection, sa.select(RUNS).where(RUNS.c.run_id == run_id), RunRow)
    return rows[0] if rows else None


def runs(
    connection: sa.Connection, limit: int, offset: int, project_id: str | None = None, owner: str | None = None
) -> tuple[list[RunRow], int]:
    """Newest first, and how many there are; of one project and one user, or of all."""
    mine = _owned(RUNS, owner)
    if project_id is not None:
        sessions_of_project = sa.select(SESSIONS.c.session_id).where(SESSIONS.c.project_id == project_id)
        mine = mine & RUNS.c.session_id.in_(sessions_of_project)
    newest = sa.select(RUNS).where(mine).order_by(RUNS.c.created_at.desc(), RUNS.c.run_id)
    return _fetch(connection, newest.limit(limit).offset(offset), RunRow), _count(connection, RUNS, mine)


def run_ids(connection: sa.Connection) -> list[str]:
    return [row.run_id for row in connection.execute(sa.select(RUNS.c.run_id))]


def update_run(connection: sa.Connection, run_id: str, **values: Any) -> None:
    connection.execute(sa.update(RUNS).where(RUNS.c.run_id == run_id).values(**values))


def run_ids_of_session(connection: sa.Connection, session_id: str) -> list[str]:
    query = sa.select(RUNS.c.run_id).where(RUNS.c.session_id == session_id).order_by(RUNS.c.created_at)
    return [row.run_id for row in connection.execute(query)]


def corrupted_runs(connection: sa.Connection, session_id: str) -> set[str]:
    query = sa.select(RUNS.c.run_id).where(RUNS.c.session_id == session_id, RUNS.c.corrupted)
    return set(connection.execute(query).scalars())


def sampler(connection: sa.Connection, sampler_id: str) -> SamplerRow | None:
    rows = _fetch(connection, sa.select(SAMPLERS).where(SAMPLERS.c.sampler_id == sampler_id), SamplerRow)
    return rows[0] if rows else None


def sampler_ids_of_session(connection: sa.Connection, session_id: str) -> list[str]:
    query = sa.select(SAMPLERS.c.sampler_id).where(SAMPLERS.c.session_id == session_id)
    return [row.sampler_id for row in connection.execute(query.order_by(SAMPLERS.c.created_at))]


# ---- checkpoints ----

_CURRENT = CHECKPOINTS.c.superseded_at.is_(None) & CHECKPOINTS.c.deleted_at.is_(None)


def _under(run_id: str, kind: str, name: str) -> sa.ColumnElement[bool]:
    return (CHECKPOINTS.c.run_id == run_id) & (CHECKPOINTS.c.kind == kind) & (CHECKPOINTS.c.name == name)


def checkpoint_by_id(connection: sa.Connection, checkpoint_id: str) -> CheckpointRow | None:
    """A version, whatever became of it."""
    query = sa.select(CHECKPOINTS).where(CHECKPOINTS.c.checkpoint_id == checkpoint_id)
    rows = _fetch(connection, query, CheckpointRow)
    return rows[0] if rows else None


def describe(connection: sa.Connection, rows: Sequence[CheckpointRow]) -> list[Checkpoint]:
    """As a client sees them, each with the address of its parent."""
    wanted = {row.parent for row in rows if row.parent is not None}
    parents = _fetch(connection, sa.select(CHECKPOINTS).where(CHECKPOINTS.c.checkpoint_id.in_(wanted)), CheckpointRow)
    addresses = {row.checkpoint_id: row.address for row in parents}
    return [row.as_checkpoint(None if row.parent is None else addresses.get(row.parent)) for row in rows]


def _alive(now: float) -> sa.ColumnElement[bool]:
    return CHECKPOINTS.c.expires_at.is_(None) | (CHECKPOINTS.c.expires_at > now)


def versions(connection: sa.Connection, run_id: str, kind: str, name: str) -> list[CheckpointRow]:
    """All versions ever saved under a name, newest first, the superseded and the deleted included."""
    query = sa.select(CHECKPOINTS).where(_under(run_id, kind, name)).order_by(CHECKPOINTS.c.version.desc())
    return _fetch(connection, query, CheckpointRow)


def checkpoints(
    connection: sa.Connection,
    now: float,
    *,
    run_id: str | None = None,
    kinds: Collection[str] = PATH_KINDS,
    owner: str | None = None,
    limit: int | None = None,
    offset: int = 0,
) -> tuple[list[CheckpointRow], int]:
    """Current versions, newest first, and how many there are; of one run and one user, or of all."""
    where = [_CURRENT, _alive(now), CHECKPOINTS.c.kind.in_(kinds), _owned(CHECKPOINTS, owner)]
    if run_id is not None:
        where.append(CHECKPOINTS.c.run_id == run_id)
    newest = sa.select(CHECKPOINTS).where(*where)
    newest = newest.order_by(CHECKPOINTS.c.created_at.desc(), CHECKPOINTS.c.checkpoint_id)
    return _fetch(connection, newest.limit(limit).offset(offset), CheckpointRow), _count(
        connection, CHECKPOINTS, *where
    )


def newest_checkpoint(connection: sa.Connection, run_id: str, kind: str, now: float) -> CheckpointRow | None:
    query = sa.select(CHECKPOINTS).where(
        CHECKPOINTS.c.run_id == run_id, CHECKPOINTS.c.kind == kind, _CURRENT, _alive(now)
    )
    rows = _fetch(connection, query.order_by(CHECKPOINTS.c.created_at.desc()).limit(1), CheckpointRow)
    return rows[0] if rows else None


def register_checkpoint(connection: sa.Connection, row: CheckpointRow, *, overwrite: bool) -> None:
    """Make `row` the current version of its name. Raises `AlreadyExists` if there is one and `overwrite` is not set."""
    current = _under(row.run_id, row.kind, row.name) & _CURRENT
    if not overwrite and _count(connection, CHECKPOINTS, current, _alive(row.created_at)):
        raise AlreadyExists(f"checkpoint {row.path!r} exists; set overwrite, or take another name")
    connection.execute(sa.update(CHECKPOINTS).where(current).values(superseded_at=row.created_at))
    insert(connection, CHECKPOINTS, row)


def update_checkpoint(connection: sa.Connection, checkpoint_id: str, **values: Any) -> None:
    connection.execute(sa.update(CHECKPOINTS).where(CHECKPOINTS.c.checkpoint_id == checkpoint_id).values(**values))


def stored_versions(connection: sa.Connection, row: CheckpointRow) -> list[CheckpointRow]:
    """Of its name, newest first; those that are not deleted."""
    return [version for version in versions(connection, row.run_id, row.kind, row.name) if version.deleted_at is None]


def delete_versions(connection: sa.Connection, row: CheckpointRow, at: float, *, by_rule: bool = False) -> list[str]:
    """Mark all versions of the name deleted, but by a rule not those older ones that are published or pinned; their
    folders."""
    doomed = [
        version
        for version in stored_versions(connection, row)
        if not by_rule or version.version == row.version or not (version.public or version.is_pinned)
    ]
    return _delete_all(connection, doomed, at)


def _delete_all(connection: sa.Connection, doomed: Sequence[CheckpointRow], at: float) -> list[str]:
    for version in doomed:
        update_checkpoint(connection, version.checkpoint_id, deleted_at=at)
    return [version.folder for version in doomed]


def delete_superseded(
    connection: sa.Connection, row: CheckpointRow, at: float, *, keep: int, in_use: Collection[str] = ()
) -> list[str]:
    """Mark all but the newest `keep` superseded versions of the name deleted, but for those that are published, pinned
    or in use; their folders."""
    old = [version for version in stored_versions(connection, row) if version.superseded_at is not None]
    surplus = [version for version in old if not (version.public or version.is_pinned)][keep:]
    return _delete_all(connection, [version for version in surplus if version.checkpoint_id not in in_use], at)


def stored_checkpoints(
    connection: sa.Connection, *, owner: str | None = None, project_id: str | None = None
) -> list[CheckpointRow]:
    """All versions that take room, oldest first; of one owner, of the sessions of one project, or of all."""
    query = sa.select(CHECKPOINTS).where(CHECKPOINTS.c.deleted_at.is_(None))
    if owner is not None:
        query = query.where(CHECKPOINTS.c.owner == owner)
    if project_id is not None:
        query = query.join(RUNS, RUNS.c.run_id == CHECKPOINTS.c.run_id)
        query = query.join(SESSIONS, SESSIONS.c.session_id == RUNS.c.session_id)
        query = query.where(SESSIONS.c.project_id == project_id)
    return _fetch(connection, query.order_by(CHECKPOINTS.c.created_at, CHECKPOINTS.c.checkpoint_id), CheckpointRow)


def project_of_run(connection: sa.Connection, run_id: str) -> str | None:
    query = sa.select(SESSIONS.c.project_id).join(RUNS, RUNS.c.session_id == SESSIONS.c.session_id)
    return connection.execute(query.where(RUNS.c.run_id == run_id)).scalar_one_or_none()


def checkpoint_folders(connection: sa.Connection) -> set[str]:
    """Of all versions that are not deleted."""
    query = sa.select(CHECKPOINTS.c.folder).where(CHECKPOINTS.c.deleted_at.is_(None))
    return {row.folder for row in connection.execute(query)}


def expired_checkpoints(connection: sa.Connection, now: float) -> list[CheckpointRow]:
    return _fetch(connection, sa.select(CHECKPOINTS).where(_CURRENT, CHECKPOINTS.c.expires_at <= now), CheckpointRow)
