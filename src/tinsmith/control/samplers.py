"""Samplers: names under which fixed weights can be sampled, and the snapshots that engines hold for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tinsmith.control.engines import EngineSlot
from tinsmith.control.errors import SamplerGone
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.identity import Clock
from tinsmith.control.records import CheckpointRow, SamplerRow
from tinsmith.control.snapshot_pool import SnapshotPool
from tinsmith.types.operations import LoraSpec


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
    num_bytes: int = 0
    """Of its weights in the engine."""
    used_at: float = 0.0
    """Monotonic seconds of the last request for it."""
    is_saving: bool = False
    """Its weights are being put aside."""

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

    def __init__(self, *, ephemeral_per_session: int, max_loaded: int, clock: Clock) -> None:
        self._clock = clock
        self._ephemeral_per_session = ephemeral_per_session
        self._max_loaded = max_loaded
        self._samplers: dict[str, Sampler] = {}
        self._ephemeral: dict[str, deque[Sampler]] = {}
        self._inflight: dict[str, list[Sampler]] = {}
        self._pools: dict[str, SnapshotPool] = {}
        self._expected: dict[str, str] = {}
        """Samplers that will be published again, each with the model that does it."""
        self._leading: dict[str, set[str]] = {}
        """By model, the inflight ones of them, which the model's others will follow."""
        self._arrivals: dict[str, asyncio.Event] = {}
        self.on_settled: Callable[[str], None] = lambda sampler_id: None
        """Told when an expected sampler is there, or will never be."""
        self.on_superseded: Callable[[Sampler], None] = lambda sampler: None
        self.on_expired: Callable[[Sampler, str], None] = lambda sampler, reason: None

    def __iter__(self) -> Iterator[Sampler]:
        return iter(self._samplers.values())

    def expect(self, sampler_id: str, model_id: str, *, is_inflight: bool) -> None:
        """It will be published again."""
        self._expected[sampler_id] = model_id
        if is_inflight:
            self._leading.setdefault(model_id, set()).add(sampler_id)

    def is_expected(self, sampler_id: str) -> bool:
        """Whether its weights will be published again: its own, or for an inflight one those it will follow."""
        sampler = self._samplers.get(sampler_id)
        return sampler_id in self._expected or (sampler is not None and sampler.inflight_of in self._leading)

    def settle(self, sampler_id: str) -> None:
        """An expected sampler is there, or will never be. Nothing for one that was not expected."""
        model_id = self._expected.pop(sampler_id, None)
        if model_id is None:
            return
        settled, leading = [sampler_id], self._leading.get(model_id, set())
        if leading == {sampler_id}:
            del self._leading[model_id]
            settled += [other.sampler_id for other in self.inflight(model_id) if other.sampler_id != sampler_id]
        leading.discard(sampler_id)
        for settled_id in settled:
            self._tell_settled(settled_id)

    def _tell_settled(self, sampler_id: str) -> None:
        if (arrived := self._arrivals.pop(sampler_id, None)) is not None:
            arrived.set()
        self.on_settled(sampler_id)

    async def arrival(self, sampler_id: str) -> None:
        """Wait while it is expected."""
        while self.is_expected(sampler_id):
            await self._arrivals.setdefault(sampler_id, asyncio.Event()).wait()

    def settle_all_of(self, model_id: str) -> None:
        for sampler_id in [s for s, model in self._expected.items() if model == model_id]:
            self.settle(sampler_id)

    def engine_revived(self, slot: EngineSlot) -> None:
        """It has none of the snapshots that it had."""
        self.pool(slot).engine_revived()

    def get(self, sampler_id: str) -> Sampler | None:
        return self._samplers.get(sampler_id)

    def pool(self, slot: EngineSlot) -> SnapshotPool:
        if slot.card.name not in self._pools:
            self._pools[slot.card.name] = SnapshotPool(slot, self._max_loaded, self._clock)
        return self._pools[slot.card.name]

    def published(self, sampler: Sampler) -> None:
        """The engine has just made its snapshot, of an adapter."""
        if sampler.snapshot_id is not None:
            self.pool(sampler.slot).published(sampler.snapshot_id)

    def sharing(self, snapshot_id: str) -> list[Sampler]:
        """Those that sample one unnamed snapshot; the one that it is named after is the last."""
        sampler = self._samplers.get(snapshot_id)
        if sampler is None:
            return []
        return [sampler] if sampler.inflight_of is None else self.inflight(sampler.inflight_of)

    def add(self, sampler: Sampler) -> None:
        """An unnamed one may push the oldest unnamed one of its session out."""
        self._samplers[sampler.sampler_id] = sampler
        sampler.used_at = self._clock.monotonic()
        if sampler.checkpoint is not None:
            sampler.num_bytes = sampler.slot.card.snapshot_bytes(LoraSpec(**sampler.checkpoint.lora))
        self._use(sampler)
        if sampler.inflight_of is not None:
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
        self._use(sampler)
        self._inflight.setdefault(sampler.inflight_of, []).append(sampler)

    def inflight(self, model_id: str) -> list[Sampler]:
        """The inflight samplers of a model, oldest first; all sample the newest's snapshot."""
        return list(self._inflight.get(model_id, []))

    def _follow(self, newest: Sampler, others: list[Sampler]) -> None:
        """Samples that are being drawn end with the weights they began with; the next ones have the new."""
        for sampler in others:
            self._leave(sampler)
            sampler.snapshot_id, sampler.digest = newest.snapshot_id, newest.digest
            sampler.weights_folder = None
            self._use(sampler)
        others.append(newest)

    def _drop_oldest(self, newest: deque[Sampler]) -> None:
        kept = f"the server keeps the newest {self._ephemeral_per_session} unnamed samplers of a session"
        self._drop(newest.popleft(), f"was superseded: {kept}")

    def expire(self, ttl_s: float) -> int:
        """Drop unnamed samplers that nobody used for `ttl_s`; the number dropped."""
        limit, dropped = self._clock.monotonic() - ttl_s, 0
        for samplers in self._ephemeral.values():
            for idle in [sampler for sampler in samplers if sampler.used_at <= limit]:
                samplers.remove(idle)
                reason = f"was not used for {ttl_s:g} s"
                self._drop(idle, reason)
                self.on_expired(idle, reason)
                dropped += 1
        return dropped

    def _drop(self, sampler: Sampler, reason: str) -> None:
        sampler.gone = SamplerGone(
            f"sampler {sampler.sampler_id!r} {reason}; save weights under a name to keep them longer"
        )
        self._leave(sampler)
        self.on_superseded(sampler)

    def release(self, sampler_ids: list[str]) -> None:
        """Forget what engines hold for the samplers of an ended session."""
        for sampler in (self._samplers[s] for s in sampler_ids if s in self._samplers):
            self._ephemeral.pop(sampler.session_id, None)
            if sampler.gone is None:
                self._leave(sampler)
            others = self._inflight.get(sampler.inflight_of or "", [])
            if sampler in others:
                others.remove(sampler)
                if not others:
                    del self._inflight[sampler.inflight_of or ""]

    def _use(self, sampler: Sampler) -> None:
        if sampler.snapshot_id is not None:
            is_checkpoint = sampler.checkpoint is not None
            pool = self.pool(sampler.slot)
            pool.use(sampler.snapshot_id, sampler.sampler_id, sampler.num_bytes, is_checkpoint=is_checkpoint)

    def _leave(self, sampler: Sampler) -> None:
        """The last one takes the snapshot with it."""
        if sampler.snapshot_id is not None:
            self.pool(sampler.slot).leave(sampler.snapshot_id, sampler.sampler_id)

    def forget(self, sampler_ids: list[str]) -> None:
        for sampler_id in sampler_ids:
            self._samplers.pop(sampler_id, None)


def checkpoint_snapshot_id(row: CheckpointRow) -> str:
    return f"checkpoint:{row.checkpoint_id}"
