"""`Administration`: what admins do to users, keys, projects and quotas. Each deed is in the audit log.

`Deeds` are the same without a server: `tinsmith admin` does them on a data folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from tinsmith.control import account_records as rows
from tinsmith.control import audit
from tinsmith.control.accounts import Accounts
from tinsmith.control.audit import AuditEvent
from tinsmith.control.identities import (
    LOCAL_USER_ID,
    Caller,
    Key,
    Project,
    Quota,
    QuotaSubject,
    User,
    check_role,
    check_scopes,
    scopes_of_role,
)
from tinsmith.control.identity import Clock
from tinsmith.control.registry import Registry
from tinsmith.control.usage import Meter, UsageEvent, usage_report
from tinsmith.types.errors import InvalidInput, NotFound

MAX_LIFE_S = 10_000_000_000
"""Of a key; what lies beyond a calendar's end could not be shown."""

P = ParamSpec("P")
T = TypeVar("T")


class Deeds:
    """On a registry. Every method raises `InvalidInput`, `NotFound`, `AlreadyExists` or `StorageError`."""

    def __init__(self, registry: Registry, clock: Clock, *, by: str = LOCAL_USER_ID) -> None:
        """`by`: in whose audit log they are."""
        self._registry = registry
        self._clock = clock
        self._by = by

    async def _read(self, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._registry.read(lambda c: work(c, *args, **kwargs))

    async def _do(self, event: AuditEvent, work: Callable[[sa.Connection], T], **details: Any) -> T:
        def noted(connection: sa.Connection) -> T:
            result = work(connection)
            about = details | ({"key_id": result[1].key_id} if isinstance(result, tuple) else {})
            audit.note(connection, event, self._clock.time(), self._by, **about)
            return result

        return await self._registry.write(noted)

    # ---- users ----

    async def users(self) -> list[User]:
        return await self._read(rows.users)

    async def user(self, user_id: str) -> User:
        return await self._read(rows.user, user_id)

    async def create_user(self, user_id: str, role: str = "member", email: str | None = None) -> User:
        at, chosen = self._clock.time(), check_role(role)
        return await self._do(
            "organization_user_create",
            lambda c: rows.create_user(c, user_id, role=chosen, email=email, at=at),
            user_id=user_id,
            role=role,
        )

    async def set_role(self, user_id: str, role: str) -> User:
        chosen = check_role(role)
        return await self._do(
            "organization_user_role_set",
            lambda c: rows.change_user(c, user_id, role=chosen),
            user_id=user_id,
            role=role,
        )

    async def set_disabled(self, user_id: str, disabled: bool) -> User:
        """A disabled user's keys are refused; what it owns stays."""
        at = self._clock.time() if disabled else None
        return await self._do(
            "organization_user_disable" if disabled else "organization_user_enable",
            lambda c: rows.change_user(c, user_id, disabled_at=at),
            user_id=user_id,
        )

    # ---- keys ----

    async def keys(self, user_id: str | None = None) -> list[Key]:
        return await self._read(rows.keys, user_id)

    async def create_key(
        self,
        user_id: str,
        *,
        scopes: list[str] | None = None,
        expires_in_s: float | None = None,
        project_id: str | None = None,
        note: str = "",
    ) -> tuple[str, Key]:
        """The key itself, told this once, and what is known of it. Without `scopes` it has all that its user's role
        allows."""
        if expires_in_s is not None and not 0 < expires_in_s < MAX_LIFE_S:
            raise InvalidInput(f"a key expires in more than 0 and less than {MAX_LIFE_S:,} s, not {expires_in_s:,g}")
        at = self._clock.time()
        wanted = None if scopes is None else check_scopes(scopes)

        def work(connection: sa.Connection) -> tuple[str, Key]:
            return rows.create_key(
                connection,
                user_id,
                scopes=wanted or scopes_of_role(rows.user(connection, user_id).role),
                project_id=project_id,
                note=note,
                expires_at=None if expires_in_s is None else at + expires_in_s,
                at=at,
            )

        return await self._do("organization_key_create", work, user_id=user_id)

    async def revoke_key(self, key_id: int) -> Key:
        """For good. Idempotent."""
        at = self._clock.time()
        return await self._do("organization_key_revoke", lambda c: rows.revoke_key(c, key_id, at), key_id=key_id)

    # ---- projects ----

    async def projects(self) -> list[Project]:
        return await self._read(rows.projects)

    async def create_project(self, project_id: str, weight: float = 1.0) -> Project:
        at = self._clock.time()
        return await self._do(
            "project_create",
            lambda c: rows.create_project(c, project_id, weight=weight, at=at),
            project_id=project_id,
            weight=weight,
        )

    async def set_weight(self, project_id: str, weight: float) -> Project:
        return await self._do(
            "project_weight_set",
            lambda c: rows.set_weight(c, project_id, weight),
            project_id=project_id,
            weight=weight,
        )

    async def add_member(self, project_id: str, user_id: str) -> Project:
        at = self._clock.time()
        return await self._do(
            "project_member_add",
            lambda c: rows.add_member(c, project_id, user_id, at),
            project_id=project_id,
            user_id=user_id,
        )

    async def remove_member(self, project_id: str, user_id: str) -> Project:
        return await self._do(
            "project_member_remove",
            lambda c: rows.remove_member(c, project_id, user_id),
            project_id=project_id,
            user_id=user_id,
        )

    # ---- quotas ----

    async def quotas(self) -> dict[tuple[QuotaSubject, str], Quota]:
        return await self._read(rows.quotas)

    async def change_quota(self, subject: QuotaSubject, subject_id: str, **limits: int | None) -> Quota:
        """Sets the limits that are given, and leaves the others; `None` takes one away."""

        def work(connection: sa.Connection) -> Quota:
            changed = rows.changed_quota(rows.quotas(connection).get((subject, subject_id)), limits)
            rows.set_quota(connection, subject, subject_id, changed)
            return changed

        return await self._do(
            "organization_quota_set", work, subject=subject, subject_id=subject_id, limits=dict(limits)
        )

    # ---- usage ----

    async def usage(self, start: float, end: float) -> list[UsageEvent]:
        """Per hour, session and base model, with user and project; seconds since 1970."""
        report = await self._read(usage_report, int(start), int(end), self._clock.time())
        return report.events


class Administration(Deeds):
    """Of a running server, by one of its admins."""

    def __init__(self, registry: Registry, clock: Clock, accounts: Accounts, meter: Meter, caller: Caller) -> None:
        super().__init__(registry, clock, by=caller.user_id)
        self._accounts = accounts
        self._meter = meter

    async def usage(self, start: float, end: float) -> list[UsageEvent]:
        """What was counted and not written yet included."""
        return (await self._meter.report(start, end)).events

    async def _do(self, event: AuditEvent, work: Callable[[sa.Connection], T], **details: Any) -> T:
        result = await super()._do(event, work, **details)
        await self._accounts.refresh()
        return result


class OwnKey:
    """What a caller may do to the key it calls with."""

    def __init__(self, accounts: Accounts, deeds: Administration, key_id: int) -> None:
        self._accounts = accounts
        self._deeds = deeds
        self._key_id = key_id

    def describe(self) -> Key:
        key = self._accounts.key(self._key_id)
        if key is None:
            raise NotFound(f"no key {self._key_id!r}")
        return key

    async def revoke(self) -> None:
        await self._deeds.revoke_key(self._key_id)
