"""How much was computed and stored: tokens per hour, session and base model; checkpoints and the space they take.

Tokens are counted in memory and written by the janitor; what a crash loses is less than a minute's worth, and a request
that is done again after it is not counted again. Checkpoints and their space follow from their records.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa

from tinsmith.control.database import insert_into
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.identity import Clock
from tinsmith.control.registry import CHECKPOINTS, COUNTED_REQUESTS, RUNS, SESSIONS, USAGE, Registry

HOUR_S = 3600
GIGABYTE = 1e9

TokenKind: TypeAlias = Literal["training", "prefill", "cached_prefill", "sampled"]
_Bucket: TypeAlias = tuple[int, str, str, TokenKind]
_Share: TypeAlias = tuple[int, str, str, str | None, str]
"""Hour, session, user, project, base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent:
    """What one session used of one kind in one hour."""

    hour: int
    """Its first second, since 1970."""
    session_id: str
    user_id: str
    project_id: str | None
    base_model: str
    kind: TokenKind | Literal["checkpoint", "storage"]
    amount: float
    """Tokens, checkpoints, or gigabyte-hours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    events: list[UsageEvent]
    session_metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of every session in `events`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShare:
    """Checkpoints of one user in one project."""

    user_id: str
    project_id: str | None
    count: int
    size_bytes: int


class Meter:
    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self._flushing = asyncio.Lock()
        self._pending: Counter[_Bucket] = Counter()
        self._fresh: set[str] = set()
        """Requests counted since the last flush."""
        self._marked: set[str] = set()
        """Requests counted before, as far as a replay would do them again; on disk with what was counted."""
        self.replayable: Callable[[], Awaitable[set[str]]] = _nothing
        """Requests that are in the ledger and will be after a crash."""
        self.on_count: Callable[[TokenKind, str, int], None] = lambda kind, base_model, count: None

    def count(self, kind: TokenKind, session_id: str, base_model: str, tokens: int) -> None:
        if tokens > 0:
            hour = int(self._clock.time()) // HOUR_S * HOUR_S
            self._pending[hour, session_id, base_model, kind] += tokens
            self.on_count(kind, base_model, tokens)

    def is_first(self, request_id: str) -> bool:
        """Whether what this request uses was not counted yet; from now on it was."""
        if request_id in self._fresh or request_id in self._marked:
            return False
        self._fresh.add(request_id)
        return True

    async def recall(self) -> None:
        """After a crash: which of the requests that will be done again were counted."""
        rows = await self._registry.read(lambda c: c.execute(sa.select(COUNTED_REQUESTS.c.request_id)).all())
        self._marked = {row.request_id for row in rows}

    async def flush(self) -> None:
        """Write what was counted; kept for the next time if the registry refuses."""
        async with self._flushing:
            await self._flush()

    async def _flush(self) -> None:
        pending, self._pending = self._pending, Counter()
        fresh, self._fresh = self._fresh, set()
        self._marked |= fresh
        try:
            kept = await self.replayable() if self._marked else set()
            spent = self._marked - kept
            if pending or fresh or spent:
                await self._registry.write(lambda c: _write(c, pending, fresh & kept, spent - fresh))
        except BaseException:
            self._pending.update(pending)
            self._fresh |= fresh
            self._marked -= fresh
            raise
        self._marked -= spent

    async def report(self, start: float, end: float, owner: str | None = None) -> UsageReport:
        """Whole hours from `start` up to, not including, `end`; of one user, or of all.

        Oldest first, then the most first.
        """
        await self.flush()
        now = self._clock.time()
        return await self._registry.read(lambda c: usage_report(c, int(start), int(end), now, owner))

    async def stored(self, project_id: str | None, owner: str | None = None) -> list[StoredShare]:
        """What is stored now; of one project and one user, or of all."""
        now = self._clock.time()
        return await self._registry.read(lambda c: _stored(c, project_id, owner, now))


async def _nothing() -> set[str]:
    return set()


def _write(connection: sa.Connection, counted: Mapping[_Bucket, int], marked: set[str], spent: set[str]) -> None:
    _add(connection, counted)
    if marked:
        mark = insert_into(connection, COUNTED_REQUESTS).on_conflict_do_nothing()  # an unsettled write may have done it
        connection.execute(mark, [{"request_id": request_id} for request_id in marked])
    if spent:
        one = sa.delete(COUNTED_REQUESTS).where(COUNTED_REQUESTS.c.request_id == sa.bindparam("spent"))
        connection.execute(one, [{"spent": request_id} for request_id in spent])


def _add(connection: sa.Connection, counted: Mapping[_Bucket, int]) -> None:
    for (hour, session_id, base_model, kind), tokens in counted.items():
        row = insert_into(connection, USAGE).values(
            hour=hour, session_id=session_id, base_model=base_model, kind=kind, tokens=tokens
        )
        sum_of_both = {"tokens": USAGE.c.tokens + row.excluded.tokens}
        connection.execute(row.on_conflict_do_update(index_elements=list(USAGE.primary_key), set_=sum_of_both))


def usage_report(connection: sa.Connection, start: int, end: int, now: float, owner: str | None = None) -> UsageReport:
    """Of what was written; a server has counted more."""
    events = _token_events(connection, start, end) + _checkpoint_events(connection, start, end, now)
    events = [event for event in events if owner is None or event.user_id == owner]
    events.sort(key=lambda event: (event.hour, -event.amount))
    sessions = {event.session_id for event in events}
    query = sa.select(SESSIONS.c.session_id, SESSIONS.c.user_metadata).where(SESSIONS.c.session_id.in_(sessions))
    return UsageReport(
        events=events, session_metadata={row.session_id: row.user_metadata for row in connection.execute(query)}
    )


def _token_events(connection: sa.Connection, start: int, end: int) -> list[UsageEvent]:
    query = (
        sa.select(USAGE, SESSIONS.c.owner, SESSIONS.c.project_id)
        .join(SESSIONS, SESSIONS.c.session_id == USAGE.c.session_id, isouter=True)
        .where(USAGE.c.hour >= start, USAGE.c.hour < end)
    )
    return [
        UsageEvent(
            hour=row.hour,
            session_id=row.session_id,
            user_id=row.owner or LOCAL_USER_ID,
            project_id=row.project_id,
            base_model=row.base_model,
            kind=row.kind,
            amount=row.tokens,
        )
        for row in connection.execute(query)
    ]


def _checkpoint_events(connection: sa.Connection, start: int, end: int, now: float) -> list[UsageEvent]:
    made: Counter[_Share] = Counter()
    stored: dict[_Share, float] = defaultdict(float)
    for row in connection.execute(_checkpoints().where(CHECKPOINTS.c.created_at < end)):
        who = (row.session_id, row.owner, row.project_id, row.base_model)
        if row.created_at >= start:
            made[int(row.created_at) // HOUR_S * HOUR_S, *who] += 1
        gone = min(filter(None, (row.deleted_at, row.expires_at, now)))
        for hour, seconds in _hours(max(row.created_at, start), min(gone, end)):
            stored[hour, *who] += row.size_bytes / GIGABYTE * seconds / HOUR_S
    return [_event(key, "checkpoint", n) for key, n in made.items()] + [
        _event(key, "storage", n) for key, n in stored.items()
    ]


def _event(key: _Share, kind: Literal["checkpoint", "storage"], amount: float) -> UsageEvent:
    hour, session_id, user_id, project_id, base_model = key
    return UsageEvent(
        hour=hour,
        session_id=session_id,
        user_id=user_id,
        project_id=project_id,
        base_model=base_model,
        kind=kind,
        amount=amount,
    )


def _hours(start: float, end: float) -> Iterable[tuple[int, float]]:
    """The hours that `start`..`end` touches, each with the seconds of it."""
    hour = int(start) // HOUR_S * HOUR_S
    while hour < end:
        yield hour, min(end, hour + HOUR_S) - max(start, hour)
        hour += HOUR_S


def _checkpoints() -> sa.Select[Any]:
    return (
        sa.select(CHECKPOINTS, RUNS.c.session_id, SESSIONS.c.project_id)
        .join(RUNS, RUNS.c.run_id == CHECKPOINTS.c.run_id)
        .join(SESSIONS, SESSIONS.c.session_id == RUNS.c.session_id)
    )


def _stored(connection: sa.Connection, project_id: str | None, owner: str | None, now: float) -> list[StoredShare]:
    alive = CHECKPOINTS.c.deleted_at.is_(None) & (CHECKPOINTS.c.expires_at.is_(None) | (CHECKPOINTS.c.expires_at > now))
    query = _checkpoints().where(alive)
    if project_id is not None:
        query = query.where(SESSIONS.c.project_id == project_id)
    if owner is not None:
        query = query.where(CHECKPOINTS.c.owner == owner)
    counts: Counter[tuple[str, str | None]] = Counter()
    sizes: Counter[tuple[str, str | None]] = Counter()
    for row in connection.execute(query):
        counts[row.owner, row.project_id] += 1
        sizes[row.owner, row.project_id] += row.size_bytes
    return [
        StoredShare(user_id=user_id, project_id=project_id, count=count, size_bytes=sizes[user_id, project_id])
        for (user_id, project_id), count in counts.items()
    ]
