"""Asks, every so often, whether watched runs are still sound, and has those recovered that are not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from tinsmith.client.errors import TinkerError
from tinsmith.client.events import Events, describe
from tinsmith.client.futures import APIFuture
from tinsmith.recovery.diagnosis import Diagnosis, Trigger, run_state, session_ended
from tinsmith.recovery.errors import RecoveryFailed
from tinsmith.recovery.executor import Recovered, RecoveryExecutor, WatchedRun
from tinsmith.recovery.policy import RecoveryPolicy

logger = logging.getLogger("tinsmith.recovery")

Handler: TypeAlias = Callable[[WatchedRun, Trigger, str], Awaitable[Recovered | None]]
"""What is done about a run in trouble; the run that it gives, if any, is watched in its turn."""


class RecoveryMonitor:
    """One task per run, on the event loop it was started on.

    Trouble is told as `recovery.detected` and handed on exactly once; the run is then no longer watched, and the one
    that takes its place is. Polls that fail are counted and told as `recovery.poll_error`; they trigger nothing.
    """

    def __init__(
        self, policy: RecoveryPolicy, executor: RecoveryExecutor | Handler, events: Events | None = None
    ) -> None:
        self._policy = policy
        self._handle: Handler = executor.recover if isinstance(executor, RecoveryExecutor) else executor
        self._events = events or Events()
        self._watching: dict[str, asyncio.Task[None]] = {}
        self.poll_errors: dict[str, int] = {}
        """By run: polls in a row that have failed."""

    @classmethod
    def start(
        cls, policy: RecoveryPolicy, executor: RecoveryExecutor | Handler, events: Events | None = None
    ) -> RecoveryMonitor:
        return cls(policy, executor, events)

    @property
    def watched(self) -> list[str]:
        return list(self._watching)

    def monitor_run(self, run: WatchedRun) -> None:
        """Watch a run from now on. Raises `RecoveryFailed` (`recovery_disabled`) if the policy is not enabled."""
        if not self._policy.enabled:
            raise RecoveryFailed(run.run_id, "recovery_disabled")
        if run.run_id not in self._watching:
            self._watching[run.run_id] = asyncio.create_task(self._watch(run))

    def stop_monitoring(self, run_id: str) -> None:
        """Idempotent. A recovery that is under way goes on."""
        task = self._watching.pop(run_id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def stop(self) -> None:
        for run_id in list(self._watching):
            self.stop_monitoring(run_id)

    async def check(self, run: WatchedRun) -> Diagnosis | None:
        """What is wrong with a run, as far as the server says. Raises `TinkerError` if it cannot be asked."""
        link = run.service.holder.link

        async def ask() -> Diagnosis | None:
            if gone := await session_ended(link):
                return Diagnosis(trigger=Trigger.DEAD_SESSION, reason=gone)
            return await run_state(link, run.run_id)

        asked: APIFuture[Diagnosis | None] = run.service.holder.begin(ask)
        return await asked

    async def _watch(self, run: WatchedRun) -> None:
        while True:
            await asyncio.sleep(self._policy.poll_interval_ms / 1000)
            try:
                found = await self.check(run)
            except TinkerError as error:
                failures = self.poll_errors[run.run_id] = self.poll_errors.get(run.run_id, 0) + 1
                self._events.emit("recovery.poll_error", run_id=run.run_id, failures=failures, **describe(error))
                continue
            self.poll_errors.pop(run.run_id, None)
            if found is not None and found.trigger in self._policy.triggers:
                break
        self._events.emit("recovery.detected", run_id=run.run_id, trigger=found.trigger, reason=found.reason)
        self._watching.pop(run.run_id, None)
        await self._hand_on(run, found)

    async def _hand_on(self, run: WatchedRun, found: Diagnosis) -> None:
        try:
            recovered = await self._handle(run, found.trigger, found.reason)
        except TinkerError as error:
            logger.error("run %s is not watched any more: %s", run.run_id, error)
            return
        if recovered is not None:
            self.monitor_run(recovered.run)
