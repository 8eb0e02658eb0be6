"""Sessions: who is there, since when silent, and why they ended."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tinsmith.control.errors import SessionEnded
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.types.custom_loss import CustomLoss
from tinsmith.types.errors import NotFound

FinishReason: TypeAlias = Literal["success", "errored", "interrupted"]
"""As the client says."""
FINISH_REASONS: tuple[FinishReason, ...] = ("success", "errored", "interrupted")
EndReason: TypeAlias = FinishReason | Literal["lost"]
"""`lost`: the client stopped sending heartbeats, or the server was stopped."""

MAX_ENDED = 1000
"""Ended sessions remembered in memory, so that late requests get a reason."""


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    session_id: str
    owner: str = LOCAL_USER_ID
    """Of everything in it."""
    project_id: str | None = None
    last_seen: float
    """Monotonic seconds."""
    last_asked: float = 0.0
    """The same, heartbeats aside: when it last sent or polled anything."""
    timeout_s: float | None = None
    """Silence after which it ends; `None` takes the server's."""
    orders_by_arrival: bool = False
    """Whether requests of its models come without numbers."""
    ended: SessionEnded | None = None
    model_ids: list[str] = field(default_factory=list)
    sampler_ids: list[str] = field(default_factory=list)
    custom_losses: dict[str, CustomLoss] = field(default_factory=dict)
    """By loss id; empty once the session has ended, and its models with it."""

    @property
    def account(self) -> str:
        """Whose shares its work is done on: its project's, or without one its owner's."""
        return f"user:{self.owner}" if self.project_id is None else f"project:{self.project_id}"


class SessionBook:
    def __init__(self) -> None:
        self._live: dict[str, Session] = {}
        self._ended: OrderedDict[str, Session] = OrderedDict()

    @property
    def live(self) -> list[Session]:
        return list(self._live.values())

    def add(
        self,
        session_id: str,
        now: float,
        *,
        owner: str = LOCAL_USER_ID,
        project_id: str | None = None,
        timeout_s: float | None = None,
        orders_by_arrival: bool = False,
    ) -> Session:
        session = Session(
            session_id=session_id,
            owner=owner,
            project_id=project_id,
            last_seen=now,
            last_asked=now,
            timeout_s=timeout_s,
            orders_by_arrival=orders_by_arrival,
        )
        self._live[session_id] = session
        return session

    def find(self, session_id: str) -> Session | None:
        return self._live.get(session_id) or self._ended.get(session_id)

    def get_live(self, session_id: str) -> Session:
        """Raises `SessionEnded` with the reason, `NotFound` for one that this process never had."""
        session = self.find(session_id)
        if session is None:
            raise NotFound(f"no session {session_id!r} in this server process")
        if session.ended is not None:
            raise session.ended
        return session

    def touch(self, session_id: str, now: float, *, asks: bool = True) -> None:
        """`asks`: it was more than a heartbeat."""
        if (session := self.find(session_id)) is not None:
            session.last_seen = now
            if asks:
                session.last_asked = now

    def silent(self, now: float, timeout_s: float) -> list[tuple[Session, float]]:
        """Sessions that were silent for as long as they may, and how long that is; `timeout_s` unless they differ."""
        limits = ((session, session.timeout_s or timeout_s) for session in self._live.values())
        return [(session, limit_s) for session, limit_s in limits if now - session.last_seen >= limit_s]

    def end(self, session: Session, error: SessionEnded) -> list[Session]:
        """The sessions that are forgotten for it."""
        session.ended = error
        self._live.pop(session.session_id, None)
        self._ended[session.session_id] = session
        forgotten = []
        while len(self._ended) > MAX_ENDED:
            forgotten.append(self._ended.popitem(last=False)[1])
        return forgotten
