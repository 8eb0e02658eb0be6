"""What the dialect remembers: its keys, their sessions and their adapters. One for the whole server; it is written down
as it changes, and read again by a server that goes on with the work of another."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tinsmith.control.ledger_codec import recorded
from tinsmith.control.memos import Memo

MAX_ENDED_NAMES = 1000


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerRecord:
    key: str
    """A hash of the key."""


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    name: str
    model_id: str
    base_model: str
    ended: str | None = None
    """Why it is none any more."""


@dataclass(slots=True, eq=False, kw_only=True)
class Publication:
    """Weights of an adapter that can be sampled, or will be."""

    version: int
    sampler_id: str
    request_id: str


@dataclass(slots=True, eq=False, kw_only=True)
class Adapter:
    name: str
    """As its user calls it."""
    model_id: str
    base_model: str
    last_used: float = 0.0
    """Monotonic seconds."""
    version: int = 0
    """Counts the requests that change its weights; a server that was started again counts where none counted before."""
    published: Publication | None = None
    made: asyncio.Future[None] | None = None
    """Ends once it is on disk; `None` for one of an earlier server."""


class Owner:
    """One key, and its session, which lives as long as it is used."""

    def __init__(self, key: str, session_id: str, first_number: int) -> None:
        """Numbers from `first_number` on were never used in the session."""
        self.key = key
        self.session_id = session_id
        self.adapters: dict[str, Adapter] = {}
        self.ended: OrderedDict[str, str] = OrderedDict()
        """Names that were adapters, and why they are not any more; the newest `MAX_ENDED_NAMES`."""
        self.samplers: dict[str, str] = {}
        """Samplers of base models and checkpoints."""
        self.model_numbers = itertools.count(first_number)
        self.sampler_numbers = itertools.count(first_number)
        self.sample_numbers = itertools.count(first_number + 1)

    def memo(self) -> Memo:
        return Memo(name=f"tinkerbell {self.session_id}", session_id=self.session_id, value=OwnerRecord(key=self.key))

    def memo_of(self, name: str, *, model_id: str = "", base_model: str = "", ended: str | None = None) -> Memo:
        record = AdapterRecord(name=name, model_id=model_id, base_model=base_model, ended=ended)
        return Memo(name=f"tinkerbell {self.session_id} {name}", session_id=self.session_id, value=record)


@dataclass(slots=True, eq=False)
class Memory:
    """What earlier servers wrote is read when it is first asked for."""

    take_memos: Callable[[], Sequence[Memo]]
    first_number: Callable[[], int]
    """See `Owner`."""
    _owners: dict[str, Owner] = field(default_factory=dict)
    _by_session: dict[str, Owner] = field(default_factory=dict)

    def find(self, key: str) -> Owner | None:
        self._recall()
        return self._owners.get(key)

    def of_session(self, session_id: str) -> Owner | None:
        self._recall()
        return self._by_session.get(session_id)

    def new(self, key: str, session_id: str) -> Owner:
        """In place of the one that the key had."""
        old = self._owners.get(key)
        owner = Owner(key, session_id, self.first_number())
        if old is not None:
            self._by_session.pop(old.session_id, None)
            owner.ended = old.ended
        self._owners[key] = self._by_session[session_id] = owner
        return owner

    def _recall(self) -> None:
        memos = self.take_memos()
        for memo in memos:
            if isinstance(memo.value, OwnerRecord):
                self.new(memo.value.key, memo.session_id)
        for memo in memos:
            owner, record = self._by_session.get(memo.session_id), memo.value
            if owner is None or not isinstance(record, AdapterRecord):
                continue
            if record.ended is not None:
                owner.ended[record.name] = record.ended
                continue
            adapter = Adapter(name=record.name, model_id=record.model_id, base_model=record.base_model)
            adapter.last_used, adapter.version = time.monotonic(), self.first_number()
            owner.adapters[record.name] = adapter
