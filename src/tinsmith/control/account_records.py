"""Rows of accounts, and what is done to them. Functions take an open connection; times are Unix seconds.

Every change counts the version of the accounts up in its own transaction: whoever keeps them in memory looks at that
number, so that a change is seen everywhere, made by this process or by another on the same database.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import sqlalchemy as sa

from tinsmith.control.identities import (
    Key,
    Project,
    Quota,
    QuotaSubject,
    Role,
    Scope,
    User,
    check_name,
    key_digest,
    key_prefix,
    new_key,
)
from tinsmith.control.registry import KEYS, MEMBERSHIPS, META, PROJECTS, QUOTAS, USERS
from tinsmith.types.errors import AlreadyExists, InvalidInput, NotFound

_VERSION = "accounts_version"


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRows:
    """All of them, as of one moment."""

    version: int
    users: list[User]
    projects: list[Project]
    keys: list[tuple[str, Key]]
    """With their digests."""
    quotas: dict[tuple[QuotaSubject, str], Quota]


def version(connection: sa.Connection) -> int:
    found = connection.execute(sa.select(META.c.value).where(META.c.key == _VERSION)).scalar_one_or_none()
    return int(found or 0)


def _changed(connection: sa.Connection) -> None:
    count = str(version(connection) + 1)
    if connection.execute(sa.update(META).where(META.c.key == _VERSION).values(value=count)).rowcount == 0:
        connection.execute(sa.insert(META).values(key=_VERSION, value=count))


def read_all(connection: sa.Connection) -> AccountRows:
    as_of = version(connection)  # first: PostgreSQL shows later statements what is committed meanwhile
    keys = connection.execute(sa.select(KEYS).order_by(KEYS.c.key_id)).mappings()
    return AccountRows(
        version=as_of,
        users=users(connection),
        projects=projects(connection),
        keys=[(row["digest"], _key(row)) for row in keys],
        quotas=quotas(connection),
    )


# ---- users ----


def users(connection: sa.Connection) -> list[User]:
    rows = connection.execute(sa.select(USERS).order_by(USERS.c.user_id)).mappings()
    return [User(**row) for row in rows]


def user(connection: sa.Connection, user_id: str) -> User:
    """Raises `NotFound`."""
    row = connection.execute(sa.select(USERS).where(USERS.c.user_id == user_id)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no user {user_id!r}")
    return User(**row)


def create_user(connection: sa.Connection, user_id: str, *, role: Role, email: str | None, at: float) -> User:
    """Raises `InvalidInput`, `AlreadyExists`."""
    made = User(user_id=check_name("user", user_id), role=role, email=email, created_at=at)
    if connection.execute(sa.select(USERS.c.user_id).where(USERS.c.user_id == user_id)).first() is not None:
        raise AlreadyExists(f"user {user_id!r} exists")
    connection.execute(sa.insert(USERS).values(**asdict(made)))
    _changed(connection)
    return made


def change_user(connection: sa.Connection, user_id: str, **values: Any) -> User:
    """`values`: `role`, `email`, `disabled_at`. Raises `NotFound`."""
    user(connection, user_id)
    connection.execute(sa.update(USERS).where(USERS.c.user_id == user_id).values(**values))
    _changed(connection)
    return user(connection, user_id)


# ---- projects ----


def projects(connection: sa.Connection) -> list[Project]:
    members: dict[str, list[str]] = defaultdict(list)
    for row in connection.execute(sa.select(MEMBERSHIPS).order_by(MEMBERSHIPS.c.user_id)):
        members[row.project_id].append(row.user_id)
    rows = connection.execute(sa.select(PROJECTS).order_by(PROJECTS.c.project_id)).mappings()
    return [Project(**row, member_ids=tuple(members[row["project_id"]])) for row in rows]


def project(connection: sa.Connection, project_id: str) -> Project:
    """Raises `NotFound`."""
    for found in projects(connection):
        if found.project_id == project_id:
            return found
    raise NotFound(f"no project {project_id!r}")


def create_project(connection: sa.Connection, project_id: str, *, weight: float, at: float) -> Project:
    """Raises `InvalidInput`, `AlreadyExists`."""
    check_name("project", project_id)
    _check_weight(weight)
    if connection.execute(sa.select(PROJECTS).where(PROJECTS.c.project_id == project_id)).first() is not None:
        raise AlreadyExists(f"project {project_id!r} exists")
    connection.execute(sa.insert(PROJECTS).values(project_id=project_id, weight=weight, created_at=at))
    _changed(connection)
    return project(connection, project_id)


def set_weight(connection: sa.Connection, project_id: str, weight: float) -> Project:
    """Raises `InvalidInput`, `NotFound`."""
    _check_weight(weight)
    project(connection, project_id)
    connection.execute(sa.update(PROJECTS).where(PROJECTS.c.project_id == project_id).values(weight=weight))
    _changed(connection)
    return project(connection, project_id)


def _check_weight(weight: float) -> None:
    if not 0 < weight <= 1e6:
        raise InvalidInput(f"weight of a project must be more than 0 and at most 1,000,000, not {weight!r}")


def add_member(connection: sa.Connection, project_id: str, user_id: str, at: float) -> Project:
    """Idempotent. Raises `NotFound`."""
    found = project(connection, project_id)
    user(connection, user_id)
    if user_id not in found.member_ids:
        values = {"project_id": project_id, "user_id": user_id, "created_at": at}
        connection.execute(sa.insert(MEMBERSHIPS).values(**values))
        _changed(connection)
    return project(connection, project_id)


def remove_member(connection: sa.Connection, project_id: str, user_id: str) -> Project:
    """Raises `NotFound` if the user is no member."""
    if user_id not in project(connection, project_id).member_ids:
        raise NotFound(f"user {user_id!r} is no member of project {project_id!r}")
    one = (MEMBERSHIPS.c.project_id == project_id) & (MEMBERSHIPS.c.user_id == user_id)
    connection.execute(sa.delete(MEMBERSHIPS).where(one))
    _changed(connection)
    return project(connection, project_id)


# ---- keys ----


def _key(row: Any) -> Key:
    values = {f.name: row[f.name] for f in fields(Key)}
    return Key(**values | {"scopes": tuple(values["scopes"])})


def keys(connection: sa.Connection, user_id: str | None = None) -> list[Key]:
    """Oldest first; of one user, or of all. Raises `NotFound`."""
    query = sa.select(KEYS).order_by(KEYS.c.key_id)
    if user_id is not None:
        user(connection, user_id)
        query = query.where(KEYS.c.user_id == user_id)
    return [_key(row) for row in connection.execute(query).mappings()]


def key(connection: sa.Connection, key_id: int) -> Key:
    """Raises `NotFound`."""
    row = connection.execute(sa.select(KEYS).where(KEYS.c.key_id == key_id)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no key {key_id!r}")
    return _key(row)


def create_key(
    connection: sa.Connection,
    user_id: str,
    *,
    scopes: tuple[Scope, ...],
    project_id: str | None = None,
    note: str = "",
    expires_at: float | None = None,
    at: float,
) -> tuple[str, Key]:
    """The key itself, which is kept nowhere, and what is known of it. Raises `NotFound`, `InvalidInput`."""
    user(connection, user_id)
    if project_id is not None and user_id not in project(connection, project_id).member_ids:
        raise InvalidInput(f"user {user_id!r} is no member of project {project_id!r}")
    if expires_at is not None and expires_at <= at:
        raise InvalidInput(f"a key must expire later than now, not {at - expires_at:g} s ago")
    secret = new_key()
    values = {
        "user_id": user_id,
        "prefix": key_prefix(secret),
        "digest": key_digest(secret),
        "scopes": list(scopes),
        "project_id": project_id,
        "note": note,
        "created_at": at,
        "expires_at": expires_at,
    }
    key_id = connection.execute(sa.insert(KEYS).values(**values)).inserted_primary_key[0]  # type: ignore[index]
    _changed(connection)
    return secret, key(connection, key_id)


def revoke_key(connection: sa.Connection, key_id: int, at: float) -> Key:
    """Idempotent; the first time stays. Raises `NotFound`."""
    if key(connection, key_id).revoked_at is None:
        connection.execute(sa.update(KEYS).where(KEYS.c.key_id == key_id).values(revoked_at=at))
        _changed(connection)
    return key(connection, key_id)


# ---- quotas ----


def quotas(connection: sa.Connection) -> dict[tuple[QuotaSubject, str], Quota]:
    rows = connection.execute(sa.select(QUOTAS).order_by(QUOTAS.c.subject, QUOTAS.c.subject_id)).mappings()
    names = [f.name for f in fields(Quota)]
    return {(row["subject"], row["subject_id"]): Quota(**{name: row[name] for name in names}) for row in rows}


def changed_quota(quota: Quota | None, limits: Mapping[str, int | None]) -> Quota:
    """Raises `InvalidInput` for a limit that there is not."""
    names = [f.name for f in fields(Quota)]
    for name in limits:
        if name not in names:
            raise InvalidInput(f"quota {name!r} is unknown; known are {', '.join(names)}")
    return replace(quota or Quota(), **limits)


def set_quota(connection: sa.Connection, subject: QuotaSubject, subject_id: str, quota: Quota) -> None:
    """The whole of it. Raises `NotFound` for no such user or project, `InvalidInput` for a negative limit."""
    user(connection, subject_id) if subject == "user" else project(connection, subject_id)
    for name, limit in asdict(quota).items():
        if limit is not None and not 0 <= limit < 2**63:
            raise InvalidInput(f"{name} of a quota must be at least 0, not {limit!r}")
    one = (QUOTAS.c.subject == subject) & (QUOTAS.c.subject_id == subject_id)
    connection.execute(sa.delete(QUOTAS).where(one))
    connection.execute(sa.insert(QUOTAS).values(subject=subject, subject_id=subject_id, **asdict(quota)))
    _changed(connection)
