"""Engines that die are started again, and go on where they were; a request that kills them is found and failed."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any

from tinsmith.control.engines import EngineSlot
from tinsmith.control.errors import creation_failed
from tinsmith.control.futures import FutureStore
from tinsmith.control.identity import Clock
from tinsmith.control.ledger import Entry
from tinsmith.control.models import Model, ModelStatus
from tinsmith.control.paging import Paging
from tinsmith.control.replay import Replay
from tinsmith.control.sampling import Sampling
from tinsmith.control.settings import ControlSettings
from tinsmith.control.snapshots import Snapshots
from tinsmith.control.strikes import KIND, KilledEngine, Strikes
from tinsmith.control.training import Training
from tinsmith.types.errors import EngineDied, ServerError, TinsmithError

logger = logging.getLogger(__name__)

_WINDOW_S = 600.0
_MAX_BACKOFF_S = 30.0
_TRIAL_POLL_S = 0.02


class Supervisor:
    def __init__(
        self,
        *,
        settings: ControlSettings,
        strikes: Strikes,
        training: Training,
        sampling: Sampling,
        snapshots: Snapshots,
        paging: Paging,
        replay: Replay,
        futures: FutureStore,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._training = training
        self._sampling = sampling
        self._snapshots = snapshots
        self._paging = paging
        self._replay = replay
        self._futures = futures
        self._clock = clock
        self._strikes = strikes
        self._deaths: dict[str, deque[float]] = {}
        """Of each engine, those since the last result that anybody got of it."""
        self._num_results: dict[str, int] = {}
        """Of each engine, those there were at its last death."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def begin(self) -> None:
        """After a crash of the server: what was there when engines of an earlier one died goes alone, as it would have
        gone there. Nothing was sent since it was brought back."""
        for slot in {model.slot for model in self._training.models if model.slot is not None}:
            self._suspect(slot)
        for slot in self._sampling.slots_paused():
            self._spawn(self._send_samples(slot))

    def forget_answered(self) -> None:
        self._strikes.keep(self._is_open)

    def engine_died(self, slot: EngineSlot, error: EngineDied) -> bool:
        """Whether it will be started again."""
        if self._is_closed:
            return False
        deaths = self._deaths.setdefault(slot.card.name, deque())
        if slot.num_results > self._num_results.get(slot.card.name, 0):
            deaths.clear()
        self._num_results[slot.card.name] = slot.num_results
        now = self._clock.monotonic()
        while deaths and deaths[0] < now - _WINDOW_S:
            deaths.popleft()
        if len(deaths) >= self._settings.max_engine_restarts:
            logger.error("%s; it has died %d times in %g s and stays dead", error, len(deaths) + 1, _WINDOW_S)
            return False
        deaths.append(now)
        self._strikes.add(self._present(slot))
        slot.is_recovering = True
        logger.warning("%s; it is started again", error)
        self._spawn(self._recover(slot, len(deaths)))
        return True

    def _present(self, slot: EngineSlot) -> list[Entry]:
        """The requests that the engine worked on."""
        found = []
        for model in self._models(slot):
            numbers = {request_id: seq for seq, request_id in model.journaled.items()}
            found += [
                Entry(
                    kind=KIND,
                    name=request_id,
                    session_id=model.session_id,
                    model_id=model.model_id,
                    seq=numbers.get(request_id),
                )
                for request_id in model.running
            ]
        samples = self._sampling.in_flight(slot).items()
        return found + [Entry(kind=KIND, name=request_id, session_id=session_id) for request_id, session_id in samples]

    def stop(self) -> None:
        """Start no engine any more."""
        self._is_closed = True

    async def close(self) -> None:
        self.stop()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _models(self, slot: EngineSlot) -> list[Model]:
        return [m for m in self._training.models if m.slot is slot and m.status is not ModelStatus.ENDED]

    async def _recover(self, slot: EngineSlot, num_deaths: int) -> None:
        try:
            await self._start(slot, num_deaths)
            await self._training.scheduler(slot).drain()
            await self._snapshots.drain(slot)
            recalled = await self._replay.read_models()
            if not slot.handle.is_alive:
                raise EngineDied(f"the engine of {slot.card.name!r} died again at once")
        except EngineDied as error:
            slot.is_recovering = False
            if not self.engine_died(slot, error):
                self._give_up(slot, error)
            return
        except TinsmithError as error:
            self._give_up(slot, error)
            return
        poisoned = self._convict(slot)
        recalled.fail(poisoned)
        self._suspect(slot)
        self._replay.revive(slot, recalled)
        self._spawn(self._send_samples(slot))

    def _suspect(self, slot: EngineSlot) -> None:
        in_models = {request_id for model in self._models(slot) for request_id in model.journaled.values()}
        self._training.scheduler(slot).suspects = {r for r in self._strikes if r in in_models and self._is_open(r)}

    async def _start(self, slot: EngineSlot, num_deaths: int) -> None:
        """Raises `EngineDied` if it dies again while it starts, `TinsmithError` if it cannot be started."""
        if num_deaths > 1:
            await asyncio.sleep(min(self._settings.engine_backoff_s * 2 ** (num_deaths - 2), _MAX_BACKOFF_S))
        try:
            await slot.handle.start()
        except ServerError as error:
            raise EngineDied(str(error)) from error

    def _give_up(self, slot: EngineSlot, error: TinsmithError) -> None:
        died = error if isinstance(error, EngineDied) else EngineDied(str(error))
        logger.error("the engine of %r is not started again: %s", slot.card.name, error)
        slot.give_up()
        self._training.engine_died(slot, died)
        self._sampling.engine_died(slot, died)
        self._paging.engine_died(slot)

    def _convict(self, slot: EngineSlot) -> dict[str, KilledEngine]:
        """Fail the requests that were there too often; they are not done again."""
        self._strikes.keep(self._is_open)
        poisoned = self._strikes.convict(self._settings.max_strikes)
        for request_id, error in poisoned.items():
            self._sampling.fail(request_id, error)
            self._futures.fail(request_id, error)
            logger.error("request %s is given up: %s", request_id, error)
        for model in self._models(slot):
            if (deadly := poisoned.get(model.creation_request_id)) is not None:
                self._training.end_model(model, creation_failed(model.model_id, deadly))
                self._training.entries.retire()
        return poisoned

    def _is_open(self, request_id: str) -> bool:
        return self._futures.knows(request_id) and self._futures.ended(request_id) is None

    async def _send_samples(self, slot: EngineSlot) -> None:
        """Those that were there at a death go alone, one after another; the others together."""
        waiting = self._sampling.waiting(slot)
        suspects = [request_id for request_id in waiting if request_id in self._strikes]
        for request_id in waiting:
            if request_id not in self._strikes:
                self._sampling.send_again(request_id)
        scheduler = self._training.scheduler(slot)
        if not suspects:
            return
        while scheduler.suspects and slot.dead is None:  # noqa: ASYNC110 - rare, and two things may end it
            await asyncio.sleep(_TRIAL_POLL_S)
        scheduler.is_held = any(self._strikes[request_id] > 1 for request_id in suspects)
        try:
            for request_id in suspects:
                self._sampling.send_again(request_id)
                alone = self._strikes[request_id] > 1
                while alone and slot.dead is None and self._is_open(request_id):  # noqa: ASYNC110 - as above
                    await asyncio.sleep(_TRIAL_POLL_S)
                if slot.dead is not None:
                    return
        finally:
            scheduler.is_held = False
            scheduler.wake()
