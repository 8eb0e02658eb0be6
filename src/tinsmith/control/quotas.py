"""Quotas of users and projects: tokens per minute, live models, samples at once. Both must have room.

Tokens are a bucket that holds a minute's worth and fills all the time. Work begins while there is anything in it and
may take more than there is; what follows waits until that is made up for. Training waits in its queue, and its polls
say so; a sample is refused, with the time after which it should be sent again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tinsmith.control.errors import QuotaExceeded
from tinsmith.control.identities import Quota
from tinsmith.control.identity import Clock
from tinsmith.control.sessions import Session, SessionBook

MINUTE_S = 60.0
RETRY_S = 5.0
"""When to ask again for what somebody else has to let go of."""

Subject: TypeAlias = tuple[str, str]
"""`("user", id)` or `("project", id)`."""


class QuotaBook(Protocol):
    """What the quotas are, at this moment."""

    def quota_of_user(self, user_id: str) -> Quota: ...

    def quota_of_project(self, project_id: str | None) -> Quota: ...


@dataclass(frozen=True, slots=True)
class Pause:
    """Why work waits, and for how long."""

    seconds: float
    reason: str


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float


class Quotas:
    def __init__(self, sessions: SessionBook, book: QuotaBook, clock: Clock) -> None:
        self._sessions = sessions
        self._book = book
        self._clock = clock
        self._buckets: dict[Subject, _Bucket] = {}
        self._samples: dict[str, tuple[Subject, ...]] = {}
        self._num_samples: Counter[Subject] = Counter()

    # ---- tokens ----

    def pause(self, session_id: str) -> Pause | None:
        """`None` if work of this session may begin."""
        pauses = (self._pause(subject, quota) for subject, quota in self._limits(session_id))
        return max((pause for pause in pauses if pause is not None), key=lambda pause: pause.seconds, default=None)

    def room(self, session_id: str) -> float:
        """Tokens until the next pause."""
        limits = ((s, quota.tokens_per_minute) for s, quota in self._limits(session_id))
        return min((self._bucket(s, limit).level for s, limit in limits if limit is not None), default=math.inf)

    def spend(self, session_id: str, tokens: int) -> None:
        for subject, quota in self._limits(session_id):
            if quota.tokens_per_minute is not None:
                self._bucket(subject, quota.tokens_per_minute).level -= tokens

    def _pause(self, subject: Subject, quota: Quota) -> Pause | None:
        limit = quota.tokens_per_minute
        if limit is None:
            return None
        level = self._bucket(subject, limit).level
        if level > 0:
            return None
        if limit == 0:
            return Pause(MINUTE_S, f"{_name(subject)} has a quota of 0 tokens per minute")
        seconds = max(0.001, (1 - level) * MINUTE_S / limit)
        return Pause(
            seconds,
            f"{_name(subject)} has used its {limit:,} tokens per minute, and {0 - level:,.0f} more; "
            f"work goes on by itself in {math.ceil(seconds)} s",
        )

    def _bucket(self, subject: Subject, limit: int) -> _Bucket:
        now = self._clock.monotonic()
        bucket = self._buckets.setdefault(subject, _Bucket(float(limit), now))
        bucket.level = min(float(limit), bucket.level + (now - bucket.at) * limit / MINUTE_S)
        bucket.at = now
        return bucket

    # ---- samples ----

    def check_sample(self, session_id: str) -> None:
        """Raises `QuotaExceeded`."""
        if (pause := self.pause(session_id)) is not None:
            raise QuotaExceeded(pause.reason, retry_after_s=pause.seconds)
        for subject, quota in self._limits(session_id):
            limit, count = quota.concurrent_samples, self._num_samples[subject]
            if limit is not None and count >= limit:
                raise QuotaExceeded(
                    f"{_name(subject)} has {count:,} samples that wait or are drawn, and a quota of {limit:,} at once",
                    retry_after_s=RETRY_S if limit == 0 else 1.0,
                )

    def sample_began(self, request_id: str, session_id: str) -> None:
        subjects = tuple(subject for subject, _ in self._limits(session_id))
        self._samples[request_id] = subjects
        self._num_samples.update(subjects)

    def sample_ended(self, request_id: str) -> None:
        """Unknown ones are no error."""
        for subject in self._samples.pop(request_id, ()):
            self._num_samples[subject] -= 1
            if not self._num_samples[subject]:
                del self._num_samples[subject]

    # ---- models ----

    def check_model(self, session_id: str, session_ids_of_live: list[str]) -> None:
        """Whether there may be one more beside those of these sessions. Raises `QuotaExceeded`."""
        for subject, quota in self._limits(session_id):
            if quota.live_models is None:
                continue
            owners = (subject in dict(self._limits(other)) for other in session_ids_of_live)
            if (count := sum(owners)) >= quota.live_models:
                raise QuotaExceeded(
                    f"{_name(subject)} has {count:,} live models, and a quota of {quota.live_models:,}; "
                    "finish a session or unload a model first",
                    retry_after_s=RETRY_S,
                )

    def _limits(self, session_id: str) -> Iterator[tuple[Subject, Quota]]:
        session = self._sessions.find(session_id)
        return iter(()) if session is None else self._limits_of(session)

    def _limits_of(self, session: Session) -> Iterator[tuple[Subject, Quota]]:
        yield ("user", session.owner), self._book.quota_of_user(session.owner)
        if session.project_id is not None:
            yield ("project", session.project_id), self._book.quota_of_project(session.project_id)


def _name(subject: Subject) -> str:
    kind, name = subject
    return f"{kind} {name!r}"
