"""How sessions begin and end, and what goes with them."""

from __future__ import annotations

import logging

from tinsmith.control import audit, records
from tinsmith.control.errors import SessionEnded
from tinsmith.control.identity import Clock, Ids
from tinsmith.control.journal import Journal, SessionRecord
from tinsmith.control.ledger import Entry, put
from tinsmith.control.records import SessionRow
from tinsmith.control.registry import SESSIONS, Registry
from tinsmith.control.requests import NewSession
from tinsmith.control.samplers import SamplerBook
from tinsmith.control.sampling import Sampling
from tinsmith.control.sessions import EndReason, FinishReason, Session, SessionBook
from tinsmith.control.settings import ControlSettings
from tinsmith.control.training import Training
from tinsmith.types.errors import NotFound, Overloaded

logger = logging.getLogger(__name__)


class SessionLife:
    def __init__(
        self,
        *,
        settings: ControlSettings,
        sessions: SessionBook,
        registry: Registry,
        journal: Journal,
        training: Training,
        sampling: Sampling,
        samplers: SamplerBook,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._registry = registry
        self._journal = journal
        self._training = training
        self._sampling = sampling
        self._samplers = samplers
        self._clock = clock
        self._ids = ids

    async def create(self, request: NewSession) -> str:
        """Durable when it returns. Raises `Overloaded` if too many are live."""
        if (count := len(self._sessions.live)) >= self._settings.max_live_sessions:
            raise Overloaded(
                f"{count:,} sessions are live, the most this server keeps; finish some, or try again later"
            )
        row = SessionRow(
            session_id=self._ids.session_id(),
            owner=request.owner,
            created_at=self._clock.time(),
            tags=list(request.tags),
            user_metadata=dict(request.user_metadata),
            sdk_version=request.sdk_version,
            project_id=request.project_id,
            display_name=request.display_name,
        )
        await self._registry.write(lambda c: records.insert(c, SESSIONS, row))
        entry = Entry(
            kind="session", name=row.session_id, session_id=row.session_id, value=SessionRecord(request=request)
        )
        await self._journal.write([put(entry)])
        self._sessions.add(
            row.session_id,
            self._clock.monotonic(),
            owner=request.owner,
            project_id=request.project_id,
            timeout_s=request.timeout_s,
            orders_by_arrival=request.orders_by_arrival,
        )
        return row.session_id

    def heartbeat(self, session_id: str) -> None:
        """Raises `SessionEnded` with the reason, `NotFound` if there never was such a session."""
        if self._find(session_id) is None:
            raise SessionEnded(f"session {session_id!r} ended when the server was restarted")
        self._sessions.get_live(session_id)
        self._sessions.touch(session_id, self._clock.monotonic(), asks=False)

    async def finish(self, session_id: str, reason: FinishReason, detail: str | None) -> None:
        """Take no more requests; what waits is still done. The first reason stays. Raises `NotFound`."""
        session = self._find(session_id)
        if session is None or session.ended is not None:
            return
        self._end(session, reason, detail, drop=False)
        await self._registry.flush()

    def end_silent(self) -> None:
        for session, timeout_s in self._sessions.silent(self._clock.monotonic(), self._settings.session_timeout_s):
            self._end(session, "lost", f"no heartbeat for {timeout_s:g} s", drop=True)

    def end_all(self, why: str) -> None:
        for session in self._sessions.live:
            self._end(session, "lost", why, drop=True)

    def _find(self, session_id: str) -> Session | None:
        """`None` for one that ended with an earlier server process. Raises `NotFound`."""
        session = self._sessions.find(session_id)
        if session is None and self._registry.read_now(lambda c: records.session(c, session_id)) is None:
            raise NotFound(f"no session {session_id!r}")
        return session

    def _end(self, session: Session, reason: EndReason, detail: str | None, *, drop: bool) -> None:
        """`drop`: fail what waits instead of doing it."""
        ended = SessionEnded.because(session.session_id, reason, detail)
        forgotten = self._sessions.end(session, ended)
        if drop:
            self._training.drop_models(session, ended)
            self._sampling.cancel_all_of(session.session_id)
        else:
            self._training.close_models(session)
        self._samplers.release(session.sampler_ids)
        self._training.forget(forgotten)
        for old in forgotten:
            self._sampling.forget(old.sampler_ids)
        at = self._clock.time()
        self._journal.end_session(session.session_id, drop=drop)
        self._registry.post(lambda c: records.end_session(c, session.session_id, at, reason, detail))
        if reason == records.LOST:
            logger.info("session %s was ended: %s", session.session_id, detail)
            details = {"session_id": session.session_id, "reason": detail}
            self._registry.post(lambda c: audit.note(c, "session_expire", at, session.owner, **details))
