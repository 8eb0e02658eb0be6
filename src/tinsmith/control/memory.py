"""Who has to leave the memory that adapters share, so that another can come in. Pure: time is passed in.

The idle go first, the longest unused of them before the others; one that was used a moment ago is spared for about as
long as it would take to bring it back. If all are busy, the one that came in first goes, but none before it has had
many times what its coming and going costs: under pressure models take turns, and most of the time is work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_QUANTUM_COSTS = 10
"""How many times the cost of a page a busy model stays at least."""
_MAX_IDLE_S = 1.0
_MAX_QUANTUM_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """An adapter, or the frozen weights of a sampler."""

    name: str
    num_bytes: int
    used_at: float
    """When its last request was answered."""
    entered_at: float
    is_busy: bool = False
    """Requests are with the engine, or wait."""
    is_leaving: bool = False
    is_pinned: bool = False
    """It cannot leave now."""
    is_stuck: bool = False
    """It was to leave, and the disk did not take it."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long occupants are spared."""

    idle_s: float
    quantum_s: float

    @classmethod
    def of(cls, page_cost_s: float) -> Patience:
        """`page_cost_s`: what it takes to write an adapter out and bring it back."""
        return cls(min(page_cost_s, _MAX_IDLE_S), min(_QUANTUM_COSTS * page_cost_s, _MAX_QUANTUM_S))

    def spared_until(self, occupant: Occupant) -> float:
        return occupant.entered_at + self.quantum_s if occupant.is_busy else occupant.used_at + self.idle_s


@dataclass(frozen=True, slots=True)
class Evictions:
    names: tuple[str, ...]
    look_again_at: float | None
    """When another could leave, if these are not enough."""
    is_hopeless: bool
    """Nobody can leave, now or later."""


def choose_evictions(
    occupants: Sequence[Occupant], *, needed: int, budget: int, now: float, patience: Patience
) -> Evictions:
    """Who shall leave so that `needed` more bytes fit into `budget`, those that are leaving already reckoned with."""
    missing = needed - budget + sum(o.num_bytes for o in occupants if not o.is_leaving)
    if missing <= 0:
        return Evictions((), None, False)
    able = [o for o in occupants if not (o.is_leaving or o.is_pinned or o.is_stuck)]
    ripe = [o for o in able if patience.spared_until(o) <= now]
    ripe.sort(key=lambda o: (o.is_busy, o.entered_at if o.is_busy else o.used_at))
    chosen: list[str] = []
    for occupant in ripe:
        if missing <= 0:
            break
        chosen.append(occupant.name)
        missing -= occupant.num_bytes
    if missing <= 0:
        return Evictions(tuple(chosen), None, False)
    later = [patience.spared_until(o) for o in able if patience.spared_until(o) > now]
    is_hopeless = not later and not any(o.is_leaving or o.is_pinned for o in occupants) and not chosen
    return Evictions(tuple(chosen), min(later, default=None), is_hopeless)
