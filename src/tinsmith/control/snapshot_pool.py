"""Frozen weights that an engine holds for samplers: shared, dropped when many or when room is needed, loaded again."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from tinsmith.control.engines import EngineSlot
from tinsmith.control.identity import Clock
from tinsmith.types.errors import EngineDied, TinsmithError
from tinsmith.types.operations import DropSnapshot, LoadSnapshot
from tinsmith.types.shares import Payer

MakeRoom = Callable[[Payer, int, Callable[[], None]], Awaitable[None]]
"""Waits for so many bytes, and calls when it has them, before anybody else can take them."""

_MAX_TRIES = 5
"""To read weights, where the engine dies meanwhile: more than another's request that kills engines gets."""


@dataclass(slots=True, eq=False)
class Held:
    """The weights of one snapshot."""

    snapshot_id: str
    num_bytes: int
    is_checkpoint: bool
    users: set[str] = field(default_factory=set)
    """Samplers of live sessions."""
    load: asyncio.Task[str] | None = None
    is_in: bool = False
    """It takes up the engine's memory."""
    used_at: float = 0.0
    entered_at: float = 0.0

    @property
    def is_ready(self) -> bool:
        return self.is_in and (self.load is None or self.load.done())


class SnapshotPool:
    def __init__(self, slot: EngineSlot, max_loaded: int, clock: Clock) -> None:
        """`max_loaded`: of checkpoints."""
        self._slot = slot
        self._max_loaded = max_loaded
        self._clock = clock
        self._entries: OrderedDict[str, Held] = OrderedDict()
        self.make_room: MakeRoom = _there_is_room
        self.on_published: Callable[[], None] = lambda: None
        """Told when memory was taken that nobody had asked for."""
        self.on_loaded: Callable[[], None] = lambda: None
        """Told when what was read may leave again, or could not be read."""

    def __iter__(self) -> Iterator[Held]:
        """Those that take up memory."""
        return (entry for entry in self._entries.values() if entry.is_in)

    def use(self, snapshot_id: str, sampler_id: str, num_bytes: int, *, is_checkpoint: bool) -> None:
        self._entry(snapshot_id, num_bytes, is_checkpoint).users.add(sampler_id)

    def published(self, snapshot_id: str) -> None:
        """The engine has just made it, of an adapter."""
        entry = self._entries.get(snapshot_id)
        if entry is None:  # its session ended meanwhile
            self._slot.tell(DropSnapshot(snapshot_id=snapshot_id))
            return
        entry.is_in, entry.load = True, None
        self.on_published()
        entry.used_at = entry.entered_at = self._clock.monotonic()

    def leave(self, snapshot_id: str, sampler_id: str) -> None:
        """The last user takes it out of the engine."""
        entry = self._entries.get(snapshot_id)
        if entry is None:
            return
        entry.users.discard(sampler_id)
        if not entry.users:
            self.drop(entry)
            del self._entries[snapshot_id]

    def get(self, snapshot_id: str) -> Held | None:
        return self._entries.get(snapshot_id)

    def touch_if_ready(self, snapshot_id: str) -> bool:
        """Whether an operation submitted before the next await finds the snapshot in the engine."""
        entry = self._entries.get(snapshot_id)
        if entry is None or not entry.is_ready:
            return False
        self._entries.move_to_end(snapshot_id)
        entry.used_at = self._clock.monotonic()
        return True

    async def load(self, snapshot_id: str, folder: str, num_bytes: int, *, is_checkpoint: bool) -> str:
        """The digest. Concurrent calls share one load. Raises what the engine met."""
        entry = self._entry(snapshot_id, num_bytes, is_checkpoint)
        if entry.load is None:
            entry.load = asyncio.create_task(self._load(entry, folder))
            self._drop_excess()
        return await asyncio.shield(entry.load)

    async def _load(self, entry: Held, folder: str) -> str:
        def granted() -> None:
            entry.is_in = True
            entry.used_at = entry.entered_at = self._clock.monotonic()

        operation = LoadSnapshot(snapshot_id=entry.snapshot_id, folder=folder)
        try:
            digest = await self._read(entry, operation, granted)
        except TinsmithError:
            entry.load, entry.is_in = None, False
            if not entry.users:
                self._entries.pop(entry.snapshot_id, None)
            raise
        finally:
            self.on_loaded()
        entry.used_at = self._clock.monotonic()
        return digest

    async def _read(self, entry: Held, operation: LoadSnapshot, granted: Callable[[], None]) -> str:
        for num_tries in range(1, _MAX_TRIES + 1):
            await self.make_room(Payer("samplers", entry.snapshot_id), entry.num_bytes, granted)
            try:
                digest: str = await self._slot.call(operation)
            except EngineDied:
                if num_tries == _MAX_TRIES or not self._slot.is_recovering:
                    raise
                await self._slot.settled()
            else:
                return digest
        raise AssertionError("a try ends with a digest or an error")

    def engine_revived(self) -> None:
        """It has none of the snapshots that it had."""
        for entry in self._entries.values():
            entry.is_in = False
            if entry.load is not None and entry.load.done():
                entry.load = None

    def drop(self, entry: Held) -> None:
        """Out of the engine, to be loaded again when it is asked for."""
        if entry.is_in or entry.load is not None:
            entry.is_in, entry.load = False, None
            self._slot.tell(DropSnapshot(snapshot_id=entry.snapshot_id))

    def _entry(self, snapshot_id: str, num_bytes: int, is_checkpoint: bool) -> Held:
        entry = self._entries.setdefault(snapshot_id, Held(snapshot_id, num_bytes, is_checkpoint))
        self._entries.move_to_end(snapshot_id)
        return entry

    def _drop_excess(self) -> None:
        loaded = [entry for entry in self._entries.values() if entry.is_checkpoint and entry.load is not None]
        excess = len(loaded) - self._max_loaded
        for entry in loaded:
            if excess <= 0:
                return
            if entry.is_ready:
                self.drop(entry)
                excess -= 1


async def _there_is_room(payer: Payer, num_bytes: int, granted: Callable[[], None]) -> None:
    granted()
