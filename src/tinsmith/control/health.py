"""Whether this server can do work now, found out by looking: a token was produced lately, engines show signs of life,
the disk takes a write.

An engine's pulse comes from a thread beside its work, so a long pass is no silence, and a stopped process is. An engine
with nothing to do is given one token to draw now and then. One that stays silent, or stays in one slice of work, is
killed: the supervisor starts it again. Time is counted in rounds of our own: if this process was stopped itself, that
is nobody else's silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinsmith.control.engines import EngineBook, EngineSlot, discard
from tinsmith.control.identity import Clock
from tinsmith.control.settings import HealthSettings
from tinsmith.types.errors import EngineDied, TinsmithError
from tinsmith.types.operations import Sample

logger = logging.getLogger(__name__)

ROUND_S = 0.5
_FIRST_TOKEN_S = 30.0
"""How long a server that starts waits for the first token of its engines before it says so and goes on."""
_CANARY = ".health"
_CANARY_BYTES = 4096


@dataclass(slots=True)
class Watch:
    """What is known of one engine's life."""

    number: int = -1
    """Of the newest pulse."""
    silent_s: float = 0.0
    num_slices: int = 0
    tokens: int = 0
    token_at: float | None = None
    """When the last token was seen, monotonic; `None` before the first."""
    moved_at: float = 0.0
    """When it last finished a slice of work."""
    slice_s: float = 0.0
    probe: asyncio.Future[Any] | None = None
    probed_at: float = float("-inf")
    was_killed: bool = False
    fault: str | None = None
    """Why the last probe failed."""


@dataclass(slots=True)
class DiskWatch:
    fsync_s: float | None = None
    """How long the last write and fsync of a small file took."""
    free_bytes: int | None = None
    fault: str | None = None
    begun_at: float | None = None
    """When the write that is under way began, monotonic."""


