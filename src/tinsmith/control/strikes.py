"""Who was there when an engine died: kept in the ledger, so that a request that kills engines and servers is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from tinsmith.control.journal import Journal
from tinsmith.control.ledger import Change, Entry, mark_failed, put, remove
from tinsmith.types.errors import ServerError

KIND = "strike"


class KilledEngine(ServerError):
    """The engine died whenever it worked on this request."""

    @classmethod
    def after(cls, num_deaths: int) -> KilledEngine:
        return cls(f"the engine died {num_deaths} times while it worked on this request; it is given up")


class Strikes:
    """How many deaths of an engine each unanswered request was there at."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._counts: Counter[str] = Counter()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._counts

    def __getitem__(self, request_id: str) -> int:
        return self._counts[request_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def recall(self, entries: Sequence[Entry]) -> None:
        """Those that an earlier process counted."""
        self._counts.update({entry.name: int(entry.value) for entry in entries})

    def add(self, present: Sequence[Entry]) -> None:
        """One more death. `present` names the requests, each with its session, model and number; values are ours."""
        for entry in present:
            self._counts[entry.name] += 1
        self._journal.note([put(self._counted(entry)) for entry in present])

    def _counted(self, entry: Entry) -> Entry:
        return Entry(
            kind=KIND,
            name=entry.name,
            session_id=entry.session_id,
            model_id=entry.model_id,
            seq=entry.seq,
            value=self._counts[entry.name],
        )

    def keep(self, is_open: Callable[[str], bool]) -> None:
        """Forget requests that have been answered since."""
        answered = [request_id for request_id in self._counts if not is_open(request_id)]
        for request_id in answered:
            del self._counts[request_id]
        if answered:
            self._journal.note([remove(f"kind = '{KIND}' AND name = ?", request_id) for request_id in answered])

    def convict(self, limit: int) -> dict[str, KilledEngine]:
        """Those that were there too often, with what they fail with from now on."""
        found = {request_id: KilledEngine.after(self._counts[request_id]) for request_id in self._at_least(limit)}
        for request_id in found:
            del self._counts[request_id]
        self._journal.note([change for request_id, error in found.items() for change in _convicted(request_id, error)])
        return found

    def _at_least(self, limit: int) -> list[str]:
        return [request_id for request_id, count in self._counts.items() if count >= limit]


def _convicted(request_id: str, error: KilledEngine) -> list[Change]:
    """A request stands in the ledger as one of a model or as a sample."""
    spent = remove(f"kind = '{KIND}' AND name = ?", request_id)
    return [mark_failed("request", request_id, error), mark_failed("sample", request_id, error), spent]
