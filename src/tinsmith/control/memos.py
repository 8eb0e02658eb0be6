"""What a dialect remembers beside requests, models and samplers: small values under names, as long as their session."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from tinsmith.control.journal import Journal
from tinsmith.control.ledger import Change, Entry, put, remove
from tinsmith.types.errors import StorageError

KIND = "memo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memo:
    name: str
    session_id: str
    value: Any
    """Of a type that `ledger_codec.recorded` knows."""


class Memos:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._restored: list[Memo] = []

    def keep(self, memo: Memo) -> asyncio.Future[None]:
        """Written in the order of these calls, among all entries; replaces the one of that name, which must be of the
        same session. What is returned ends once it is on disk, or with a `StorageError`."""
        return self._post(put(Entry(kind=KIND, name=memo.name, session_id=memo.session_id, value=memo.value)))

    def drop(self, name: str) -> asyncio.Future[None]:
        """As `keep`."""
        return self._post(remove(f"kind = '{KIND}' AND name = ?", name))

    def _post(self, change: Change) -> asyncio.Future[None]:
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle(error: StorageError | None) -> None:
            if written.done():
                return
            if error is None:
                written.set_result(None)
            else:
                written.set_exception(error)
                written.exception()  # whoever waits gets it; it is no complaint if nobody does

        self._journal.post([change], settle)
        return written

    def restore(self, entry: Entry) -> None:
        if entry.session_id is None:
            raise AssertionError(f"the ledger has a memo {entry.name!r} without its session")
        self._restored.append(Memo(name=entry.name, session_id=entry.session_id, value=entry.value))

    def take(self) -> list[Memo]:
        """What earlier servers kept, of sessions that are live still; each memo is told once."""
        restored, self._restored = self._restored, []
        return restored
