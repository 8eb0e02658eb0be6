"""Adapters come and go between the device, the host's memory and the disk, so that more models live than fit.

A model whose turn comes while its adapter is away is brought back first; it waits in a line, in the order in which the
scheduler asked; projects take turns there, too. Who leaves for it is chosen in `control/memory.py`. A page on disk is a
snapshot (`control/snapshots.py`) and nothing else: it is in the ledger, its files are hashed, and a crash at any moment
finds the last one and the requests after it. Frozen weights of samplers share the memory; unnamed ones are put aside
before they are dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmith.control.engines import EngineBook, EngineSlot
from tinsmith.control.fairness import Fairness
from tinsmith.control.identity import Clock
from tinsmith.control.memory import Occupant, Patience, choose_evictions
from tinsmith.control.models import Model, ModelStatus, Residence
from tinsmith.control.refusals import Refusals
from tinsmith.control.requests import UnloadModel
from tinsmith.control.samplers import SamplerBook
from tinsmith.control.snapshot_pool import Held, SnapshotPool
from tinsmith.control.snapshots import Snapshots
from tinsmith.control.training import Training
from tinsmith.types.crash_points import crash_point
from tinsmith.types.errors import CheckpointDamaged, EngineDied, NotFound, ServerError, StorageError, TinsmithError
from tinsmith.types.operations import DropAdapter, LoadAdapter, ParkAdapter, UnparkAdapter
from tinsmith.types.shares import Payer, Shares

logger = logging.getLogger(__name__)

_COST_WEIGHT = 0.3
"""Of the newest page in the running mean of what a page costs."""
_RETRY_S = 5.0
"""After a page could not be written, before the same model is chosen again; or could not be read, and must be."""
_LEAST_WAIT_S = 0.001


class PageLost(ServerError):
    """What a model was is gone with the file that held it."""


@dataclass(slots=True, kw_only=True)
class PagingStats:
    """Of one engine since it was first started; what is counted only grows."""

    pages_in: int = 0
    """Adapters read from disk."""
    pages_out: int = 0
    """Adapters that left for the disk."""
    written: int = 0
    """Those of them that had changed since they were last on disk."""
    parked: int = 0
    """Adapters moved to the host's memory."""
    unparked: int = 0
    weights_out: int = 0
    """Sampler weights dropped to make room."""
    failures: int = 0
    lost: int = 0
    wait_s: float = 0.0
    """That models waited for room, all together."""
    read_s: float = 0.0
    write_s: float = 0.0
    num_resident: int = 0
    num_parked: int = 0
    num_waiting: int = 0
    """Models and sampler weights that wait for room."""
    used_bytes: int = 0
    budget_bytes: int | None = None


@dataclass(slots=True, eq=False)
class _Waiter:
    payer: Payer
    num_bytes: int
    granted: Callable[[], None]
    future: asyncio.Future[None]


