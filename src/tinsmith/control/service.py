"""`Control`: everything the server may ask. It starts and ends the parts and hands requests on; what is looked up is in
its `library`.

One event loop; plain (non-async) methods only touch memory. Errors of a queued request travel through its future.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from tinsmith.control import records
from tinsmith.control.accounts import Accounts
from tinsmith.control.administration import Administration, OwnKey
from tinsmith.control.assembly import Ground, assemble
from tinsmith.control.completions import Completion
from tinsmith.control.data_lock import DataLock
from tinsmith.control.engines import EngineBook, EngineSlot
from tinsmith.control.folder_store import FolderStore
from tinsmith.control.futures import Outcome, Pending, RequestType
from tinsmith.control.identities import Caller
from tinsmith.control.identity import Clock, Ids, SignedIds, SystemClock
from tinsmith.control.inspection import Inspection, adapter_places, engine_states, model_states
from tinsmith.control.janitor import Janitor
from tinsmith.control.journal import Journal
from tinsmith.control.ledger import Ledger
from tinsmith.control.memos import Memos
from tinsmith.control.observers import Observers, observed_draw
from tinsmith.control.paging import PagingStats
from tinsmith.control.recipes import Recipes
from tinsmith.control.registry import Registry
from tinsmith.control.replay import Replay
from tinsmith.control.requests import (
    CreateCustomLoss,
    CreateModel,
    CreateModelFromCheckpoint,
    DrawSamples,
    ModelRequest,
    NewSession,
    Recipe,
    SampleRequest,
    Submission,
)
from tinsmith.control.result_store import ResultStore
from tinsmith.control.sessions import FinishReason, SessionBook
from tinsmith.control.settings import ControlSettings
from tinsmith.control.signing import Signer
from tinsmith.control.stores import folder_store, registry_location
from tinsmith.control.strikes import Strikes
from tinsmith.control.supervisor import Supervisor
from tinsmith.runtime.handle import EngineHandle
from tinsmith.types.errors import EngineDied, ServerError, TinsmithError, Unsupported
from tinsmith.types.operations import BaseModelCard
from tinsmith.types.rest import (
    GetInfoResponse,
    GetSamplerResponse,
)
from tinsmith.types.results import DrawnToken, SampleResponse

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
"""How long a stopping server waits for what its engines work on."""


class Control:
    def __init__(
        self,
        settings: ControlSettings,
        engines: Sequence[EngineHandle],
        *,
        clock: Clock | None = None,
        ids: Callable[[bytes], Ids] = SignedIds,
    ) -> None:
        """One engine per base model. `ids` is given the registry's secret."""
        self._settings = settings
        self._clock = clock or SystemClock()
        self._make_ids = ids
        self._engines = EngineBook(engines)
        self._lock = DataLock(settings.data_dir)
        self._registry = Registry(registry_location(settings))
        self._folders: FolderStore = folder_store(settings)
        self._ledger = Ledger(settings.data_dir / "ledger.sqlite3") if settings.ledger else None
        self._journal = Journal(self._ledger)
        self.memos = Memos(self._journal)
        self.recipes = Recipes()
        self._supervisor: Supervisor | None = None
        self._replay: Replay | None = None
        self.on_fatal: Callable[[], None] = lambda: None
        """Told when nothing more can be written for good: the process should end, and be started again."""
        self._sessions = SessionBook()
        self._results = ResultStore(settings.data_dir, max_bytes=settings.max_stored_bytes)
        self.accounts = Accounts(self._registry, self._clock)
        self.observers = Observers()
        self.num_left = 0
        """Once closed: requests that the next server goes on with."""
        self._state = "not started"

    # ---- life ----

    async def start(self) -> None:
        """Lock the data folder, open the registry and the ledger, start the engines, go on where the last server was.

        Raises `UserError` if a base model cannot be loaded or the data folder is in use; nothing is left running then.
        """
        self._lock.acquire()
        try:
            secret = await asyncio.to_thread(self._registry.open)
            await self._folders.open()
            await self._open_ledger()
            await asyncio.to_thread(self._results.open)
            await self.accounts.start()
            if self._settings.keys_required:
                self.accounts.check_has_keys()
            await self._engines.start()
        except BaseException:
            await self._close_stores()
            raise
        self._assemble(self._make_ids(secret))
        self.signer = Signer(secret, self._clock)
        try:
            await self._checkpoints.sweep_orphans()
            await self._go_on()
        except BaseException:
            await self._engines.close()
            await self._close_stores()
            raise
        await self._health.start()
        self._janitor.start()
        self._state = "ready"

    async def _open_ledger(self) -> None:
        if self._ledger is None:
            at = self._clock.time()
            await self._registry.write(lambda c: records.end_everything(c, at, "the server was stopped"))
            return
        await asyncio.to_thread(self._ledger.open)
        self._ledger.on_fatal = lambda: self.on_fatal()
        self._ledger.on_commit = self.observers.committed
        self._ledger.start(asyncio.get_running_loop())

    async def _close_stores(self) -> None:
        await self.accounts.close()
        if self._ledger is not None:
            await asyncio.to_thread(self._ledger.close)
        await asyncio.to_thread(self._registry.close)
        await asyncio.to_thread(self._results.close)
        await self._folders.close()
        self._lock.release()

    async def _go_on(self) -> None:
        """Bring back what was live when the last server ended. Raises `StorageError`."""
        if self._ledger is None:
            await self._snapshots.sweep()  # nothing of an earlier server is live
            return
        strikes = Strikes(self._journal)
        self._replay = Replay(
            ledger=self._ledger,
            journal=self._journal,
            settings=self._settings,
            engines=self._engines,
            sessions=self._sessions,
            samplers=self._samplers,
            custom_losses=self._custom_losses,
            training=self._training,
            sampling_sessions=self._sampling_sessions,
            sampling=self._sampling,
            futures=self._futures,
            registry=self._registry,
            checkpoints=self._checkpoints,
            strikes=strikes,
            paging=self._paging,
            jobs=self._jobs,
            memos=self.memos,
            clock=self._clock,
        )
        self._supervisor = Supervisor(
            settings=self._settings,
            strikes=strikes,
            training=self._training,
            sampling=self._sampling,
            snapshots=self._snapshots,
            paging=self._paging,
            replay=self._replay,
            futures=self._futures,
            clock=self._clock,
        )
        self._snapshots.watch(self._engines)
        self._meter.replayable = lambda: self._training.entries.replayable(self._training.models)
        await self._meter.recall()
        await self._replay.restore()
        self._supervisor.begin()
        await self._snapshots.sweep()

    def _assemble(self, ids: Ids) -> None:
        parts = assemble(
            Ground(
                settings=self._settings,
                clock=self._clock,
                ids=ids,
                engines=self._engines,
                registry=self._registry,
                folders=self._folders,
                results=self._results,
                journal=self._journal,
                sessions=self._sessions,
                accounts=self.accounts,
                observers=self.observers,
                recipes=self.recipes,
            )
        )
        self._futures, self._jobs = parts.futures, parts.jobs
        self._meter, self._health = parts.meter, parts.health
        self._checkpoints, self._retention = parts.checkpoints, parts.retention
        self._samplers, self._sampling = parts.samplers, parts.sampling
        self._training, self._custom_losses = parts.training, parts.custom_losses
        self._snapshots, self._paging = parts.snapshots, parts.paging
        self._session_life, self._sampling_sessions = parts.session_life, parts.sampling_sessions
        self.owners, self.library = parts.owners, parts.library
        self._janitor = self._make_janitor()
        for slot in self._engines:
            slot.on_death = self._engine_died

    def _make_janitor(self) -> Janitor:
        return Janitor(
            quick=(
                self._check_engines,
                self._training.give_up_gaps,
                self._session_life.end_silent,
                self._training.end_drained,
                lambda: self._sampling.cancel_abandoned(self._settings.abandoned_sample_s),
                self._futures.expire,
                lambda: self._samplers.expire(self._settings.sampler_ttl_s),
                self._registry.probe,
                *self._chores_of_the_ledger(),
            ),
            slow=(
                self._checkpoints.delete_expired,
                self._retention.tidy,
                self._training.flush_activity,
                self._meter.flush,
                self._snapshots.sweep,
            ),
            interval_s=self._settings.sweep_interval_s,
        )

    def _chores_of_the_ledger(self) -> tuple[Callable[[], object], ...]:
        if self._ledger is None:
            return ()
        return (
            self._training.entries.retire,
            self._forget_strikes,
            self._snapshots.consider,
            lambda: self._journal.trim(self._futures),
            self._ledger.probe,
        )

    def _forget_strikes(self) -> None:
        if self._supervisor is not None:
            self._supervisor.forget_answered()

    async def close(self) -> None:
        """Take nothing more, let engines finish what they work on. What waits is failed, or with a ledger kept for the
        next server. Idempotent."""
        if self._state != "ready":
            self._state = "closed"
            return
        self._state = "closed"
        await self._health.close()
        await self._janitor.close()
        if self._ledger is None:
            self._session_life.end_all("the server was stopped")
        else:
            await self._pause()
        with contextlib.suppress(TimeoutError):  # the engines' close fails what is left
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._training.drain()
        await self._paging.close()
        await self._sampling.close()
        await self._jobs.close()
        await self._engines.close()
        await self._training.stop()
        self._training.close()
        self.num_left = self._futures.num_open if self.keeps_requests else 0
        self._futures.fail_all(ServerError("the server was stopped"))
        await self._training.flush_activity()
        await self._meter.flush()
        await self._close_stores()

    async def _pause(self) -> None:
        """Begin nothing more; what is in the ledger is done by the next server."""
        if self._supervisor is not None:
            await self._supervisor.close()
        self._hold()

    def _hold(self) -> None:
        for slot in self._engines:
            self._training.scheduler(slot).is_held = True
            slot.is_recovering = True
            slot.on_death = lambda slot: None

    def end_now(self) -> None:
        """Do not let engines finish: what they work on is kept by the ledger, or fails when `close` comes to it."""
        if self._supervisor is not None:
            self._supervisor.stop()
        self._hold()
        for slot in self._engines:
            slot.handle.kill()

    @property
    def keeps_requests(self) -> bool:
        """Whether the next server goes on with what waits."""
        return self._journal.is_on

    @property
    def is_ready(self) -> bool:
        return self.readiness_reason is None

    @property
    def readiness_reason(self) -> str | None:
        """Why requests cannot be served now; `None` if they can."""
        if self._state != "ready":
            return f"the server is {self._state}"
        for slot in self._engines:
            if slot.dead is not None:
                return f"the engine of {slot.card.name!r} died: {slot.dead}"
        return self._journal.fault or self._registry.fault or self._health.reason()

    def inspect(self) -> Inspection | None:
        """One look at everything in hand, for figures; `None` unless the server runs. Touches the disk."""
        if self._state != "ready":
            return None
        queued, running = self._futures.census()
        disk = self._health.disk
        return Inspection(
            reason=self.readiness_reason,
            queued=queued,
            running=running,
            futures_kept=self._futures.num_kept,
            futures_kept_bytes=self._futures.kept_bytes,
            models=model_states(self._training.models),
            adapters=adapter_places(self._training.models),
            num_sessions=len(self._sessions.live),
            ledger_lag_s=None if self._ledger is None else self._ledger.lag_s,
            ledger_bytes=0 if self._ledger is None else self._ledger.num_bytes,
            disk_free_bytes=disk.free_bytes,
            disk_fsync_s=disk.fsync_s,
            engines=engine_states(self._engines, self.paging_stats()),
        )

    def paging_stats(self) -> dict[str, PagingStats]:
        """How adapters come and go, by base model."""
        return self._paging.stats()

    @property
    def num_restarts(self) -> int:
        """How many servers were there before on this ledger; without one, nothing of theirs is live."""
        return 0 if self._ledger is None else self._ledger.num_opened - 1

    @property
    def fatal_reason(self) -> str | None:
        """Why nothing more can be written for good, if that is so."""
        return None if self._ledger is None else self._ledger.fatal

    def base_models(self) -> list[BaseModelCard]:
        return [slot.card for slot in self._engines]

    async def sweep(self) -> None:
        """Do the janitor's chores now: end and remove whatever has run out of time."""
        await self._janitor.sweep()

    def _check_engines(self) -> None:
        for slot in self._engines:
            slot.check_alive()

    def _engine_died(self, slot: EngineSlot) -> None:
        error = slot.dead or EngineDied(f"the engine of {slot.card.name!r} is gone")
        if self._supervisor is not None and self._supervisor.engine_died(slot, error):
            return
        self._training.engine_died(slot, error)
        self._sampling.engine_died(slot, error)
        self._paging.engine_died(slot)

    # ---- accounts ----

    def administration(self, caller: Caller) -> Administration:
        """As done by `caller`."""
        return Administration(self._registry, self._clock, self.accounts, self._meter, caller)

    def own_key(self, caller: Caller) -> OwnKey:
        """Raises `Unsupported` on a server without keys."""
        if caller.key_id is None:
            raise Unsupported(
                "this server has no keys, so there is none to revoke; any key is accepted on this machine"
            )
        return OwnKey(self.accounts, self.administration(caller), caller.key_id)

    # ---- sessions ----

    async def create_session(self, request: NewSession) -> str:
        """Durable when it returns. Raises `Overloaded` if too many are live."""
        return await self._session_life.create(request)

    def heartbeat(self, session_id: str) -> None:
        """Raises `SessionEnded` with the reason, `NotFound` if there never was such a session."""
        self._session_life.heartbeat(session_id)

    async def finish_session(self, session_id: str, reason: FinishReason, detail: str | None) -> None:
        """Take no more requests; what waits is still done. The first reason stays. Raises `NotFound`."""
        await self._session_life.finish(session_id, reason, detail)

    # ---- models and training ----

    async def create_model(self, request: CreateModel, *, context: Any = None) -> Submission:
        """`context` comes back with the future's outcome, here and below."""
        return self._training.create(request, context)

    async def create_model_from_checkpoint(self, request: CreateModelFromCheckpoint) -> Submission:
        """The future's request type is `LoadWeights`, as the client that created it so expects."""
        return await self._training.create_from_checkpoint(request)

    def create_custom_loss(self, request: CreateCustomLoss, fingerprint: bytes) -> Submission:
        """Keep a loss for the life of its session; the future's result is its id."""
        return self._custom_losses.create(request, fingerprint)

    def submit(self, request: ModelRequest, fingerprint: bytes, *, context: Any = None) -> Submission:
        """Queue in the model's order. `fingerprint` is a hash of the payload: the same again is the same request.

        A `seq_id` of `None` or below 1 takes the next number. Raises `Overloaded` if the model's queue is full.
        """
        return self._training.submit(request, fingerprint, context)

    def submit_deferred(self, model_id: str, recipe: Recipe, *, context: Any = None) -> Submission:
        """Take a training request's turn now and complete it later by a recipe that makes a `ForwardBackward`, and
        whose errors fail its future.

        Raises `Overloaded` if the model's queue is full.
        """
        return self._training.submit_deferred(model_id, recipe, context)

    def start_job(
        self,
        request_type: RequestType,
        recipe: Recipe,
        *,
        session_id: str,
        subject: str | None = None,
        context: Any = None,
    ) -> str:
        """A request id whose future ends as the recipe does: an answer put together from those of other requests."""
        return self._jobs.start(request_type, recipe, session_id=session_id, subject=subject, context=context)

    def model_info(self, model_id: str) -> GetInfoResponse:
        return self._training.info(model_id)

    # ---- sampling ----

    async def create_sampling_session(
        self, session_id: str, seq_id: int, base_model: str | None, model_path: str | None
    ) -> str:
        return await self._sampling_sessions.create(session_id, seq_id, base_model, model_path)

    def get_sampler(self, sampler_id: str) -> GetSamplerResponse:
        return self._sampling_sessions.describe(sampler_id)

    def sampler_digest(self, sampler_id: str) -> str | None:
        """Of the adapter that every sample of this sampler comes from; `None` for a base model. Raises `NotFound`."""
        return self._sampling_sessions.digest(sampler_id)

    def submit_sample(self, request: SampleRequest, fingerprint: bytes) -> Submission:
        """Raises `Overloaded` if too many samples wait; every other error travels through the future."""
        return self._sampling.submit(request, fingerprint)

    async def draw_samples(
        self, request: DrawSamples, on_token: Callable[[DrawnToken], None] | None = None
    ) -> SampleResponse:
        """Wait for a sample in place, told of its tokens as they are drawn; cancelling the wait stops the drawing.

        Raises `Overloaded` and every other error of a sample.
        """
        drawing = self._sampling.draw(request, on_token)
        return await observed_draw(self.observers, self._clock, request.sampling_session_id, drawing)

    def refuse(
        self,
        request_type: RequestType,
        error: TinsmithError,
        *,
        owner: str,
        context: Any = None,
    ) -> Submission:
        """A request of `owner` that fails at once, and asks nothing of anything."""
        return Submission(request_id=self._futures.failed(request_type, error, context, owner=owner))

    def cancel(self, request_id: str) -> None:
        self._sampling.cancel(request_id)

    # ---- futures ----

    async def durable(self, receipt: Submission) -> None:
        """Returns once the request would survive a power failure; tell nobody of it before.

        Raises `StorageError` if it could not be written, and was not taken.
        """
        await self._futures.durable(receipt.request_id)

    async def wait_future(self, request_id: str, timeout_s: float) -> Outcome | Pending:
        """Wait for at most `timeout_s`. Raises `FutureExpired`, or `NotFound` for an id that was never given out."""
        if (session_id := self._futures.session_of(request_id)) is not None:
            self._sessions.touch(session_id, self._clock.monotonic())
        return await self._futures.wait(request_id, timeout_s)

    async def completions(
        self, sampler_id: str, client: int, cursor: int, timeout_s: float
    ) -> tuple[list[Completion], int]:
        """Samples of one client of a sampler that ended after `cursor`, and the next cursor."""
        return await self._sampling.completions(sampler_id, client, cursor, timeout_s)

    def release_samples(self, sampler_id: str, client: int, request_ids: Sequence[str]) -> None:
        """The client has fetched these results; they are no longer kept."""
        self._sampling.release(sampler_id, client, request_ids)
