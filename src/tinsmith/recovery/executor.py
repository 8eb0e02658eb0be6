"""Brings one run back: picks a checkpoint, makes a new client from it, and tells what happens."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinsmith.client.errors import APIConnectionError, APIError, NotFoundError, RequestFailedError, TinkerError
from tinsmith.client.events import Events, describe
from tinsmith.client.rest import RestClient
from tinsmith.recovery.checkpoints import RecordedCheckpoint, select_checkpoint
from tinsmith.recovery.diagnosis import Trigger
from tinsmith.recovery.errors import FailureReason, RecoveryFailed
from tinsmith.recovery.policy import RecoveryPolicy
from tinsmith.types.checkpoint import ParsedCheckpointTinkerPath

if TYPE_CHECKING:
    from tinsmith.client.service import ServiceClient
    from tinsmith.client.training import TrainingClient

logger = logging.getLogger("tinsmith.recovery")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedRun:
    """A run that may be recovered, and where its checkpoints are."""

    run_id: str
    service: ServiceClient
    ancestors: tuple[RecordedCheckpoint, ...] = ()
    """The checkpoints it came from, the newest last: the run's own list does not have them."""
    user_metadata: dict[str, str] = field(default_factory=dict)
    """Given to the model that takes its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The run that goes on in place of another."""

    old_run_id: str
    run: WatchedRun
    client: TrainingClient
    checkpoint: RecordedCheckpoint
    trigger: Trigger
    attempts: int

    @property
    def run_id(self) -> str:
        return self.run.run_id