class Health:
    """`start` it once the engines are there; `reason` may be asked at any time."""

    def __init__(
        self,
        *,
        engines: EngineBook,
        settings: HealthSettings,
        data_dir: Path,
        clock: Clock,
        write_canary: Callable[[Path], None] | None = None,
    ) -> None:
        self._engines = engines
        self._settings = settings
        self._data_dir = data_dir
        self._clock = clock
        self._write_canary = write_canary or sync_small_file
        self._watches: dict[str, Watch] = {}
        self.disk = DiskWatch()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Returns once every engine has produced a token, or was given time enough."""
        if not self._settings.is_on:
            return
        self.look()
        probes = [watch.probe for watch in self._watches.values() if watch.probe is not None]
        if probes:
            await asyncio.wait(probes, timeout=_FIRST_TOKEN_S)
        self._spawn(self._watch_engines)
        self._spawn(self._watch_disk)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Callable[[], Any]) -> None:
        task = asyncio.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def reason(self) -> str | None:
        """Why work cannot be done now; `None` if it can."""
        if not self._settings.is_on:
            return None
        for slot in self._engines:
            watch = self._watches.get(slot.card.name)
            if watch is not None and slot.dead is None and (why := self._why_not(watch)) is not None:
                return f"the engine of {slot.card.name!r} {why}"
        return self._disk_reason()

    # ---- engines ----

    def look(self) -> None:
        """One round: read the pulses, give idle engines a token to draw, end what hangs."""
        now = self._clock.monotonic()
        for slot in self._engines:
            watch = self._watches.setdefault(slot.card.name, Watch(moved_at=now))
            if slot.dead is not None:
                self._watches[slot.card.name] = Watch(moved_at=now)
                continue
            self._read_pulse(slot, watch, now)
            self._probe_if_idle(slot, watch, now)
            self._end_if_hung(slot, watch)

    def _read_pulse(self, slot: EngineSlot, watch: Watch, now: float) -> None:
        pulse = slot.handle.pulse
        if pulse is None:  # of an engine that gives none, or has just been started
            return
        if pulse.number == watch.number:
            watch.silent_s += ROUND_S
            return
        watch.number, watch.silent_s = pulse.number, 0.0
        watch.slice_s = pulse.slice_s
        if pulse.num_slices != watch.num_slices:
            watch.num_slices, watch.moved_at = pulse.num_slices, now
        if pulse.tokens != watch.tokens:
            watch.tokens, watch.token_at = pulse.tokens, now

    def _probe_if_idle(self, slot: EngineSlot, watch: Watch, now: float) -> None:
        newest = max(watch.probed_at, watch.moved_at if watch.token_at is not None else float("-inf"))
        if watch.probe is not None or now - newest < self._settings.probe_interval_s:
            return
        watch.probed_at = now
        probe = Sample(prompt=np.zeros(1, dtype=np.int64), num_samples=1, snapshot_id=None, seed=0, max_tokens=1)
        with contextlib.suppress(EngineDied):  # the janitor notices, and says so
            watch.probe = slot.submit(probe).answer
            watch.probe.add_done_callback(lambda answer: self._probed(watch, answer))

    def _probed(self, watch: Watch, answer: asyncio.Future[Any]) -> None:
        discard(answer)
        watch.probe = None
        if answer.cancelled() or isinstance(answer.exception(), EngineDied):
            return
        if (error := answer.exception()) is not None:
            watch.fault = f"could not draw a token: {error}"
            return
        watch.fault, watch.token_at = None, self._clock.monotonic()

    def _end_if_hung(self, slot: EngineSlot, watch: Watch) -> None:
        limit = self._settings.hung_after_s
        if watch.was_killed or (watch.silent_s < limit and watch.slice_s < self._settings.stuck_after_s):
            return
        watch.was_killed = True
        why = f"no sign of life for {watch.silent_s:.0f} s" if watch.silent_s >= limit else _stuck(watch)
        logger.error("the engine of %r hangs (%s); it is ended", slot.card.name, why)
        slot.handle.kill()

    def _why_not(self, watch: Watch) -> str | None:
        if watch.was_killed:
            return "hung and is being ended"
        if watch.silent_s > self._settings.silent_after_s:
            return f"has shown no sign of life for {watch.silent_s:.0f} s; is its process stopped?"
        if watch.slice_s > self._settings.slow_after_s:
            return _stuck(watch)
        if watch.fault is not None:
            return watch.fault
        if watch.number < 0:  # it gives no pulse: `EngineSlot.dead` is all there is to know
            return None
        if watch.token_at is None:
            return "has not produced a token yet"
        age = self._clock.monotonic() - max(watch.token_at, watch.moved_at)
        if age > self._settings.token_within_s and not watch.slice_s:
            return f"has produced no token for {age:.0f} s"
        return None

    async def _watch_engines(self) -> None:
        while True:
            await asyncio.sleep(ROUND_S)
            try:
                self.look()
            except TinsmithError:
                logger.exception("the engines could not be looked at")

    # ---- the disk ----

    def _disk_reason(self) -> str | None:
        if self.disk.fault is not None:
            return self.disk.fault
        if self.disk.begun_at is not None:
            waited = self._clock.monotonic() - self.disk.begun_at
            if waited > self._settings.slow_disk_s:
                return f"the disk under {str(self._data_dir)!r} has not finished a write for {waited:.0f} s"
        return None

    async def try_disk(self) -> None:
        """Write and sync a small file, and see how much room there is."""
        self.disk.begun_at = self._clock.monotonic()
        try:
            self.disk.fsync_s, self.disk.free_bytes = await asyncio.to_thread(self._measure_disk)
        except OSError as error:
            self.disk.fault = f"the data folder {str(self._data_dir)!r} cannot be written: {error.strerror or error}"
        else:
            self.disk.fault = self._no_room()
        finally:
            self.disk.begun_at = None

    def _no_room(self) -> str | None:
        free, least = self.disk.free_bytes, self._settings.min_free_bytes
        if free is None or free >= least:
            return None
        return (
            f"the disk under {str(self._data_dir)!r} is full: {free / 1e6:.0f} MB are left, and at least "
            f"{least / 1e6:.0f} MB are needed"
        )

    def _measure_disk(self) -> tuple[float, int]:
        began = time.perf_counter()
        self._write_canary(self._data_dir / _CANARY)
        return time.perf_counter() - began, shutil.disk_usage(self._data_dir).free

    async def _watch_disk(self) -> None:
        was: str | None = None
        while True:
            await self.try_disk()
            if self.disk.fault is not None and self.disk.fault != was:
                logger.error("%s", self.disk.fault)
            was = self.disk.fault
            await asyncio.sleep(self._settings.disk_interval_s)


def _stuck(watch: Watch) -> str:
    return f"has been in one slice of work for {watch.slice_s:.0f} s"


def sync_small_file(path: Path) -> None:
    """Raises `OSError`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, b"\0" * _CANARY_BYTES, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
