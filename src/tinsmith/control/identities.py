"""Who may do what: users, keys, projects and quotas as values, and the caller that a request comes from."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from tinsmith.types.errors import InvalidInput

Role: TypeAlias = Literal["admin", "member", "viewer"]
ROLES: tuple[Role, ...] = get_args(Role)
Scope: TypeAlias = Literal["read", "train", "sample", "metrics", "admin"]
"""`metrics` is for a program that watches the server: figures of everybody's work, and nothing else."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
QuotaSubject: TypeAlias = Literal["user", "project"]
QUOTA_SUBJECTS: tuple[QuotaSubject, ...] = get_args(QuotaSubject)

_SCOPES_OF_ROLE: dict[Role, frozenset[Scope]] = {
    "admin": frozenset(SCOPES),
    "member": frozenset({"read", "train", "sample"}),
    "viewer": frozenset({"read"}),
}

LOCAL_USER_ID = "local"
"""Whoever uses a server without keys."""

KEY_START = "tml-"
"""The official SDK refuses keys that begin otherwise."""
_KEY_BYTES = 24
_PREFIX_DIGITS = 8
_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    user_id: str
    role: Role = "member"
    email: str | None = None
    created_at: float
    disabled_at: float | None = None
    """From then on its keys are refused; what it owns stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    project_id: str
    weight: float = 1.0
    """Its share of the engines beside other projects that have work."""
    created_at: float
    member_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is kept of a key: never the key."""

    key_id: int
    user_id: str
    prefix: str
    """Its first characters, to tell keys apart."""
    scopes: tuple[Scope, ...]
    project_id: str | None = None
    """Of sessions made with it that name no project."""
    note: str = ""
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def status(self, now: float) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Limits of a user, or of a project; `None` is no limit."""

    tokens_per_minute: int | None = None
    """Trained, prefilled and sampled together."""
    live_models: int | None = None
    concurrent_samples: int | None = None
    disk_bytes: int | None = None
    """Of all stored checkpoints."""


NO_QUOTA = Quota()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, and what it may."""

    user_id: str
    role: Role
    scopes: frozenset[Scope]
    """What key and role both allow."""
    key_id: int | None
    """`None` for the user of a server without keys."""
    project_ids: frozenset[str] = field(default_factory=frozenset)
    """Of which it is a member."""
    project_id: str | None = None
    """Of sessions that name none."""
    email: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether everything here is its own."""
        return self.key_id is None

    @property
    def sees_all(self) -> bool:
        return self.key_id is None or "admin" in self.scopes


LOCAL = Caller(user_id=LOCAL_USER_ID, role="admin", scopes=frozenset(SCOPES), key_id=None)


def caller_of(key: Key, user: User, project_ids: Iterable[str]) -> Caller:
    return Caller(
        user_id=user.user_id,
        role=user.role,
        scopes=frozenset(key.scopes) & _SCOPES_OF_ROLE[user.role],
        key_id=key.key_id,
        project_ids=frozenset(project_ids),
        project_id=key.project_id,
        email=user.email,
    )


def new_key() -> str:
    """192 random bits; 32 of them are shown again as its prefix."""
    return KEY_START + secrets.token_hex(_KEY_BYTES)


def key_prefix(secret: str) -> str:
    return secret[: len(KEY_START) + _PREFIX_DIGITS]


def key_digest(secret: str) -> str:
    """SHA-256: a key is random enough that no slow hash is needed to keep it from being guessed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def check_name(kind: str, name: str) -> str:
    """Raises `InvalidInput` for a name that would need quotes somewhere."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{kind} {name!r} must be 1 to 63 of a-z, 0-9 and . _ @ -, and begin with a letter or a digit"
        )
    if kind == "user" and name == LOCAL_USER_ID:
        raise InvalidInput(f"user {name!r} is whoever uses a server without keys; take another name")
    return name


def check_scopes(scopes: Iterable[str]) -> tuple[Scope, ...]:
    """In a fixed order. Raises `InvalidInput`."""
    wanted = set(scopes)
    for scope in sorted(wanted - set(SCOPES)):
        raise InvalidInput(f"scope {scope!r} is unknown; known are {', '.join(SCOPES)}")
    if not wanted:
        raise InvalidInput(f"a key needs at least one scope of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in wanted)


def scopes_of_role(role: Role) -> tuple[Scope, ...]:
    return tuple(scope for scope in SCOPES if scope in _SCOPES_OF_ROLE[role])


def check_role(role: str) -> Role:
    for known in ROLES:
        if role == known:
            return known
    raise InvalidInput(f"role {role!r} is unknown; known are {', '.join(ROLES)}")
