"""One look at what control has in hand, for figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tinsmith.control.engines import EngineSlot
from tinsmith.control.models import Model, ModelStatus
from tinsmith.control.paging import PagingStats
from tinsmith.types.pulse import Pulse


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    base_model: str
    is_up: bool
    num_deaths: int
    pulse: Pulse | None
    paging: PagingStats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    reason: str | None
    """Why it is not ready, if it is not."""
    queued: dict[str, int]
    """Requests that wait for their turn, by type."""
    running: dict[str, int]
    """Requests whose turn has come, by type."""
    futures_kept: int
    futures_kept_bytes: int
    models: dict[str, int]
    """By state."""
    adapters: dict[str, int]
    """Of models that have not ended, by where they are."""
    num_sessions: int
    num_open_polls: int = 0
    ledger_lag_s: float | None = None
    """`None` without a ledger."""
    ledger_bytes: int = 0
    disk_free_bytes: int | None = None
    disk_fsync_s: float | None = None
    engines: list[EngineState] = field(default_factory=list)


def engine_states(slots: Iterable[EngineSlot], paging: Mapping[str, PagingStats]) -> list[EngineState]:
    return [
        EngineState(
            base_model=slot.card.name,
            is_up=slot.dead is None,
            num_deaths=slot.num_deaths,
            pulse=slot.handle.pulse if slot.dead is None else None,
            paging=paging.get(slot.card.name),
        )
        for slot in slots
    ]


def model_states(models: Sequence[Model]) -> dict[str, int]:
    """Of those that have not ended."""
    counts: Counter[str] = Counter({"creating": 0, "live": 0, "closing": 0})
    counts.update(model.status.name.lower() for model in models)
    counts.pop("ended", None)
    return dict(counts)


def adapter_places(models: Sequence[Model]) -> dict[str, int]:
    """Device, host memory, disk; `moving` between them."""
    places = {"RESIDENT": "device", "PARKED": "memory", "ABSENT": "disk"}
    counts = dict.fromkeys((*places.values(), "moving"), 0)
    for model in models:
        if model.status in (ModelStatus.LIVE, ModelStatus.CLOSING):
            counts[places.get(model.residence.name, "moving")] += 1
    return counts