class RecoveryExecutor:
    """Recovers runs, several at once up to `max_concurrent`. Use it on one event loop.

    Each recovery emits `recovery.started`, for each attempt `recovery.checkpoint_selected` and
    `recovery.client_created`, and ends with `recovery.completed` or `recovery.failed`. Callbacks may be coroutines;
    what they raise is logged and told as `recovery.callback_failed`, and changes nothing.
    """

    def __init__(
        self,
        policy: RecoveryPolicy,
        events: Events | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._policy = policy
        self._events = events or Events()
        self._sleep = sleep
        self._slots = asyncio.Semaphore(policy.max_concurrent)
        self._pending: set[str] = set()

    async def recover(self, run: WatchedRun, trigger: Trigger, reason: str = "") -> Recovered:
        """Raises `RecoveryFailed`, from the last real error if there was one."""
        if not self._policy.enabled:
            raise RecoveryFailed(run.run_id, "recovery_disabled")
        if run.run_id in self._pending:
            raise RecoveryFailed(run.run_id, "already_pending")
        self._pending.add(run.run_id)
        try:
            async with self._slots:
                return await self._recover(run, trigger, reason)
        finally:
            self._pending.discard(run.run_id)

    async def _recover(self, run: WatchedRun, trigger: Trigger, reason: str) -> Recovered:
        self._emit("started", run, trigger=trigger, reason=reason)
        service = run.service.reopen() if trigger.needs_new_session else run.service
        last: TinkerError | None = None
        reason_to_stop: FailureReason = "max_attempts_exceeded"
        attempt = 0
        for attempt in range(self._policy.max_attempts):
            if attempt:
                await self._sleep(self._policy.backoff_s(attempt - 1))
            try:
                return await self._completed(run, await self._attempt(run, service, trigger, attempt))
            except RecoveryFailed as error:
                reason_to_stop = error.reason
                break
            except TinkerError as error:
                last = error
                self._emit("attempt_failed", run, attempt=attempt + 1, **describe(error))
                if service is run.service:
                    service = run.service.reopen()  # what refused may have been the session
                elif _is_users(error):
                    reason_to_stop = "user_error"
                    break
        else:
            self._emit("exhausted", run, attempts=self._policy.max_attempts)
        if service is not run.service:
            service.close("errored", f"run {run.run_id} was not recovered")
        raise await self._given_up(run, reason_to_stop, attempt + 1, last) from last

    async def _attempt(self, run: WatchedRun, service: ServiceClient, trigger: Trigger, attempt: int) -> Recovered:
        strategy = self._policy.checkpoint_strategy
        known = await self._checkpoints(run, service)
        checkpoint, how = select_checkpoint(known, strategy)
        if checkpoint is None:
            raise RecoveryFailed(run.run_id, "no_checkpoint")
        self._emit("checkpoint_selected", run, path=checkpoint.path, step=checkpoint.step, strategy=how)
        metadata = {**run.user_metadata, "tinsmith.recovered_from": run.run_id}
        if self._policy.restore_optimizer:
            making = service.create_training_client_from_state_with_optimizer(checkpoint.path, user_metadata=metadata)
        else:
            making = service.create_training_client_from_state(checkpoint.path, user_metadata=metadata)
        client = await making
        self._emit("client_created", run, new_run_id=client.model_id, attempt=attempt + 1)
        before = (one for one in known if one.path != checkpoint.path and one.time <= checkpoint.time)
        ancestors = (*before, checkpoint)
        new = WatchedRun(run_id=client.model_id, service=service, ancestors=ancestors, user_metadata=run.user_metadata)
        return Recovered(
            old_run_id=run.run_id,
            run=new,
            client=client,
            checkpoint=checkpoint,
            trigger=trigger,
            attempts=attempt + 1,
        )

    async def _checkpoints(self, run: WatchedRun, service: ServiceClient) -> list[RecordedCheckpoint]:
        """What can be continued from: checkpoints of the run and those it came from; or of the run the policy names."""
        strategy = self._policy.checkpoint_strategy
        named = ParsedCheckpointTinkerPath.from_tinker_path(strategy[1]) if isinstance(strategy, tuple) else None
        run_id = run.run_id if named is None else named.training_run_id
        try:
            listed = (await RestClient(service.holder).list_checkpoints(run_id)).checkpoints
        except NotFoundError:
            listed = []
        own = [RecordedCheckpoint.of(one) for one in listed if one.checkpoint_type == "training"]
        return own if named is not None else [*run.ancestors, *own]

    async def _completed(self, run: WatchedRun, recovered: Recovered) -> Recovered:
        self._emit(
            "completed",
            run,
            new_run_id=recovered.run_id,
            path=recovered.checkpoint.path,
            step=recovered.checkpoint.step,
            attempts=recovered.attempts,
        )
        if self._policy.on_recovery is not None:
            await self._tell(
                run, "on_recovery", self._policy.on_recovery, run.run_id, recovered.client, recovered.checkpoint
            )
        return recovered

    async def _given_up(
        self, run: WatchedRun, reason: FailureReason, attempts: int, last: TinkerError | None
    ) -> RecoveryFailed:
        told = {} if last is None else {"last_error": last.message, "last_error_type": last.type}
        self._emit("failed", run, reason=reason, attempts=attempts, **told)
        if self._policy.on_failure is not None:
            await self._tell(run, "on_failure", self._policy.on_failure, run.run_id, reason)
        return RecoveryFailed(run.run_id, reason, "" if last is None else last.message)

    async def _tell(self, run: WatchedRun, name: str, callback: Callable[..., Any], *arguments: object) -> None:
        try:
            answer = callback(*arguments)
            if inspect.isawaitable(answer):
                await answer
        except Exception as error:
            logger.exception("%s of run %s failed", name, run.run_id)
            self._emit("callback_failed", run, callback=name, **describe(error))

    def _emit(self, name: str, run: WatchedRun, **fields: Any) -> None:
        self._events.emit(f"recovery.{name}", run_id=run.run_id, **fields)


def _is_users(error: TinkerError) -> bool:
    """Whether trying again is pointless, as far as the server says."""
    if isinstance(error, APIConnectionError) or not isinstance(error, APIError | RequestFailedError):
        return False
    return error.user_error and not error.retryable
