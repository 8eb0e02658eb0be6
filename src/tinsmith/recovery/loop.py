"""The closed loop: a training loop that goes on at the right step, with the right data and the right optimizer state.

    recovery = Recovery.start(service, base_model="…", rank=8, policy=RecoveryPolicy(enabled=True))
    for step in recovery.steps(1000, batches):
        with step:
            passed = step.client.forward_backward(step.batch, "cross_entropy")
            step.client.optim_step(AdamParams(learning_rate=1e-4)).result()
            step.report(loss=passed.result().loss)

What fails inside `with step` and can be recovered from is recovered from; the next step is then the one after the
checkpoint. Invariant: the weights of `recovery.client` are those of steps 1…`recovery.done`, each taken exactly once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tinsmith.client.errors import TinkerError
from tinsmith.client.events import Events
from tinsmith.client.loop import LoopThread
from tinsmith.client.rest import RestClient
from tinsmith.recovery.checkpoints import (
    CheckpointKeeper,
    CheckpointPolicy,
    RecordedCheckpoint,
    recorded_checkpoints,
    select_checkpoint,
)
from tinsmith.recovery.diagnosis import Diagnosis, NotFiniteLoss, Trigger, diagnose
from tinsmith.recovery.errors import RecoveryFailed
from tinsmith.recovery.executor import Recovered, RecoveryExecutor, WatchedRun
from tinsmith.recovery.monitor import RecoveryMonitor
from tinsmith.recovery.policy import RecoveryPolicy

if TYPE_CHECKING:
    from tinsmith.client.service import ServiceClient
    from tinsmith.client.training import TrainingClient

logger = logging.getLogger("tinsmith.recovery")
B = TypeVar("B")

_RUN_KEY = "tinsmith.run"


@dataclass(slots=True, kw_only=True)
class Step(Generic[B]):
    """One optimizer step to be taken. Use it as `with step:` (or `async with`) around everything that may fail."""

    number: int
    """From 1: the number of steps taken once this one is."""
    batch: B
    client: TrainingClient
    """Make all calls through this: after a recovery it is another one."""
    recovery: Recovery = field(repr=False)
    metrics: dict[str, float] = field(default_factory=dict)
    is_over: bool = False

    @property
    def index(self) -> int:
        """From 0: the position in the data, and for schedules."""
        return self.number - 1

    def report(self, *, loss: float, **metrics: float) -> None:
        """What checkpoints record beside the weights. Raises `NotFiniteLoss` if the loss is NaN or infinite."""
        if not math.isfinite(loss):
            raise NotFiniteLoss(f"the loss of step {self.number} is {loss!r}")
        self.metrics |= {"loss": loss, **metrics}

    def __enter__(self) -> Step[B]:
        self.recovery._entered()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.is_over = True
        return self.recovery._left(self, error)

    async def __aenter__(self) -> Step[B]:
        self.recovery._entered()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.is_over = True
        return await asyncio.to_thread(self.recovery._left, self, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """One change of runs."""

    old_run_id: str
    new_run_id: str
    checkpoint: RecordedCheckpoint
    trigger: Trigger
    at_step: int
    """Steps taken when the trouble was noticed."""


class Recovery:
    """A run under one name over all the physical runs that recoveries make of it. Made by `start` or `resume`."""

    def __init__(
        self,
        run: WatchedRun,
        client: TrainingClient,
        *,
        name: str,
        policy: RecoveryPolicy,
        checkpoints: CheckpointPolicy,
        from_checkpoint: RecordedCheckpoint | None = None,
    ) -> None:
        self.name = name
        self.client = client
        self.lineage: list[Lineage] = []
        self.done = 0 if from_checkpoint is None else from_checkpoint.step or 0
        """Optimizer steps in the weights of `client`."""
        self._run_watched = run
        self._policy = policy
        self._events: Events = run.service.holder.link.events
        self._keeper = CheckpointKeeper(checkpoints, name)
        self._metrics: Mapping[str, float] = {}
        self._failures_at: dict[int, int] = {}
        self._noticed: Diagnosis | None = None
        self._step_began: float | None = None
        self._owned: list[ServiceClient] = []
        self._loop = LoopThread("tinsmith-recovery")
        self._executor = RecoveryExecutor(policy, self._events)
        self._monitor = RecoveryMonitor(policy, self._note, self._events)
        if from_checkpoint is not None:
            self._keeper.rewound_to(from_checkpoint)
        if policy.enabled:
            self._loop.call(lambda: self._monitor.monitor_run(run))
            if policy.stall_ms is not None:
                self._loop.run(self._watch_for_stalls(policy.stall_ms / 1000))

    # ---- beginning ----

    @classmethod
    def start(
        cls,
        service: ServiceClient,
        *,
        name: str | None = None,
        policy: RecoveryPolicy | None = None,
        checkpoints: CheckpointPolicy | None = None,
        **model: Any,
    ) -> Recovery:
        """A new run; `model` goes to `ServiceClient.create_lora_training_client`."""
        metadata = dict(model.pop("user_metadata", None) or {})
        name = name or f"run-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000:06d}"
        metadata[_RUN_KEY] = name
        client = service.create_lora_training_client(**model, user_metadata=metadata).result()
        run = WatchedRun(run_id=client.model_id, service=service, user_metadata=metadata)
        return cls(
            run, client, name=name, policy=policy or RecoveryPolicy(), checkpoints=checkpoints or CheckpointPolicy()
        )

    @classmethod
    def resume(
        cls,
        service: ServiceClient,
        *,
        name: str,
        policy: RecoveryPolicy | None = None,
        checkpoints: CheckpointPolicy | None = None,
        **model: Any,
    ) -> Recovery:
        """Go on with the run of this name, in another process say, from the checkpoint the policy's strategy takes.

        A run that has no checkpoint yet is started with `model`. Raises `RecoveryFailed` if the policy names a
        checkpoint that does not say how many steps are in it.
        """
        policy = policy or RecoveryPolicy()
        known = recorded_checkpoints(RestClient(service.holder))
        if not isinstance(policy.checkpoint_strategy, tuple):
            known = [one for one in known if one.run_name == name]
        taken, _ = select_checkpoint(known, policy.checkpoint_strategy)
        if taken is None:
            return cls.start(service, name=name, policy=policy, checkpoints=checkpoints, **model)
        _step_of(taken, name)
        metadata = {**(model.get("user_metadata") or {}), _RUN_KEY: name}
        if policy.restore_optimizer:
            making = service.create_training_client_from_state_with_optimizer(taken.path, user_metadata=metadata)
        else:
            making = service.create_training_client_from_state(taken.path, user_metadata=metadata)
        client = making.result()
        run = WatchedRun(run_id=client.model_id, service=service, ancestors=(taken,), user_metadata=metadata)
        return cls(
            run,
            client,
            name=name,
            policy=policy,
            checkpoints=checkpoints or CheckpointPolicy(),
            from_checkpoint=taken,
        )

    # ---- the loop ----

    @property
    def run_id(self) -> str:
        """The physical run that is training now."""
        return self._run_watched.run_id

    @property
    def service(self) -> ServiceClient:
        """The service client of the session that is training now."""
        return self._run_watched.service

    @property
    def checkpoints(self) -> list[RecordedCheckpoint]:
        return self._keeper.checkpoints

    def steps(self, num_steps: int, data: Sequence[B] | Callable[[int], B] | None = None) -> Iterator[Step[B]]:
        """The steps that are left of `num_steps`.

        `data` gives the batch of a position (from 0): a function, or a sequence that starts again at its end. A step
        used without `with` counts as taken when the next one is asked for; its errors end the loop.
        """
        self._save_if_due(is_last=False)
        while not self._is_complete(num_steps):
            step = self._next_step(data)
            yield step
            if not step.is_over:
                step.__exit__(None, None, None)

    async def steps_async(
        self, num_steps: int, data: Sequence[B] | Callable[[int], B] | None = None
    ) -> AsyncIterator[Step[B]]:
        """As `steps`, for `async for` and `async with`."""
        await asyncio.to_thread(self._save_if_due, is_last=False)
        while not await asyncio.to_thread(self._is_complete, num_steps):
            step = self._next_step(data)
            yield step
            if not step.is_over:
                await step.__aexit__(None, None, None)

    def close(self) -> None:
        """Stop watching, and close the sessions that recoveries opened; the first one belongs to the caller."""
        self._loop.call(self._monitor.stop)
        self._loop.stop()
        self._loop.join(5.0)
        for service in self._owned:
            try:
                service.close().result(10.0)
            except (TinkerError, TimeoutError) as error:
                logger.warning("a session that a recovery opened could not be closed: %s", error)

    def __enter__(self) -> Recovery:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- one step ----

    def _next_step(self, data: Sequence[B] | Callable[[int], B] | None) -> Step[B]:
        batch: Any = None
        if callable(data):
            batch = data(self.done)
        elif data is not None:
            batch = data[self.done % len(data)]
        return Step(number=self.done + 1, batch=batch, client=self.client, recovery=self)

    def _entered(self) -> None:
        self._step_began = time.monotonic()

    def _left(self, step: Step[Any], error: BaseException | None) -> bool:
        """Count the step, or recover from what it ended with: true if the error is dealt with. Else it is the caller's.

        Raises `RecoveryFailed` from the error where recovering was tried and failed.
        """
        self._step_began = None
        if error is None and self._noticed is None:
            self.done, self._metrics = step.number, dict(step.metrics)
            try:
                self._save_if_due(is_last=False)
            except TinkerError as failure:
                if not self._recovers_from(failure):
                    raise
            return False
        return self._recovers_from(error)

    def _recovers_from(self, error: BaseException | None) -> bool:
        """Recover from an error, or from what was noticed beside the loop. False if the error is not of that kind.

        What is to end the program or the task, such as Ctrl-C, ends the loop whatever was noticed.
        """
        if error is not None and not isinstance(error, Exception):
            return False
        found, self._noticed = self._noticed, None
        if found is None and error is not None:
            found = self._diagnose(error)
            if found is not None:
                self._tell_detected(found)
        if found is None or found.trigger not in self._policy.triggers or not self._policy.enabled:
            return False
        self._recover(found, error)
        return True

    def _is_complete(self, num_steps: int) -> bool:
        """Whether all steps are taken and the last checkpoint is written; else there are steps to take (again)."""
        while self.done >= num_steps:
            try:
                self._save_if_due(is_last=True)
            except TinkerError as error:
                if not self._recovers_from(error):
                    raise
            else:
                return True
        return False

    def _diagnose(self, error: BaseException) -> Diagnosis | None:
        holder = self.service.holder
        return holder.loop.run(diagnose(error, holder.link, self.run_id)).result() if holder.loop.is_alive else None

    def _tell_detected(self, found: Diagnosis) -> None:
        self._events.emit("recovery.detected", run_id=self.run_id, trigger=found.trigger, reason=found.reason)
        self._loop.call(lambda: self._monitor.stop_monitoring(self.run_id))

    def _recover(self, found: Diagnosis, error: BaseException | None) -> None:
        at = self.done
        self._failures_at[at] = self._failures_at.get(at, 0) + 1
        if self._failures_at[at] > self._policy.max_attempts:
            times = f"step {at + 1} has failed {self._failures_at[at]} times: {found.reason}"
            raise RecoveryFailed(self.run_id, "max_attempts_exceeded", times) from error
        recovering = self._loop.run(self._executor.recover(self._run_watched, found.trigger, found.reason))
        try:
            recovered = recovering.result()
        except RecoveryFailed as failure:
            raise failure from (failure.__cause__ or error)
        self._go_on_with(recovered, at)

    def _go_on_with(self, recovered: Recovered, at: int) -> None:
        self.lineage.append(
            Lineage(
                old_run_id=recovered.old_run_id,
                new_run_id=recovered.run_id,
                checkpoint=recovered.checkpoint,
                trigger=recovered.trigger,
                at_step=at,
            )
        )
        old = self._run_watched.service
        self._run_watched, self.client = recovered.run, recovered.client
        if recovered.run.service is not old:
            if old in self._owned:
                self._owned.remove(old)
                old.close("errored", f"recovered from {recovered.trigger}")
            self._owned.append(recovered.run.service)
        self.done = _step_of(recovered.checkpoint, recovered.old_run_id)
        self._metrics = recovered.checkpoint.metrics
        self._keeper.rewound_to(recovered.checkpoint)
        self._noticed = None
        self._loop.call(lambda: self._monitor.monitor_run(recovered.run))

    # ---- checkpoints ----

    def _save_if_due(self, *, is_last: bool) -> None:
        """Raises what a checkpoint failed with: this one, or the one before, which nobody waited for."""
        self._settle_checkpoint()
        if not self._policy.enabled and not is_last and self.done == 0:
            return
        if any(one.step == self.done for one in self._keeper.checkpoints):
            return
        if self._keeper.wants(self.done, self._metrics, is_last=is_last):
            self._keeper.save(self.client, self.done, self._metrics, now=time.time())
            if is_last or self.done == 0:
                self._settle_checkpoint()

    def _settle_checkpoint(self) -> None:
        """Wait for the checkpoint asked for last, tell of it, and delete those that it makes superfluous."""
        saved = self._keeper.settle()
        if saved is None:
            return
        self._events.emit(
            "checkpoint.saved",
            run_id=self.run_id,
            path=saved.path,
            step=saved.step,
            loss=saved.loss,
            run_name=self.name,
        )
        gone = self._keeper.retain(RestClient(self.service.holder))
        left = tuple(one for one in self._run_watched.ancestors if one.path not in gone)
        self._run_watched = replace(self._run_watched, ancestors=left)

    # ---- beside the loop ----

    async def _note(self, run: WatchedRun, trigger: Trigger, reason: str) -> None:
        """The monitor has found trouble: the loop deals with it when the step ends, one way or the other."""
        if run.run_id == self.run_id:
            self._noticed = Diagnosis(trigger=trigger, reason=reason)

    async def _watch_for_stalls(self, limit_s: float) -> None:
        """Ends a stalled step by closing its session: everything that the step waits for fails then."""
        while True:
            await asyncio.sleep(limit_s / 10)
            began = self._step_began
            if began is None or time.monotonic() - began < limit_s:
                continue
            self._step_began = None
            reason = f"step {self.done + 1} has taken longer than {limit_s:g} s"
            self._noticed = Diagnosis(trigger=Trigger.STALLED, reason=reason)
            self._tell_detected(self._noticed)
            self._run_watched.service.close("errored", reason)


def _step_of(checkpoint: RecordedCheckpoint, run_id: str) -> int:
    """Raises `RecoveryFailed` for a checkpoint that does not say how many steps are in it."""
    if checkpoint.step is None:
        raise RecoveryFailed(
            run_id,
            "user_error",
            f"checkpoint {checkpoint.path!r} does not say after which step it was saved, so the loop cannot go on",
        )
    return checkpoint.step
