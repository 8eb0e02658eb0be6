"""Places among the sequences that are drawn: who has how many, who waits for one, and who makes room.

Every pass draws one token for every place, so shares of places are shares of tokens; prompts are charged as they are
computed. Whoever is furthest behind its share is next. If there is no room for it, and another project has more places
than its weight gives it beside this one, the other's youngest sequence waits again; what it drew and computed is kept.

So a sample of a project that has fewer places than its share begins with the next pass, whatever others have waiting
or running, and its prompt is computed before prompts of projects that are ahead of it. The same holds between the
samplers of one project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tinsmith.engine.sampling_request import Pending, Prefill, Request
from tinsmith.types.shares import FairLine, Payer, Shares

_PROMISED_TOKENS = 64
"""What a place counts for when the next is given away, beside what was drawn in it."""
_SLACK_TOKENS = 2**15


class Places:
    def __init__(self) -> None:
        self._shares = Shares(_SLACK_TOKENS)
        self._line: FairLine[Pending] = FairLine(self._shares)
        self._taken: Counter[Payer] = Counter()

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits."""
        return bool(len(self._line))

    def wait(self, pending: Pending, *, first: bool = False) -> None:
        """`first`: before what else its payer has waiting."""
        self._line.append(_payer(pending.request), pending, first=first)

    def settle(self) -> None:
        """Before a pass gives places away."""
        self._shares.compete({*self._line.payers, *self._taken})

    def next(self) -> Pending:
        """Whose turn it is. Somebody waits."""
        return self._line.popleft(self._promised())

    def take(self, request: Request, count: int) -> None:
        self._taken[_payer(request)] += count

    def give_back(self, request: Request, count: int) -> None:
        payer = _payer(request)
        self._taken[payer] -= count
        if not self._taken[payer]:
            del self._taken[payer]

    def charge_pass(self) -> None:
        """Everyone with a place was given a token in each."""
        for payer, count in self._taken.items():
            self._shares.charge(payer, count)

    def charge_prompt(self, request: Request, num_tokens: int) -> None:
        self._shares.charge(_payer(request), num_tokens)

    def reads(self, request: Request, prefills: Iterable[Prefill]) -> bool:
        """Whether a prompt on the same account is being computed."""
        return any(_payer(prefill.request) == _payer(request) for prefill in prefills)

    def in_order(self, prefills: list[Prefill]) -> list[Prefill]:
        """Whose prompt is computed first; within a payer as they are."""
        if len({_payer(prefill.request) for prefill in prefills}) < 2:
            return prefills
        return sorted(prefills, key=lambda prefill: self._shares.rank(_payer(prefill.request)))

    def who_yields(self, request: Request) -> Payer | None:
        """Who has so many places that it would still have its share with one less, if `request` had one more."""
        payer = _payer(request)
        projects, flows = self._counts()
        best: tuple[float, Payer] | None = None
        for other in self._taken:
            if other.project != payer.project:
                had, wanted = projects[other.project] - 1, projects[payer.project] + 1
                excess = had / other.weight - wanted / payer.weight
            elif other.flow != payer.flow:
                excess = flows[other.flow] - flows[payer.flow] - 2
            else:
                continue
            if excess >= 0 and (best is None or excess > best[0]):
                best = excess, other
        return None if best is None else best[1]

    def _promised(self) -> Counter[str]:
        projects, flows = self._counts()
        return Counter({name: count * _PROMISED_TOKENS for name, count in (*projects.items(), *flows.items())})

    def _counts(self) -> tuple[Counter[str], Counter[str]]:
        projects: Counter[str] = Counter()
        flows: Counter[str] = Counter()
        for payer, count in self._taken.items():
            projects[payer.project] += count
            flows[payer.flow] += count
        return projects, flows


def _payer(request: Request) -> Payer:
    return request.operation.payer
