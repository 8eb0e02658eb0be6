"""`Accounts`: users, keys, projects and quotas in memory, as the registry has them.

A server without keys has one implicit user. From the first key on it asks everyone for one. Changes, made here or by
another process on the same registry, are seen within `POLL_S`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from tinsmith.control import account_records
from tinsmith.control.account_records import AccountRows
from tinsmith.control.errors import Unauthorized
from tinsmith.control.identities import LOCAL, NO_QUOTA, Caller, Key, Quota, QuotaSubject, User, caller_of, key_digest
from tinsmith.control.identity import Clock
from tinsmith.control.registry import Registry
from tinsmith.types.errors import StorageError, UserError

logger = logging.getLogger(__name__)

POLL_S = 0.25
"""How often the version of the accounts is looked at."""

MISSING_KEY = (
    "this server asks for a key: send yours as X-API-Key or as Authorization: Bearer "
    "(TINKER_API_KEY for Tinker clients); `tinsmith admin keys create` makes one"
)


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: str
    key: Key
    user: User
    caller: Caller


@dataclass(frozen=True, slots=True)
class _Index:
    """Never changed: a new one takes its place."""

    version: int = -1
    by_digest: Mapping[str, _Entry] = field(default_factory=dict)
    by_key_id: Mapping[int, _Entry] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    quotas: Mapping[tuple[QuotaSubject, str], Quota] = field(default_factory=dict)


class Accounts:
    def __init__(self, registry: Registry, clock: Clock, *, poll_s: float = POLL_S) -> None:
        self._registry = registry
        self._clock = clock
        self._poll_s = poll_s
        self._index = _Index()
        self._watcher: asyncio.Task[None] | None = None

    # ---- life ----

    async def start(self) -> None:
        """Raises `StorageError`."""
        await self.refresh()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None

    async def refresh(self) -> None:
        """What the registry has now. Raises `StorageError`."""
        if await self._registry.read(account_records.version) != self._index.version:
            self._index = _indexed(await self._registry.read(account_records.read_all))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except StorageError as error:
                logger.error("accounts may be out of date: %s", error)

    # ---- who asks ----

    @property
    def has_keys(self) -> bool:
        """Whether there ever was one: a server whose keys were all revoked is not open again."""
        return bool(self._index.by_key_id)

    def check_has_keys(self) -> None:
        """Raises `UserError` for a server that other machines can reach and nobody has a key of."""
        if not self.has_keys:
            raise UserError(
                "this server would be reachable from other machines, and has no keys to protect it. Make a user and a "
                "key first: `tinsmith admin users create NAME --role admin`, `tinsmith admin keys create NAME` (with "
                "the same --data-dir). Or listen on 127.0.0.1 and use an SSH tunnel"
            )

    def authenticate(self, secret: str | None) -> Caller:
        """Whom a key belongs to. Raises `Unauthorized`."""
        if not self.has_keys:
            return LOCAL
        if not secret:
            raise Unauthorized(MISSING_KEY)
        digest = key_digest(secret)
        entry = self._index.by_digest.get(digest)
        if entry is None or not hmac.compare_digest(entry.digest, digest):
            raise Unauthorized("this key is unknown here; ask whoever runs this server for one")
        return self._alive(entry)

    def caller(self, key_id: int | None) -> Caller:
        """Whoever has this key, as of now; `None` is the user of a server without keys. Raises `Unauthorized`."""
        if key_id is None:
            if self.has_keys:
                raise Unauthorized(MISSING_KEY)
            return LOCAL
        entry = self._index.by_key_id.get(key_id)
        if entry is None:
            raise Unauthorized("this key is unknown here; ask whoever runs this server for one")
        return self._alive(entry)

    def _alive(self, entry: _Entry) -> Caller:
        key, user = entry.key, entry.user
        if (status := key.status(self._clock.time())) != "active":
            raise Unauthorized(f"key {key.prefix!r} is {status}; make another with `tinsmith admin keys create`")
        if user.disabled_at is not None:
            raise Unauthorized(f"user {user.user_id!r} is disabled")
        return entry.caller

    def key(self, key_id: int) -> Key | None:
        entry = self._index.by_key_id.get(key_id)
        return None if entry is None else entry.key

    # ---- how much ----

    def quota_of_user(self, user_id: str) -> Quota:
        return self._index.quotas.get(("user", user_id), NO_QUOTA)

    def quota_of_project(self, project_id: str | None) -> Quota:
        if project_id is None:
            return NO_QUOTA
        return self._index.quotas.get(("project", project_id), NO_QUOTA)

    def weight_of(self, project_id: str | None) -> float:
        """1 for sessions of no project, and of one that nobody made an account of."""
        return 1.0 if project_id is None else self._index.weights.get(project_id, 1.0)


def _indexed(rows: AccountRows) -> _Index:
    users = {user.user_id: user for user in rows.users}
    projects_of: dict[str, list[str]] = defaultdict(list)
    for project in rows.projects:
        for user_id in project.member_ids:
            projects_of[user_id].append(project.project_id)
    entries = [
        _Entry(digest, key, users[key.user_id], caller_of(key, users[key.user_id], projects_of[key.user_id]))
        for digest, key in rows.keys
    ]
    return _Index(
        version=rows.version,
        by_digest={entry.digest: entry for entry in entries},
        by_key_id={entry.key.key_id: entry for entry in entries},
        weights={project.project_id: project.weight for project in rows.projects},
        quotas=rows.quotas,
    )
