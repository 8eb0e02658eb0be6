"""Whose a thing is. Ids of models, samplers and losses begin with their session's, and a session has one owner."""

from __future__ import annotations

from collections import OrderedDict

from tinsmith.control import records
from tinsmith.control.futures import FutureStore
from tinsmith.control.registry import Registry
from tinsmith.control.sessions import SessionBook

MAX_REMEMBERED = 10_000


class Owners:
    def __init__(self, sessions: SessionBook, futures: FutureStore, registry: Registry) -> None:
        self._sessions = sessions
        self._futures = futures
        self._registry = registry
        self._ended: OrderedDict[str, str] = OrderedDict()
        """Of sessions that memory has forgotten; an owner never changes."""

    def of(self, object_id: str) -> str | None:
        """Of a session, or of what is in one: a model or run, a sampler, a loss. `None` if there is no such session.

        From memory for live sessions. Raises `StorageError`.
        """
        session_id = object_id.partition(":")[0]
        if (session := self._sessions.find(session_id)) is not None:
            return session.owner
        if (known := self._ended.get(session_id)) is not None:
            return known
        owner = self._registry.read_now(lambda c: records.owner_of_session(c, session_id))
        if owner is not None:
            self._ended[session_id] = owner
            while len(self._ended) > MAX_REMEMBERED:
                self._ended.popitem(last=False)
        return owner

    def of_request(self, request_id: str) -> str | None:
        """`None` for one that is unknown, or no longer kept; nobody's is `""`."""
        if not self._futures.knows(request_id):
            return None
        owner, place = self._futures.claimant(request_id)
        return owner or (self.of(place) if place else None) or ""
