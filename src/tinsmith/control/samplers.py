"""Samplers: names under which fixed weights can be sampled, and the snapshots that engines hold for them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tinsmith.control.engines import EngineSlot
from tinsmith.control.errors import SamplerGone
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.records import CheckpointRow, SamplerRow
from tinsmith.types.errors import EngineDied, TinsmithError
from tinsmith.types.operations import DropSnapshot, LoadSnapshot


@dataclass(slots=True, eq=False, kw_only=True)
class Sampler:
    """What it samples: the base model, a checkpoint version, or a snapshot of a model. It never changes, but for
    inflight samplers, which follow the newest of their model."""

    sampler_id: str
    session_id: str
    owner: str = LOCAL_USER_ID
    slot: EngineSlot
    snapshot_id: str | None
    """`None` for the base model."""
    checkpoint: CheckpointRow | None = None
    """Where the snapshot can be loaded from again; an unnamed snapshot cannot."""
    model_path: str | None = None
    digest: str | None = None
    """Of the weights that every one of its samples comes from."""
    gone: SamplerGone | None = None
    inflight_of: str | None = None
    """The model whose inflight samplers all sample one snapshot, the newest that any of them was made of."""
    origin: str | None = None
    """The request that published an unnamed one."""
    model_id: str | None = None
    weights_folder: str | None = None
    """Where an unnamed one's weights were put aside, relative to the data directory."""

    @property
    def is_ephemeral(self) -> bool:
        return self.snapshot_id is not None and self.checkpoint is None and self.inflight_of is None

    def row(self, at: float) -> SamplerRow:
        return SamplerRow(
            sampler_id=self.sampler_id,
            session_id=self.session_id,
            owner=self.owner,
            base_model=self.slot.card.name,
            model_path=self.model_path,
            digest=self.digest,
            created_at=at,
        )


class SamplerBook:
    """All samplers of live sessions, and the checkpoint snapshots they share."""

    def __init__(self, *, ephemeral_per_session: int, max_loaded: int) -> None:
        self._ephemeral_per_session = ephemeral_per_session
        self._max_loaded = max_loaded
        self._samplers: dict[str, Sampler] = {}
        self._ephemeral: dict[str, deque[Sampler]] = {}
        self._inflight: dict[str, list[Sampler]] = {}
        self._pools: dict[str, SnapshotPool] = {}
        self.expected: dict[str, str] = {}
        """Samplers that will be published again, each with the model that does it."""
        self.on_settled: Callable[[str], None] = lambda sampler_id: None
        """Told when an expected sampler is there, or will never be."""
        self.on_superseded: Callable[[Sampler], None] = lambda sampler: None

    def __iter__(self) -> Iterator[Sampler]:
        return iter(self._samplers.values())

    def settle(self, sampler_id: str) -> None:
        """An expected sampler is there, or will never be. Nothing for one that was not expected."""
        if self.expected.pop(sampler_id, None) is not None:
            self.on_settled(sampler_id)

    def settle_all_of(self, model_id: str) -> None:
        for sampler_id in [s for s, model in self.expected.items() if model == model_id]:
            self.settle(sampler_id)

    def engine_revived(self, slot: EngineSlot) -> None:
        """It has none of the snapshots that it had."""
        self.pool(slot).forget_loads()

    def get(self, sampler_id: str) -> Sampler | None:
        return self._samplers.get(sampler_id)

    def pool(self, slot: EngineSlot) -> SnapshotPool:
        return self._pools.setdefault(slot.card.name, SnapshotPool(slot, self._max_loaded))

    def add(self, sampler: Sampler) -> None:
        """An unnamed one may push the oldest unnamed one of its session out."""
        self._samplers[sampler.sampler_id] = sampler
        if sampler.checkpoint is not None:
            self.pool(sampler.slot).use(sampler.checkpoint, sampler.sampler_id)
        elif sampler.inflight_of is not None:
            self._follow(sampler, self._inflight.setdefault(sampler.inflight_of, []))
        elif sampler.is_ephemeral:
            newest = self._ephemeral.setdefault(sampler.session_id, deque())
            newest.append(sampler)
            while len(newest) > self._ephemeral_per_session:
                self._drop_oldest(newest)

    def add_restored(self, sampler: Sampler) -> None:
        """As `add`, for one that an earlier process had: an inflight one was bound to the newest before."""
        if sampler.inflight_of is None:
            self.add(sampler)
            return
        self._samplers[sampler.sampler_id] = sampler
        self._inflight.setdefault(sampler.inflight_of, []).append(sampler)

    def inflight(self, model_id: str) -> list[Sampler]:
        """The inflight samplers of a model, oldest first; all sample the newest's snapshot."""
        return list(self._inflight.get(model_id, []))

    def _follow(self, newest: Sampler, others: list[Sampler]) -> None:
        """Samples that are being drawn end with the weights they began with; the next ones have the new."""
        if others:
            _drop(others[-1])
        for sampler in others:
            sampler.snapshot_id, sampler.digest = newest.snapshot_id, newest.digest
        others.append(newest)

    def _drop_oldest(self, newest: deque[Sampler]) -> None:
        oldest = newest.popleft()
        oldest.gone = SamplerGone(
            f"sampler {oldest.sampler_id!r} was superseded: the server keeps the newest {self._ephemeral_per_session} "
            "unnamed samplers of a session; save weights under a name to keep them longer"
        )
        _drop(oldest)
        self.on_superseded(oldest)

    def release(self, sampler_ids: list[str]) -> None:
        """Forget what engines hold for the samplers of an ended session."""
        for sampler in (self._samplers[s] for s in sampler_ids if s in self._samplers):
            self._ephemeral.pop(sampler.session_id, None)
            if sampler.checkpoint is not None:
                self.pool(sampler.slot).leave(sampler.checkpoint, sampler.sampler_id)
            elif sampler.inflight_of is not None:
                self._leave(sampler, sampler.inflight_of)
            elif sampler.is_ephemeral and sampler.gone is None:
                _drop(sampler)

    def _leave(self, sampler: Sampler, model_id: str) -> None:
        """The last inflight sampler of a model takes the snapshot with it."""
        others = self._inflight.get(model_id, [])
        if sampler not in others:
            return
        others.remove(sampler)
        if not others:
            _drop(sampler)
            del self._inflight[model_id]

    def forget(self, sampler_ids: list[str]) -> None:
        for sampler_id in sampler_ids:
            self._samplers.pop(sampler_id, None)


