"""Engines that die are started again, and go on where they were; a request that kills them is found and failed."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from tinsmith.control.engines import EngineSlot
from tinsmith.control.futures import FutureStore
from tinsmith.control.identity import Clock
from tinsmith.control.journal import Journal
from tinsmith.control.ledger import mark_failed
from tinsmith.control.models import Model, ModelStatus
from tinsmith.control.replay import Replay
from tinsmith.control.sampling import Sampling
from tinsmith.control.settings import ControlSettings
from tinsmith.control.snapshots import Snapshots
from tinsmith.control.training import Training
from tinsmith.types.errors import EngineDied, ServerError, TinsmithError

logger = logging.getLogger(__name__)

_WINDOW_S = 600.0
_MAX_BACKOFF_S = 30.0
_TRIAL_POLL_S = 0.02


class KilledEngine(ServerError):
    """The engine died whenever it worked on this request."""


class Supervisor:
    def __init__(
        self,
        *,
        settings: ControlSettings,
        training: Training,
        sampling: Sampling,
        snapshots: Snapshots,
        replay: Replay,
        futures: FutureStore,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._training = training
        self._sampling = sampling
        self._snapshots = snapshots
        self._replay = replay
        self._futures = futures
        self._journal = journal
        self._clock = clock
        self._strikes: Counter[str] = Counter()
        """How many deaths of an engine each unanswered request was there at."""
        self._deaths: dict[str, deque[float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def engine_died(self, slot: EngineSlot, error: EngineDied) -> bool:
        """Whether it will be started again."""
        if self._is_closed:
            return False
        deaths = self._deaths.setdefault(slot.card.name, deque())
        now = self._clock.monotonic()
        while deaths and deaths[0] < now - _WINDOW_S:
            deaths.popleft()
        if len(deaths) >= self._settings.max_engine_restarts:
            logger.error("%s; it has died %d times in %g s and stays dead", error, len(deaths) + 1, _WINDOW_S)
            return False
        deaths.append(now)
        for model in self._models(slot):
            self._strikes.update(model.running)
        self._strikes.update(self._sampling.in_flight(slot))
        slot.is_recovering = True
        logger.warning("%s; it is started again", error)
        self._spawn(self._recover(slot, len(deaths)))
        return True

    async def close(self) -> None:
        self._is_closed = True
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
            await self._snapshots.drain()
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
        for model_requests in recalled.requests.values():
            model_requests[:] = [replace(e, failure=poisoned.get(e.name, e.failure)) for e in model_requests]
        scheduler = self._training.scheduler(slot)
        in_models = {request_id for model in self._models(slot) for request_id in model.journaled.values()}
        scheduler.suspects = {r for r in self._strikes if r in in_models and r not in poisoned}
        self._replay.revive(slot, recalled)
        self._spawn(self._send_samples(slot))

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

    def _convict(self, slot: EngineSlot) -> dict[str, TinsmithError]:
        """Fail the requests that were there too often; they are not done again."""
        self._strikes = Counter({r: n for r, n in self._strikes.items() if self._is_open(r)})
        guilty = [r for r, n in self._strikes.items() if n >= self._settings.max_strikes]
        poisoned: dict[str, TinsmithError] = {}
        for request_id in guilty:
            error = KilledEngine(
                f"the engine died {self._strikes.pop(request_id)} times while it worked on this request; it is given up"
            )
            poisoned[request_id] = error
            self._sampling.fail(request_id, error)
            self._futures.fail(request_id, error)
            self._journal.note([mark_failed("request", request_id, error)])
            logger.error("request %s is given up: %s", request_id, error)
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
