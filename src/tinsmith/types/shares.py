"""Fair shares of an engine's work: between projects by weight, within a project between its models, in tokens.

A deficit round robin without a quantum: every project has a clock that runs by the tokens it was given, divided by its
weight, and whoever's clock is furthest behind, so whose deficit is largest, is next; within a project the same among
its models, of equal weight. What follows, and what `tests/unit/control/test_fair_shares.py` holds it to:

* Over any time in which two projects both have work waiting, the tokens they were given, each divided by its weight,
  differ by at most two largest turns of each. So shares follow weights, whatever the sizes of requests.
* A project that had nothing waiting saves nothing up and is owed nothing: it begins level with the one that is furthest
  behind, and before it. Its first request waits for what was begun before it came, and for one turn of each other
  project that came as it did.
* Nobody counts as further ahead of the others than by its own largest turn: what it was given beyond that was left
  over by them. So a project that always has work waiting, of weight w, is served again before the others, of
  weight W together, were given W / w times its own largest turn, and two turns each.
* As long as anybody waits, somebody is next; who is alone has everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar


@dataclass(frozen=True, slots=True)
class Payer:
    """On whose account work is done."""

    project: str
    """A project, or without one the user."""
    flow: str
    """The model or sampler; flows of a project share alike."""
    weight: float = 1.0
    """Of the project, above 0."""


NOBODY = Payer("", "")
"""Where nobody keeps accounts."""


class Shares:
    """Who is next, among those that wait. Pure bookkeeping: it knows neither queues nor time."""

    def __init__(self, slack: float = 0.0) -> None:
        """`slack`: tokens by which a party may be behind beyond the turns of others without being taken for content."""
        self._slack = slack
        self._projects = _Clocks(slack)
        self._flows: dict[str, _Clocks] = {}

    def compete(self, payers: Iterable[Payer]) -> None:
        """These have work waiting or in hand, and no others. Call it before `rank`, whenever that has changed."""
        flows: dict[str, set[str]] = {}
        for payer in payers:
            flows.setdefault(payer.project, set()).add(payer.flow)
        self._projects.compete(flows)
        self._flows = {name: clocks for name, clocks in self._flows.items() if self._projects.knows(name)}
        for project, names in flows.items():
            self._flows.setdefault(project, _Clocks(self._slack)).compete(names)

    def rank(self, payer: Payer, promised: Mapping[str, float] | None = None) -> tuple[float, float]:
        """Lowest first; of equals, whoever the caller likes. The payer competes.

        `promised`: tokens that are as good as given, by project and by flow.
        """
        project, flow = self._projects.at[payer.project], self._flows[payer.project].at[payer.flow]
        if promised is None:
            return project, flow
        return project + promised.get(payer.project, 0.0) / payer.weight, flow + promised.get(payer.flow, 0.0)

    def may_pass(self, payer: Payer, tokens: float, others: Iterable[Payer]) -> bool:
        """Whether it may be given so much before others that are next: it stays within its largest turn of them."""
        amount = tokens / payer.weight
        limit = max(self._projects.lead(payer.project), self._projects.turn(payer.project) + amount)
        mine = self.rank(payer)[0] + amount
        return all(mine - self.rank(other)[0] <= limit for other in others if other.project != payer.project)

    def charge(self, payer: Payer, tokens: float) -> None:
        """It was given so much. The payer competes, or did when it was last said who does."""
        self._projects.advance(payer.project, tokens / payer.weight)
        if payer.project in self._flows:
            self._flows[payer.project].advance(payer.flow, tokens)


class _Clocks:
    """Of parties that compete with each other."""

    def __init__(self, slack: float) -> None:
        self._slack = slack
        self.at: dict[str, float] = {}
        self._floor = 0.0
        """Where the one that was furthest behind stood when it was last asked; newcomers begin here."""
        self._turn: dict[str, float] = {}
        """What each was given since it was last said who competes."""
        self._lead: dict[str, float] = {}
        """The most it was ever given in between."""

    def compete(self, names: Iterable[str]) -> None:
        here = set(names)
        # who left with a clock ahead of the others' comes back with it
        self.at = {name: at for name, at in self.at.items() if name in here or at > self._floor}
        self._lead = {name: lead for name, lead in self._lead.items() if name in self.at}
        self._turn.clear()
        for name in here:
            self.at[name] = max(self.at.get(name, self._floor), self._floor)
        if not here:
            return
        # who is further behind than the turns of the others explain wanted no more than it was given
        excess = max(self.at[name] - self.lead(name) for name in here) - self._slack
        self._floor = max(excess, min(self.at[name] for name in here))
        for name in here:
            self.at[name] = max(self.at[name], self._floor)

    def knows(self, name: str) -> bool:
        return name in self.at

    def turn(self, name: str) -> float:
        return self._turn.get(name, 0.0)

    def lead(self, name: str) -> float:
        """The most it was given in one turn."""
        return self._lead.get(name, 0.0)

    def advance(self, name: str, amount: float) -> None:
        if name in self.at:
            self.at[name] += amount
            self._turn[name] = self.turn(name) + amount
            self._lead[name] = max(self.lead(name), self.turn(name))


ItemT = TypeVar("ItemT")


class FairLine(Generic[ItemT]):
    """A waiting line: each payer's items in order, payers in the order of their shares."""

    def __init__(self, shares: Shares | None = None) -> None:
        self.shares = Shares() if shares is None else shares
        self._lines: dict[Payer, deque[ItemT]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[ItemT]:
        return chain.from_iterable(self._lines.values())

    @property
    def payers(self) -> Iterable[Payer]:
        """Of what waits."""
        return self._lines.keys()

    def append(self, payer: Payer, item: ItemT, *, first: bool = False) -> None:
        """Behind what the payer has waiting, or before it."""
        line = self._lines.setdefault(payer, deque())
        if first:
            line.appendleft(item)
        else:
            line.append(item)

    def popleft(self, promised: Mapping[str, float] | None = None) -> ItemT:
        """Whose turn it is; not charged yet. `shares.compete` was told of all `payers`. The line is not empty."""
        payer = min(self._lines, key=lambda payer: self.shares.rank(payer, promised))
        item = self._lines[payer].popleft()
        if not self._lines[payer]:
            del self._lines[payer]
        return item

    def remove(self, payer: Payer, item: ItemT) -> None:
        """Raises `ValueError` if it does not wait."""
        line = self._lines.get(payer, deque())
        line.remove(item)
        if not line:
            del self._lines[payer]