def _drop(sampler: Sampler) -> None:
    if sampler.snapshot_id is not None:
        sampler.slot.tell(DropSnapshot(snapshot_id=sampler.snapshot_id))


def checkpoint_snapshot_id(row: CheckpointRow) -> str:
    return f"checkpoint:{row.checkpoint_id}"


@dataclass(slots=True, eq=False)
class _Loaded:
    users: set[str] = field(default_factory=set)
    """Samplers of live sessions."""
    load: asyncio.Task[str] | None = None

    @property
    def is_ready(self) -> bool:
        return self.load is not None and self.load.done()


class SnapshotPool:
    """Checkpoint snapshots in one engine: shared by samplers, dropped when many or unused, loaded again on demand."""

    def __init__(self, slot: EngineSlot, max_loaded: int) -> None:
        self._slot = slot
        self._max_loaded = max_loaded
        self._entries: OrderedDict[str, _Loaded] = OrderedDict()

    @property
    def num_loaded(self) -> int:
        return sum(entry.load is not None for entry in self._entries.values())

    def use(self, row: CheckpointRow, sampler_id: str) -> None:
        self._entry(row).users.add(sampler_id)

    def leave(self, row: CheckpointRow, sampler_id: str) -> None:
        snapshot_id = checkpoint_snapshot_id(row)
        entry = self._entries.get(snapshot_id)
        if entry is None:
            return
        entry.users.discard(sampler_id)
        if not entry.users:
            self._unload(snapshot_id, entry)
            del self._entries[snapshot_id]

    def touch_if_ready(self, row: CheckpointRow) -> bool:
        """Whether an operation submitted before the next await finds the snapshot in the engine."""
        entry = self._entries.get(checkpoint_snapshot_id(row))
        if entry is None or not entry.is_ready:
            return False
        self._entries.move_to_end(checkpoint_snapshot_id(row))
        return True

    async def load(self, row: CheckpointRow, folder: str) -> str:
        """The digest. Concurrent calls share one load. Raises what the engine met."""
        entry = self._entry(row)
        if entry.load is None:
            entry.load = asyncio.create_task(self._load(checkpoint_snapshot_id(row), folder))
            self._make_room()
        return await asyncio.shield(entry.load)

    async def _load(self, snapshot_id: str, folder: str) -> str:
        operation = LoadSnapshot(snapshot_id=snapshot_id, folder=folder)
        try:
            try:
                digest: str = await self._slot.call(operation)
            except EngineDied:
                if not self._slot.is_recovering:
                    raise
                await self._slot.settled()
                digest = await self._slot.call(operation)
        except TinsmithError:
            if (entry := self._entries.get(snapshot_id)) is not None:
                entry.load = None
                if not entry.users:
                    del self._entries[snapshot_id]
            raise
        return digest

    def forget_loads(self) -> None:
        for entry in self._entries.values():
            entry.load = None

    def _entry(self, row: CheckpointRow) -> _Loaded:
        snapshot_id = checkpoint_snapshot_id(row)
        entry = self._entries.setdefault(snapshot_id, _Loaded())
        self._entries.move_to_end(snapshot_id)
        return entry

    def _make_room(self) -> None:
        excess = self.num_loaded - self._max_loaded
        for snapshot_id, entry in list(self._entries.items()):
            if excess <= 0:
                return
            if entry.is_ready:
                self._unload(snapshot_id, entry)
                excess -= 1

    def _unload(self, snapshot_id: str, entry: _Loaded) -> None:
        if entry.load is not None:
            entry.load = None
            self._slot.tell(DropSnapshot(snapshot_id=snapshot_id))