class Pager:
    """One engine's memory for adapters."""

    def __init__(
        self,
        slot: EngineSlot,
        *,
        data_dir: Path,
        training: Training,
        samplers: SamplerBook,
        snapshots: Snapshots,
        refusals: Refusals,
        fairness: Fairness,
        clock: Clock,
    ) -> None:
        self._slot = slot
        self._fairness = fairness
        self._refusals = refusals
        self._data_dir = data_dir
        self._training = training
        self._samplers = samplers
        self._snapshots = snapshots
        self._clock = clock
        self._pool: SnapshotPool = samplers.pool(slot)
        self._pool.make_room = self._make_room
        self._budget = 2**63 if slot.card.adapter_memory_bytes is None else slot.card.adapter_memory_bytes
        self._present: dict[str, Model] = {}
        """Whose adapters take up the device's memory."""
        self._parked: OrderedDict[str, Model] = OrderedDict()
        """The longest there is first."""
        self._line: list[_Waiter] = []
        self._shares = Shares()
        """Of bytes let in."""
        self._num_leaving = 0
        self._outs: set[str] = set()
        """What is being put out."""
        self._refused: dict[str, float] = {}
        """Until when it is not tried again to put out what could not be written."""
        self._resting: set[str] = set()
        """Models that have something to do again and could not be brought back a moment ago."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._parking = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._page_cost_s = 0.0
        self._stats = PagingStats(budget_bytes=slot.card.adapter_memory_bytes)
        scheduler = training.scheduler(slot)
        scheduler.admit, scheduler.before_turn = self._admit, self._tick
        self._pool.on_published = self._grown
        self._pool.on_loaded = self._loaded

    @property
    def stats(self) -> PagingStats:
        stats = self._stats
        stats.num_resident, stats.num_parked = len(self._present), len(self._parked)
        stats.num_waiting, stats.used_bytes = len(self._line), self._used()
        return stats

    # ---- coming in ----

    def _admit(self, model: Model) -> bool:
        if model.residence is Residence.RESIDENT:
            return True
        if model.residence in (Residence.ABSENT, Residence.PARKED) and model.model_id not in self._resting:
            head = model.queue.head()
            if head is not None and isinstance(head.operation, UnloadModel):
                return True
            model.residence = Residence.ENTERING
            self._spawn(self._bring_in(model))
        return False

    async def _bring_in(self, model: Model) -> None:
        asked_at = self._clock.monotonic()
        try:
            payer = self._fairness.payer(model.session_id, model.model_id)
            await self._make_room(payer, model.num_bytes, lambda: self._present.update({model.model_id: model}))
            self._stats.wait_s += self._clock.monotonic() - asked_at
            await self._fetch(model)
        except EngineDied:
            return  # whoever starts the engine again begins anew
        except TinsmithError as error:
            self._present.pop(model.model_id, None)
            model.residence = Residence.PARKED if model.model_id in self._parked else Residence.ABSENT
            self._give_up(model, error)
        else:
            if not model.has_ended:
                model.residence = Residence.RESIDENT
                model.entered_at = model.used_at = self._clock.monotonic()
        self._training.scheduler(self._slot).wake()

    async def _fetch(self, model: Model) -> None:
        """Its adapter, if it has one yet: the first request of a model makes it."""
        if model.has_ended:
            return
        started = self._clock.monotonic()
        if model.model_id in self._parked:
            await self._slot.call(UnparkAdapter(model_id=model.model_id))
            self._parked.pop(model.model_id, None)
            self._stats.unparked += 1
        elif model.snapshot is not None:
            folder = str(self._data_dir / model.snapshot.folder)
            load = LoadAdapter(model_id=model.model_id, folder=folder, optimizer=True, gradients=True)
            model.lora = await self._slot.call(load)
            crash_point("replay.loaded")
            self._stats.pages_in += 1
            if model.has_ended:
                self._slot.tell(DropAdapter(model_id=model.model_id))
        else:
            return
        spent_s = self._clock.monotonic() - started
        self._stats.read_s += spent_s
        self._note_cost(2 * spent_s)  # as it came, so it will go
        logger.info("the adapter of model %r is back on the device after %.3f s", model.model_id, spent_s)

    def _give_up(self, model: Model, error: TinsmithError) -> None:
        self._stats.failures += 1
        if isinstance(error, CheckpointDamaged | NotFound):
            self._stats.lost += 1
            lost = PageLost(
                f"model {model.model_id!r} cannot go on: what it was is lost with its file on disk ({error}); create a "
                "new model from one of its checkpoints"
            )
            logger.error("%s", lost)
            self._refusals.end_lost(model, lost)
            return
        logger.warning("model %r could not be brought back: %s", model.model_id, error)
        refusal = type(error)(f"the adapter of model {model.model_id!r} could not be brought into memory: {error}")
        self._refusals.fail_waiting(model, refusal)
        if any(not work.is_void for work in model.queue.run()):
            self._resting.add(model.model_id)
            asyncio.get_running_loop().call_later(_RETRY_S, self._try_again, model.model_id)

    def _try_again(self, model_id: str) -> None:
        self._resting.discard(model_id)
        self._training.scheduler(self._slot).wake()

    # ---- room ----

    async def _make_room(self, payer: Payer, num_bytes: int, granted: Callable[[], None]) -> None:
        """Wait in line for so many bytes. Raises `StorageError` if nothing can leave because the disk refuses it,
        `EngineDied` if the engine stays dead."""
        waiter = _Waiter(payer, num_bytes, granted, asyncio.get_running_loop().create_future())
        self._line.append(waiter)
        self._step()
        await waiter.future

    def _tick(self) -> None:
        if self._line or self._num_leaving or self._used() > self._budget:  # a load may make a model larger
            self._step()

    def _grown(self) -> None:
        asyncio.get_running_loop().call_soon(self._step)

    def _loaded(self) -> None:
        if self._line:
            self._look_again(_LEAST_WAIT_S)  # whoever had it read comes first

    def _step(self) -> None:
        """Let in whom there is room for, and see to it that there will be room for the next."""
        if self._slot.dead is not None:
            if not self._slot.is_recovering:
                self._dismiss(self._slot.dead)
            return
        self._prune()
        leaving = [model for model in self._present.values() if model.residence is Residence.LEAVING]
        self._num_leaving = len(leaving)
        for model in leaving:
            self._put_out_if_drained(model)
        self._line = [waiter for waiter in self._line if not waiter.future.done()]
        self._shares.compete(waiter.payer for waiter in self._line)
        while (waiter := self._first()) is not None:
            used = self._used()
            if used > 0 and used + waiter.num_bytes > self._budget:
                break
            self._line.remove(waiter)
            self._shares.charge(waiter.payer, waiter.num_bytes)
            waiter.granted()
            waiter.future.set_result(None)
        self._evict(0 if waiter is None else waiter.num_bytes)

    def _dismiss(self, error: EngineDied) -> None:
        for waiter in self._line:
            if not waiter.future.done():
                waiter.future.set_exception(error)
        self._line.clear()

    def _first(self) -> _Waiter | None:
        """Who is let in next: projects by their shares, each one's own in the order in which they asked."""
        return min(self._line, key=lambda waiter: self._shares.rank(waiter.payer)[0], default=None)

    def _prune(self) -> None:
        for models in (self._present, self._parked):
            for model_id in [m for m, model in models.items() if model.has_ended]:
                del models[model_id]

    def _used(self) -> int:
        return sum(model.num_bytes for model in self._present.values()) + sum(held.num_bytes for held in self._pool)

    def _evict(self, needed: int) -> None:
        if self._used() + needed <= self._budget:
            return
        now, patience = self._clock.monotonic(), Patience.of(self._page_cost_s)
        chosen = choose_evictions(
            list(self._occupants(now)), needed=needed, budget=self._budget, now=now, patience=patience
        )
        for name in chosen.names:
            if (model := self._present.get(name)) is not None:
                model.residence = Residence.LEAVING
                self._num_leaving += 1
                self._put_out_if_drained(model)
            elif (held := self._pool.get(name)) is not None:
                self._put_weights_out(held)
        if self._line and chosen.is_hopeless:
            self._refuse_first()
        elif chosen.look_again_at is not None:
            self._look_again(chosen.look_again_at - now)

    def _occupants(self, now: float) -> Iterator[Occupant]:
        for model in self._present.values():
            yield Occupant(
                name=model.model_id,
                num_bytes=model.num_bytes,
                used_at=model.used_at,
                entered_at=model.entered_at,
                is_busy=bool(model.queue or model.running),
                is_leaving=model.residence is Residence.LEAVING,
                is_pinned=model.residence is Residence.ENTERING or model.status is ModelStatus.CREATING,
                is_stuck=self._is_refused(model.model_id, now),
            )
        for held in self._pool:
            yield Occupant(
                name=held.snapshot_id,
                num_bytes=held.num_bytes,
                used_at=held.used_at,
                entered_at=held.entered_at,
                is_leaving=held.snapshot_id in self._outs,
                is_pinned=not held.is_ready or self._is_being_saved(held),
                is_stuck=self._is_refused(held.snapshot_id, now),
            )

    def _is_refused(self, name: str, now: float) -> bool:
        return self._refused.get(name, now) > now

    def _is_being_saved(self, held: Held) -> bool:
        return any(sampler.is_saving for sampler in self._samplers.sharing(held.snapshot_id))

    def _refuse_first(self) -> None:
        """Nothing that is here can leave: the disk does not take it."""
        waiter = self._first()
        if waiter is None:
            return
        self._line.remove(waiter)
        error = StorageError("the memory for adapters is full, and the disk refuses those that would make room")
        waiter.future.set_exception(error)
        asyncio.get_running_loop().call_soon(self._step)

    def _look_again(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(delay_s, _LEAST_WAIT_S), self._step)

    # ---- going out ----

    def _put_out_if_drained(self, model: Model) -> None:
        if model.model_id not in self._outs and not model.running and not model.behind_barrier:
            self._outs.add(model.model_id)
            self._spawn(self._put_out(model))

    async def _put_out(self, model: Model) -> None:
        started = self._clock.monotonic()
        try:
            if await self._park(model):
                model.residence = Residence.PARKED
            else:
                await self._to_disk(model)
        except EngineDied:
            return  # as in `_bring_in`
        except TinsmithError as error:
            self._refuse(model.model_id, error)
            model.residence = Residence.RESIDENT
        else:
            self._present.pop(model.model_id, None)
            spent_s = self._clock.monotonic() - started
            self._stats.write_s += spent_s
            self._note_cost(2 * spent_s)
            logger.info("the adapter of model %r left the device after %.3f s", model.model_id, spent_s)
        finally:
            self._outs.discard(model.model_id)
        self._training.scheduler(self._slot).wake()
        self._step()

    async def _park(self, model: Model) -> bool:
        """Whether it is in the host's memory now; those that have been there longest make room for it."""
        limit = self._slot.card.host_adapter_bytes
        if model.num_bytes > limit:
            return False
        async with self._parking:
            while sum(m.num_bytes for m in self._parked.values()) + model.num_bytes > limit:
                oldest = next((m for m in self._parked.values() if m.residence is Residence.PARKED), None)
                if oldest is None:
                    return False
                oldest.residence = Residence.LEAVING
                try:
                    await self._to_disk(oldest)
                except EngineDied:
                    raise
                except TinsmithError:
                    oldest.residence = Residence.PARKED
                    raise
                self._parked.pop(oldest.model_id, None)
                self._training.scheduler(self._slot).wake()
            try:
                await self._slot.call(ParkAdapter(model_id=model.model_id))
            except EngineDied:
                raise
            except ServerError as error:
                logger.warning("%s; it goes to disk", error)
                return False
            self._parked[model.model_id] = model
        self._stats.parked += 1
        return True

    async def _to_disk(self, model: Model) -> None:
        if not model.is_kept:
            await self._snapshots.put_away(model)
            self._stats.written += 1
            crash_point("paging.written")
        self._slot.tell(DropAdapter(model_id=model.model_id))
        self._stats.pages_out += 1
        model.residence = Residence.ABSENT

    def _put_weights_out(self, held: Held) -> None:
        sharing = self._samplers.sharing(held.snapshot_id)
        if held.is_checkpoint or all(sampler.weights_folder is not None for sampler in sharing):
            self._pool.drop(held)
            self._stats.weights_out += 1
            asyncio.get_running_loop().call_soon(self._step)
            return
        self._outs.add(held.snapshot_id)
        self._spawn(self._save_and_drop(held))

    async def _save_and_drop(self, held: Held) -> None:
        try:
            await self._snapshots.put_weights_away(self._samplers.sharing(held.snapshot_id))
        except EngineDied:
            return
        except TinsmithError as error:
            self._refuse(held.snapshot_id, error)
        else:
            if self._pool.get(held.snapshot_id) is held:
                self._pool.drop(held)
            self._stats.weights_out += 1
        finally:
            self._outs.discard(held.snapshot_id)
        self._step()

    def _refuse(self, name: str, error: TinsmithError) -> None:
        self._stats.failures += 1
        self._refused[name] = self._clock.monotonic() + _RETRY_S
        logger.warning("%r cannot make room: %s", name, error)

    def _note_cost(self, seconds: float) -> None:
        self._page_cost_s += _COST_WEIGHT * (seconds - self._page_cost_s)

    # ---- life ----

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def reset(self) -> None:
        """The engine was started again, with empty hands; its models are nowhere but on disk."""
        for task in tuple(self._tasks):
            task.cancel()
        self._present.clear()
        self._parked.clear()
        self._outs.clear()
        self._refused.clear()
        self._resting.clear()
        self._parking = asyncio.Lock()

    def engine_died(self) -> None:
        """For good: nobody needs to wait for room in it."""
        self._step()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        tasks = tuple(self._tasks)
        self.reset()
        await asyncio.gather(*tasks, return_exceptions=True)
        for waiter in self._line:
            waiter.future.cancel()
        self._line.clear()


class Paging:
    """The pagers of all engines, by base model."""

    def __init__(self, engines: EngineBook, **parts: Any) -> None:
        self._pagers = {slot.card.name: Pager(slot, **parts) for slot in engines}

    def engine_revived(self, slot: EngineSlot) -> None:
        self._pagers[slot.card.name].reset()

    def engine_died(self, slot: EngineSlot) -> None:
        """For good."""
        self._pagers[slot.card.name].engine_died()

    def stats(self) -> dict[str, PagingStats]:
        return {name: pager.stats for name, pager in self._pagers.items()}

    async def close(self) -> None:
        await asyncio.gather(*(pager.close() for pager in self._pagers.values()))
