"""Models and their requests: creation, admission to the queue, and every way a model can end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import sqlalchemy as sa

from tinsmith.control import records
from tinsmith.control.admission import check_load, num_train_tokens
from tinsmith.control.checkpoints import CheckpointStore, check_loadable
from tinsmith.control.custom_losses import CustomLosses
from tinsmith.control.engines import EngineBook, EngineSlot
from tinsmith.control.errors import ModelEnded, QuotaExceeded
from tinsmith.control.execution import Executor, check_base_model, drop_adapter
from tinsmith.control.fairness import Fairness
from tinsmith.control.futures import FutureStore, RequestType
from tinsmith.control.identity import Clock, Ids
from tinsmith.control.journal import Journal
from tinsmith.control.metadata import check_run_metadata
from tinsmith.control.model_entries import ModelEntries
from tinsmith.control.models import REQUEST_TYPES, Creation, Model, ModelStatus, Work, slot_of
from tinsmith.control.quotas import Quotas
from tinsmith.control.recipes import Recipes
from tinsmith.control.records import CheckpointRow
from tinsmith.control.registry import Registry
from tinsmith.control.request_checks import RequestChecks
from tinsmith.control.requests import (
    CreateModel,
    CreateModelFromCheckpoint,
    Deferred,
    ForwardBackward,
    LoadState,
    ModelRequest,
    Recipe,
    Submission,
)
from tinsmith.control.samplers import SamplerBook
from tinsmith.control.scheduler import OnAnswered, Scheduler, Turn
from tinsmith.control.sessions import Session, SessionBook
from tinsmith.control.settings import ControlSettings
from tinsmith.control.usage import Meter
from tinsmith.control.validation import check_optimizer_type, lora_spec
from tinsmith.types.errors import (
    AlreadyExists,
    EngineDied,
    InvalidInput,
    NotFound,
    Overloaded,
    TinsmithError,
    UserError,
)
from tinsmith.types.rest import GetInfoResponse, ModelData


class SeqGap(UserError):
    """An earlier request of the model never came."""


class Training:
    def __init__(
        self,
        *,
        settings: ControlSettings,
        engines: EngineBook,
        sessions: SessionBook,
        samplers: SamplerBook,
        custom_losses: CustomLosses,
        futures: FutureStore,
        registry: Registry,
        checkpoints: CheckpointStore,
        clock: Clock,
        ids: Ids,
        meter: Meter,
        journal: Journal,
        fairness: Fairness,
        quotas: Quotas,
        recipes: Recipes,
    ) -> None:
        self._quotas = quotas
        self._recipes = recipes
        self._settings = settings
        self._meter = meter
        self._journal = journal
        self._samplers = samplers
        self._engines = engines
        self._sessions = sessions
        self._custom_losses = custom_losses
        self._futures = futures
        self._registry = registry
        self._checkpoints = checkpoints
        self._clock = clock
        self._ids = ids
        self._models: dict[str, Model] = {}
        self.entries = ModelEntries(journal, futures, clock, wake=self._wake)
        self._checks = RequestChecks(futures, journal, wake=self._wake)
        self._executor = Executor(
            futures=futures,
            registry=registry,
            checkpoints=checkpoints,
            samplers=samplers,
            sessions=sessions,
            clock=clock,
            journal=journal,
            end_model=self.end_model,
        )
        self._schedulers = {
            slot: Scheduler(
                slot,
                self._execute,
                clock=clock,
                max_batch_tokens=settings.max_batch_tokens,
                payer_of=lambda model: fairness.payer(model.session_id, model.model_id),
                quotas=quotas,
            )
            for slot in engines
        }

    async def _execute(self, turn: Turn, on_answered: OnAnswered) -> None:
        """Do a turn, and note what it used."""
        for _, work in turn:
            self._futures.start(work.request_id)

        def answered(model: Model, work: Work) -> None:
            if self._futures.has_succeeded(work.request_id) and self._meter.is_first(work.request_id):
                slot_of(model).num_results += 1
                self._note_use(model, work)
            on_answered(model, work)

        await self._executor.execute(turn, answered)

    def _note_use(self, model: Model, work: Work) -> None:
        self._meter.count("training", model.session_id, slot_of(model).card.name, work.num_tokens)
        match work.operation:
            case Creation(checkpoint=CheckpointRow() as row):
                self._checkpoints.note_read(row.path, "load_weights", model.owner)
            case LoadState(path=path):
                self._checkpoints.note_read(path, "load_weights", model.owner)

    # ---- creation ----

    def create(self, request: CreateModel, context: Any = None) -> Submission:
        def plan() -> tuple[EngineSlot, Creation]:
            slot = self._engines.resolve(request.base_model)
            check_optimizer_type(request.optimizer_type)
            check_run_metadata(request.user_metadata)
            lora = lora_spec(request.lora_config, request.alpha, slot.card, self._ids.seed)
            return slot, Creation(lora=lora)

        return self._admit_model(request, "CreateModel", plan, context)

    async def create_from_checkpoint(self, request: CreateModelFromCheckpoint) -> Submission:
        found: CheckpointRow | TinsmithError
        try:
            check_load(request.path, optimizer=request.optimizer)
            owner = self._sessions.get_live(request.session_id).owner
            found = await self._checkpoints.find(request.path, reader=owner)
        except TinsmithError as error:
            found = error

        def plan() -> tuple[EngineSlot, Creation]:
            if isinstance(found, TinsmithError):
                raise found
            check_optimizer_type(request.optimizer_type)
            check_run_metadata(request.user_metadata)
            check_loadable(found, optimizer=request.optimizer)
            slot = self._engines.resolve(request.base_model or found.base_model)
            check_base_model(found, slot)
            return slot, Creation(checkpoint=found, optimizer=request.optimizer)

        return self._admit_model(request, "LoadWeights", plan)

    def _admit_model(
        self,
        request: CreateModel | CreateModelFromCheckpoint,
        request_type: RequestType,
        plan: Callable[[], tuple[EngineSlot, Creation]],
        context: Any = None,
    ) -> Submission:
        """Idempotent on (session, model_seq_id). A model whose plan fails is remembered as ended.

        Raises `QuotaExceeded`.
        """
        session_id, model_seq_id = request.session_id, request.model_seq_id
        model_id = f"{session_id}:train:{model_seq_id}"
        key, fingerprint = ("model", model_id), hashlib.sha256(repr(request).encode()).digest()
        try:
            known = self._futures.claim(key, fingerprint, f"model_seq_id {model_seq_id} of session {session_id!r}")
            if known is not None:
                return Submission(request_id=known, model_id=model_id)
            session = self._sessions.get_live(session_id)
            self._check_new_model(model_id, model_seq_id)
            live = [m.session_id for m in self._models.values() if m.status is not ModelStatus.ENDED]
            self._quotas.check_model(session_id, live)
        except QuotaExceeded:
            raise
        except TinsmithError as error:
            failed = self._futures.failed(request_type, error, context, subject=model_id)
            return Submission(request_id=failed, model_id=model_id)
        session.last_seen = self._clock.monotonic()
        session.model_ids.append(model_id)
        model = Model(
            model_id=model_id,
            session_id=session_id,
            owner=session.owner,
            slot=None,
            user_metadata=request.user_metadata,
            orders_by_arrival=session.orders_by_arrival,
        )
        self._models[model_id] = model
        request_id = self._futures.open(
            request_type,
            key=key,
            fingerprint=fingerprint,
            session_id=session_id,
            subject=model_id,
            context=context,
            on_poll=model.pending,
            is_durable=not self._journal.is_on,
        )
        model.creation_request_id = request_id
        try:
            slot, creation = plan()
        except TinsmithError as error:
            model.status = ModelStatus.ENDED
            model.end = ModelEnded(f"model {model_id!r} could not be created: {error}")
            self._futures.fail(request_id, error)
            self.entries.put_failure(request_id)
            return Submission(request_id=request_id, model_id=model_id)
        model.slot, model.creation = slot, creation
        work = Work(request_id, creation, is_durable=False)
        model.queue.push(0, work, self._clock.monotonic())
        self._schedulers[slot].add(model)
        self.entries.put_model(model, work, request_type, fingerprint, undo=partial(self._undo_creation, model))
        return Submission(request_id=request_id, model_id=model_id)

    def _undo_creation(self, model: Model) -> None:
        self._schedulers[slot_of(model)].remove(model)
        self._models.pop(model.model_id, None)
        session = self._sessions.find(model.session_id)
        if session is not None and model.model_id in session.model_ids:
            session.model_ids.remove(model.model_id)

    def _check_new_model(self, model_id: str, model_seq_id: int) -> None:
        if model_seq_id < 0:
            raise InvalidInput(f"model_seq_id must be at least 0, not {model_seq_id!r}")
        if model_id in self._models:
            raise AlreadyExists(f"model {model_id!r} exists; take the next model_seq_id")
        live = sum(model.status is not ModelStatus.ENDED for model in self._models.values())
        if live >= self._settings.max_live_models:
            raise Overloaded(
                f"{live} models are live, the most this server keeps; finish a session or unload a model, or try again "
                "when others have"
            )

    # ---- requests ----

    def submit(self, request: ModelRequest, fingerprint: bytes, context: Any = None) -> Submission:
        """Raises `Overloaded` if the model's queue is full; every other error travels through the future."""
        request_type, model_id = REQUEST_TYPES[type(request)], request.model_id
        model = self._models.get(model_id)
        if model is None:
            failed = self._futures.failed(request_type, self._unknown(model_id), context, subject=model_id)
            return Submission(request_id=failed, model_id=model_id)
        is_numbered = request.seq_id is not None and request.seq_id > 0
        seq = request.seq_id if is_numbered and request.seq_id is not None else model.queue.free_seq
        key = ("seq", model_id, seq)
        try:
            known = self._futures.claim(key, fingerprint, f"seq {seq} of model {model_id!r}") if is_numbered else None
            if known is not None:
                return Submission(request_id=known, model_id=model_id)
            _check_takes_requests(model)
            _check_order(model, seq if is_numbered else None)
            model.queue.check(seq)
        except TinsmithError as error:
            failed = self._futures.failed(request_type, error, context, subject=model_id)
            return Submission(request_id=failed, model_id=model_id)
        num_tokens = num_train_tokens(request, slot_of(model).card)
        self._check_room(model, seq, num_tokens)
        asked, request = request, self._custom_losses.attach(request, model.session_id)
        request_id = self._futures.open(
            request_type,
            key=key,
            fingerprint=fingerprint,
            on_poll=model.pending,
            session_id=model.session_id,
            subject=model_id,
            context=context,
            is_durable=not self._journal.is_on,
        )
        work = Work(request_id, request, num_tokens)
        self._enqueue(model, seq, work)
        self._put_request(model, seq, work, asked, fingerprint)
        self._checks.check(model, work, request)
        return Submission(request_id=request_id, model_id=model_id)

    def _enqueue(self, model: Model, seq: int, work: Work) -> None:
        model.queue.push(seq, work, self._clock.monotonic())
        model.pending_tokens += work.num_tokens
        model.last_request_at, model.is_dirty = self._clock.time(), True
        self._sessions.touch(model.session_id, self._clock.monotonic())

    def _put_request(self, model: Model, seq: int, work: Work, asked: ModelRequest, fingerprint: bytes) -> None:
        self.entries.put_request(model, seq, work, asked, fingerprint, undo=partial(self._withdraw, model, seq, work))

    def _withdraw(self, model: Model, seq: int, work: Work) -> None:
        model.journaled.pop(seq, None)
        if model.status is not ModelStatus.ENDED:
            model.queue.withdraw(seq, self._clock.monotonic())
            model.pending_tokens -= work.num_tokens

    def submit_deferred(self, model_id: str, recipe: Recipe, context: Any = None) -> Submission:
        """Give the next number to a training request that the recipe will complete; what comes later waits behind it.

        What the recipe raises fails the request's future. Raises `Overloaded` if the model's queue is full.
        """
        model = self._models.get(model_id)
        try:
            if model is None:
                raise self._unknown(model_id)
            _check_takes_requests(model)
        except TinsmithError as error:
            failed = self._futures.failed("ForwardBackward", error, context, subject=model_id)
            return Submission(request_id=failed, model_id=model_id)
        seq = model.queue.free_seq
        self._check_room(model, seq, 0)
        request_id = self._futures.open(
            "ForwardBackward",
            on_poll=model.pending,
            session_id=model.session_id,
            subject=model_id,
            context=context,
            is_durable=not self._journal.is_on,
        )
        deferred = Deferred(model_id=model_id, recipe=recipe)
        work = Work(request_id, deferred, is_checked=False)
        self._enqueue(model, seq, work)
        undo, taken = partial(self._withdraw, model, seq, work), partial(self._complete, model, seq, work, recipe)
        self.entries.put_request(model, seq, work, deferred, b"", undo=undo, taken=taken)
        return Submission(request_id=request_id, model_id=model_id)

    def _complete(self, model: Model, seq: int, work: Work, recipe: Recipe) -> None:
        def completed(request: ForwardBackward) -> None:
            work.operation, work.num_tokens = request, num_train_tokens(request, slot_of(model).card)
            model.pending_tokens += work.num_tokens
            self.entries.note_completed(model, seq, work, request)

        work.is_checked = False
        self._checks.check_once_complete(model, work, partial(self._recipes.make, recipe), completed)

    def _check_room(self, model: Model, seq: int, num_tokens: int) -> None:
        """The request that others wait for is always let in: else a full queue could never empty."""
        if model.queue.fills_gap(seq) or not model.queue:
            return
        settings = self._settings
        if len(model.queue) >= settings.max_pending_per_model:
            raise Overloaded(
                f"{len(model.queue)} requests of model {model.model_id!r} are waiting, the most this server takes"
            )
        if model.pending_tokens + num_tokens > settings.max_pending_tokens_per_model:
            raise Overloaded(
                f"requests of {model.pending_tokens} tokens of model {model.model_id!r} are waiting; "
                f"this server takes at most {settings.max_pending_tokens_per_model}"
            )

    def _unknown(self, model_id: str) -> TinsmithError:
        try:
            run = self._registry.read_now(lambda c: records.run(c, model_id))
        except TinsmithError as error:
            return error
        if run is None:
            return NotFound(f"no model {model_id!r}")
        return ModelEnded(
            f"model {model_id!r} has ended; its checkpoints remain, and a new model can be created from them"
        )

    def info(self, model_id: str) -> GetInfoResponse:
        """Raises `NotFound`, or `ModelEnded` with the reason."""
        model = self._models.get(model_id)
        if model is None:
            raise self._unknown(model_id)
        if model.end is not None or model.slot is None:
            raise model.end or self._unknown(model_id)
        card = model.slot.card
        return GetInfoResponse(
            model_id=model_id,
            model_data=ModelData(arch=card.architecture, model_name=card.name, tokenizer_id=card.tokenizer_id),
            is_lora=True,
            lora_rank=None if model.lora is None else model.lora.rank,
            model_name=card.name,
            corrupted=model.is_corrupted or self._was_corrupted(model_id),
        )

    def _was_corrupted(self, model_id: str) -> bool:
        """As the registry knows, which outlives the server."""
        run = self._registry.read_now(lambda c: records.run(c, model_id))
        return run is not None and run.corrupted

    def is_corrupted(self, model_id: str) -> bool:
        """As this process knows; the registry may learn of it a moment later."""
        model = self._models.get(model_id)
        return model is not None and model.is_corrupted

    def last_request_at(self, model_id: str) -> float | None:
        model = self._models.get(model_id)
        return model.last_request_at if model is not None and model.is_dirty else None

    # ---- endings ----

    def end_model(self, model: Model, error: TinsmithError) -> None:
        """Fail what waits, forget the adapter. What an engine works on is answered by the engine. Idempotent."""
        if model.status is ModelStatus.ENDED:
            return
        model.status, model.end = ModelStatus.ENDED, error
        for work in model.queue.clear():
            self._futures.fail(work.request_id, error)
        model.pending_tokens = 0
        self._samplers.settle_all_of(model.model_id)
        self.entries.note_ended(model)
        if model.slot is not None:
            drop_adapter(model)
            self._schedulers[model.slot].remove(model)
        self._release_losses(self._sessions.find(model.session_id))
        at = self._clock.time()
        self._registry.post(lambda c: records.update_run(c, model.model_id, ended_at=at))

    def _release_losses(self, session: Session | None) -> None:
        """No request names them any more."""
        if session is not None and session.ended is not None and all(m.has_ended for m in self._of(session)):
            session.custom_losses.clear()

    def close_models(self, session: Session) -> None:
        """The session was finished: do what waits, then end its models."""
        for model in self._of(session):
            if model.status is not ModelStatus.ENDED:
                model.status = ModelStatus.CLOSING
        self.end_drained()
        self._release_losses(session)

    def drop_models(self, session: Session, error: TinsmithError) -> None:
        """The session is dead: nobody waits for what waits."""
        for model in self._of(session):
            self.end_model(model, error)
        self._release_losses(session)

    def end_drained(self) -> None:
        for model in self._models.values():
            if model.slot is not None and model.slot.is_recovering:
                continue  # what its engine worked on comes into its queue again
            if model.status is ModelStatus.CLOSING and model.is_drained:
                session = self._sessions.find(model.session_id)
                reason = session.ended if session is not None else None
                self.end_model(model, reason or ModelEnded(f"model {model.model_id!r} ended with its session"))

    def forget(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            for model_id in session.model_ids:
                self._models.pop(model_id, None)

    def give_up_gaps(self) -> None:
        if self._journal.fault is not None:  # what is missing may have been refused for want of room, and comes again
            for model in self._models.values():
                model.queue.wait_anew(self._clock.monotonic())
            return
        timeout_s = self._settings.seq_gap_timeout_s
        for model in self._models.values():
            gap = model.queue.give_up_gap(self._clock.monotonic(), timeout_s)
            if gap is None:
                continue
            error = SeqGap(
                f"request seq {gap.missing} of model {model.model_id!r} did not come within {timeout_s:g} s; "
                f"the requests after it were given up. The next seq is {model.queue.next_seq}"
            )
            for work in gap.items:
                model.pending_tokens -= work.num_tokens
                self._futures.fail(work.request_id, error)
            self.entries.note_gap(model, gap, error)

    # ---- going on after a crash ----

    @property
    def models(self) -> list[Model]:
        return list(self._models.values())

    def scheduler(self, slot: EngineSlot) -> Scheduler:
        return self._schedulers[slot]

    def adopt(self, model: Model) -> None:
        """A model that an earlier process had."""
        self._models[model.model_id] = model
        if model.status is not ModelStatus.ENDED:
            self._schedulers[slot_of(model)].add(model)

    def requeue(self, model: Model, works: Mapping[int, Work]) -> None:
        """Do these requests, from the model's first number on, again or for the first time."""
        model.queue.rewind(model.first_seq, works, self._clock.monotonic())
        for seq, work in works.items():
            model.pending_tokens += work.num_tokens
            if work.is_void or isinstance(work.operation, Creation):
                continue
            if isinstance(work.operation, Deferred):
                self._complete(model, seq, work, work.operation.recipe)
            else:
                self._checks.check(model, work, work.operation)

    def engine_died(self, slot: EngineSlot, error: EngineDied) -> None:
        for model in list(self._models.values()):
            if model.slot is slot:
                for request_id in tuple(model.running):
                    self._futures.fail(request_id, error)
                self.end_model(model, error)

    async def flush_activity(self) -> None:
        """Note in the registry when runs were last used."""
        dirty = [model for model in self._models.values() if model.is_dirty and model.lora is not None]
        moments = {model.model_id: model.last_request_at for model in dirty}

        def work(connection: sa.Connection) -> None:
            for run_id, at in moments.items():
                records.update_run(connection, run_id, last_request_at=at)

        if moments:
            await self._registry.write(work)
        for model in dirty:
            model.is_dirty = model.last_request_at != moments[model.model_id]

    async def drain(self) -> None:
        """Wait for what engines work on; the caller has ended all models."""
        for scheduler in self._schedulers.values():
            await scheduler.drain()
        await self._checks.drain()

    async def stop(self) -> None:
        """As `drain`, once the engines are closed; what is still being put together for a turn is left as it is."""
        await self._checks.stop()
        await self.drain()

    def close(self) -> None:
        self._checks.close()

    def _wake(self, model: Model) -> None:
        self._schedulers[slot_of(model)].wake()

    def _of(self, session: Session) -> list[Model]:
        return [self._models[model_id] for model_id in session.model_ids if model_id in self._models]


def _check_takes_requests(model: Model) -> None:
    if model.end is not None:
        raise model.end
    if not model.takes_requests:
        raise ModelEnded(f"model {model.model_id!r} takes no more requests: its session was finished")


def _check_order(model: Model, seq_id: int | None) -> None:
    if model.orders_by_arrival and seq_id is not None:
        raise InvalidInput(
            f"model {model.model_id!r} was made by add_lora and does its requests in the order of their arrival; a "
            f"request with seq_id {seq_id} cannot join them. Create a model of your own with create_model"
        )
