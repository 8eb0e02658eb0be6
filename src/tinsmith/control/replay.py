"""Going on after a crash: what the ledger holds becomes live again.

After a crash of the server everything is made anew from the ledger; after a crash of an engine the models and samplers
that it had. Either way a model goes on from its newest snapshot, and the requests after it are done in their order,
under their own ids: a future that has its result already keeps it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinsmith.control import records
from tinsmith.control.admission import num_train_tokens
from tinsmith.control.checkpoints import CheckpointStore
from tinsmith.control.custom_losses import CustomLosses
from tinsmith.control.engines import EngineBook, EngineSlot
from tinsmith.control.errors import ModelEnded, SessionEnded, creation_failed
from tinsmith.control.execution import sampler_name
from tinsmith.control.futures import FutureStore
from tinsmith.control.identity import Clock
from tinsmith.control.jobs import Jobs
from tinsmith.control.journal import (
    OUTLIVE_FINISHED_SESSIONS,
    Journal,
    ModelRecord,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SnapshotRecord,
    WeightsRecord,
)
from tinsmith.control.ledger import Entry, Ledger, remove
from tinsmith.control.memos import KIND, Memos
from tinsmith.control.models import Creation, Model, ModelStatus, Residence, Work
from tinsmith.control.paging import Paging
from tinsmith.control.queues import ModelQueue
from tinsmith.control.records import CheckpointRow, SessionRow
from tinsmith.control.registry import Registry
from tinsmith.control.requests import Deferred, Rejected, SaveForSampler
from tinsmith.control.samplers import Sampler, SamplerBook, checkpoint_snapshot_id
from tinsmith.control.sampling import Sampling
from tinsmith.control.sampling_sessions import SamplingSessions
from tinsmith.control.sessions import FINISH_REASONS, Session, SessionBook
from tinsmith.control.settings import ControlSettings
from tinsmith.control.strikes import Strikes
from tinsmith.control.training import Training
from tinsmith.types.crash_points import crash_point
from tinsmith.types.errors import EngineDied, InvalidInput, NotFound, TinsmithError
from tinsmith.types.operations import LoraSpec
from tinsmith.types.rest import LoadWeightsResponse

logger = logging.getLogger(__name__)

_MODEL_KINDS = "('request', 'binding')"


@dataclass(slots=True)
class _Recalled:
    """Entries by kind; those of models by model."""

    sessions: list[Entry] = field(default_factory=list)
    strikes: list[Entry] = field(default_factory=list)
    losses: list[Entry] = field(default_factory=list)
    samplers: list[Entry] = field(default_factory=list)
    weights: list[Entry] = field(default_factory=list)
    models: list[Entry] = field(default_factory=list)
    samples: list[Entry] = field(default_factory=list)
    results: list[Entry] = field(default_factory=list)
    jobs: list[Entry] = field(default_factory=list)
    memos: list[Entry] = field(default_factory=list)
    snapshots: dict[str, SnapshotRecord] = field(default_factory=dict)
    requests: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    bindings: dict[str, str] = field(default_factory=dict)
    """Checkpoint ids by request."""
    failures: dict[str, TinsmithError] = field(default_factory=dict)
    """Of requests that are not done again, by request."""

    def fail(self, failures: Mapping[str, TinsmithError]) -> None:
        self.failures.update(failures)
        for entries in (self.samples, *self.requests.values()):
            entries[:] = [replace(entry, failure=failures.get(entry.name, entry.failure)) for entry in entries]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> _Recalled:
        recalled = cls()
        lists = {
            "session": recalled.sessions,
            "strike": recalled.strikes,
            "loss": recalled.losses,
            "sampler": recalled.samplers,
            "weights": recalled.weights,
            "model": recalled.models,
            "sample": recalled.samples,
            "result": recalled.results,
            "job": recalled.jobs,
            KIND: recalled.memos,
        }
        for entry in entries:
            if entry.kind == "request" and entry.model_id is not None:
                recalled.requests[entry.model_id].append(entry)
            elif entry.kind == "binding":
                recalled.bindings[entry.name] = entry.value
            elif entry.kind == "snapshot":
                recalled.snapshots[entry.name] = entry.value
            else:
                lists[entry.kind].append(entry)
        return recalled


class Replay:
    def __init__(
        self,
        *,
        ledger: Ledger,
        journal: Journal,
        settings: ControlSettings,
        engines: EngineBook,
        sessions: SessionBook,
        samplers: SamplerBook,
        custom_losses: CustomLosses,
        training: Training,
        sampling_sessions: SamplingSessions,
        sampling: Sampling,
        futures: FutureStore,
        registry: Registry,
        checkpoints: CheckpointStore,
        strikes: Strikes,
        paging: Paging,
        jobs: Jobs,
        memos: Memos,
        clock: Clock,
    ) -> None:
        self._jobs = jobs
        self._memos = memos
        self._ledger = ledger
        self._journal = journal
        self._settings = settings
        self._engines = engines
        self._sessions = sessions
        self._samplers = samplers
        self._custom_losses = custom_losses
        self._training = training
        self._sampling_sessions = sampling_sessions
        self._sampling = sampling
        self._futures = futures
        self._registry = registry
        self._checkpoints = checkpoints
        self._strikes = strikes
        self._clock = clock
        self._paging = paging

    # ---- after a crash of the server ----

    async def restore(self) -> None:
        """Bring back the sessions that were live, with all they had. Raises `StorageError`."""
        entries = await asyncio.to_thread(self._ledger.read)
        live = await self._registry.read(records.live_session_ids)
        # in these sessions requests come from what a dialect remembers: one without a memo has nobody
        remembered = {entry.session_id for entry in entries if entry.kind == KIND}
        kept = {
            e.name
            for e in entries
            if e.kind == "session"
            and e.name in live
            and (e.name in remembered or not e.value.request.orders_by_arrival)
        }
        at = self._clock.time()
        await self._registry.write(lambda c: records.end_everything(c, at, "the server was restarted", but=kept))
        finished = await self._finished(e for e in entries if e.session_id not in kept)
        recalled = _Recalled.of(
            e
            for e in entries
            if e.session_id is None
            or e.session_id in kept
            or (e.session_id in finished and e.kind in OUTLIVE_FINISHED_SESSIONS)
        )
        rows = await self._rows(recalled)
        self._strikes.recall(recalled.strikes)
        recalled.fail(self._strikes.convict(self._settings.max_strikes))
        crash_point("replay.read")
        projects = await self._registry.read(records.projects_of_live_sessions)
        for entry in recalled.sessions:
            self._restore_session(entry, projects.get(entry.name))
        for row in finished.values():
            self._restore_finished(row)
        for entry in recalled.losses:
            self._custom_losses.restore(self._session(entry), entry.name, entry.value)
        for entry in recalled.results:
            self._restore_result(entry, at)
        for entry in (*recalled.samplers, *recalled.weights):
            self._restore_sampler(entry, rows)
        for entry in recalled.models:
            self._restore_model(entry, recalled, rows)
        for entry in recalled.samples:
            self._sampling.restore(entry.name, entry.value, entry.failure, is_suspect=entry.name in self._strikes)
        for entry in recalled.memos:
            self._memos.restore(entry)
        for entry in recalled.jobs:
            self._jobs.restore(entry)
        for session_id in {e.session_id for e in entries if e.session_id is not None} - kept:
            self._journal.end_session(session_id, drop=session_id not in finished)

    async def _finished(self, entries: Iterable[Entry]) -> dict[str, SessionRow]:
        """Sessions that their clients finished while something still waited in them, which is done nevertheless."""
        session_ids = {e.session_id for e in entries if e.kind == "model" and e.session_id is not None}
        rows = await self._registry.read(lambda c: [records.session(c, session_id) for session_id in session_ids])
        return {row.session_id: row for row in rows if row is not None and row.end_reason in FINISH_REASONS}

    async def _rows(self, recalled: _Recalled) -> dict[str, CheckpointRow]:
        """The checkpoints that models and samplers were made from."""
        wanted = {entry.value.checkpoint_id for entry in (*recalled.models, *recalled.samplers)} - {None}
        found = [await self._checkpoints.find_version(checkpoint_id) for checkpoint_id in wanted]
        return {row.checkpoint_id: row for row in found if row is not None}

    def _session(self, entry: Entry) -> Session:
        session = None if entry.session_id is None else self._sessions.find(entry.session_id)
        if session is None:
            raise AssertionError(f"the ledger has a {entry.kind} {entry.name!r} without its session")
        return session

    def _restore_session(self, entry: Entry, project_id: str | None) -> None:
        request = entry.value.request
        self._sessions.add(
            entry.name,
            self._clock.monotonic(),
            owner=request.owner,
            project_id=project_id,
            timeout_s=request.timeout_s,
            orders_by_arrival=request.orders_by_arrival,
        )

    def _restore_finished(self, row: SessionRow) -> None:
        session = self._sessions.add(
            row.session_id, self._clock.monotonic(), owner=row.owner, project_id=row.project_id
        )
        self._sessions.end(session, SessionEnded.because(row.session_id, row.end_reason, row.end_detail))

    def _restore_result(self, entry: Entry, at: float) -> None:
        record: ResultRecord = entry.value
        if at - record.finished_at >= self._settings.future_ttl_s:
            self._journal.note([remove("kind = 'result' AND name = ?", entry.name)])
            return
        self._futures.open(
            record.request_type,
            key=record.key,
            fingerprint=record.fingerprint,
            subject=record.subject,
            request_id=entry.name,
            group=None if record.group is None else (record.group[0], record.group[1]),
            owner=record.owner,
            context=record.context,
        )
        self._journal.lone.add(entry.name)
        failure = record.result if isinstance(record.result, TinsmithError) else entry.failure
        if failure is not None:
            self._futures.fail(entry.name, failure)
        else:
            self._futures.resolve(entry.name, record.result)

    def _slot(self, base_model: str) -> EngineSlot | None:
        try:
            return self._engines.resolve(base_model)
        except (NotFound, EngineDied):
            return None

    def _restore_sampler(self, entry: Entry, rows: Mapping[str, CheckpointRow]) -> None:
        record: SamplerRecord | WeightsRecord = entry.value
        session, slot = self._session(entry), self._slot(record.base_model)
        if slot is None:
            logger.warning("sampler %r is lost: %r is not served any more", entry.name, record.base_model)
            return
        if isinstance(record, WeightsRecord):
            sampler = Sampler(
                sampler_id=entry.name,
                session_id=session.session_id,
                owner=session.owner,
                slot=slot,
                snapshot_id=record.snapshot_id,
                inflight_of=record.inflight_of,
                model_id=record.model_id,
                model_path=record.model_path,
                digest=record.digest,
                origin=record.origin,
                weights_folder=record.folder,
                num_bytes=record.num_bytes,
            )
            self._samplers.add_restored(sampler)
            session.sampler_ids.append(sampler.sampler_id)
            return
        row = None if record.checkpoint_id is None else rows.get(record.checkpoint_id)
        sampler = Sampler(
            sampler_id=entry.name,
            session_id=session.session_id,
            owner=session.owner,
            slot=slot,
            snapshot_id=None if row is None else checkpoint_snapshot_id(row),
            checkpoint=row,
            model_path=record.bound_to[1],
            digest=record.digest,
        )
        self._sampling_sessions.restore(session, sampler, record)

    def _restore_model(self, entry: Entry, recalled: _Recalled, rows: Mapping[str, CheckpointRow]) -> None:
        record: ModelRecord = entry.value
        session, slot = self._session(entry), self._slot(record.base_model)
        snapshot = recalled.snapshots.get(entry.name)
        model = Model(
            model_id=entry.name,
            session_id=session.session_id,
            owner=session.owner,
            slot=slot,
            user_metadata=record.user_metadata,
            orders_by_arrival=session.orders_by_arrival,
            queue=ModelQueue(first_seq=0 if snapshot is None else snapshot.next_seq),
            creation=Creation(
                lora=record.lora,
                checkpoint=None if record.checkpoint_id is None else rows.get(record.checkpoint_id),
                optimizer=record.optimizer,
            ),
            creation_request_id=record.request_id,
            snapshot=snapshot,
            snapshot_at=self._clock.monotonic(),
        )
        session.model_ids.append(model.model_id)
        self._open_creation(model, record)
        if slot is None:
            model.status = ModelStatus.ENDED
            model.end = ModelEnded(f"model {model.model_id!r} ended: {record.base_model!r} is not served any more")
        elif (deadly := recalled.failures.get(record.request_id)) is not None:
            model.status, model.end = ModelStatus.ENDED, creation_failed(model.model_id, deadly)
            self._futures.fail(record.request_id, deadly)
            self._training.entries.note_ended(model)
        self._training.adopt(model)
        for request in recalled.requests[model.model_id]:
            self._open_request(model, request)
        if model.end is None:
            self._resume(model, recalled.requests[model.model_id], recalled.bindings)
            if session.ended is not None:
                model.status = ModelStatus.CLOSING

    def _open_creation(self, model: Model, record: ModelRecord) -> None:
        if self._futures.knows(record.request_id):
            return
        self._futures.open(
            record.request_type,
            key=("model", model.model_id),
            fingerprint=record.fingerprint,
            session_id=model.session_id,
            subject=model.model_id,
            on_poll=model.pending,
            request_id=record.request_id,
            context=record.context,
        )
        if model.snapshot is None:
            model.journaled[0] = record.request_id

    def _open_request(self, model: Model, entry: Entry) -> None:
        record: RequestRecord = entry.value
        if record.request is None or entry.seq is None:
            return
        self._futures.open(
            record.request_type,
            key=("seq", model.model_id, entry.seq),
            fingerprint=record.fingerprint,
            session_id=model.session_id,
            subject=model.model_id,
            on_poll=model.pending,
            request_id=entry.name,
            context=record.context,
        )
        model.journaled[entry.seq] = entry.name
        error = entry.failure or model.end
        if error is not None:
            self._futures.fail(entry.name, error)

    # ---- after a crash of an engine ----

    async def read_models(self) -> _Recalled:
        """What was asked of all models. Everything that was told to be on disk is among it."""
        await self._ledger.flush()
        entries = await asyncio.to_thread(self._ledger.read, f"model_id IS NOT NULL AND kind IN {_MODEL_KINDS}")
        return _Recalled.of(entries)

    def revive(self, slot: EngineSlot, recalled: _Recalled) -> None:
        """Give an engine that was started again what it had, and its work; all before the next await.

        Models with a snapshot, and samplers put aside, are loaded when they are used.
        """
        slot.revive()
        self._samplers.engine_revived(slot)
        self._paging.engine_revived(slot)
        for model in self._training.models:
            if model.slot is not slot or model.status is ModelStatus.ENDED:
                continue
            taken_before = model.queue.next_seq
            if model.status is ModelStatus.LIVE:
                model.status = ModelStatus.CREATING
            again = [e for e in recalled.requests[model.model_id] if e.seq is not None and e.seq < taken_before]
            self._resume(model, again, recalled.bindings, is_paid=True)
        self._training.scheduler(slot).wake()

    # ---- both ----

    def _resume(
        self, model: Model, requests: Sequence[Entry], bindings: Mapping[str, str], *, is_paid: bool = False
    ) -> None:
        """Go on from its snapshot, or make it again, and do what came after."""
        model.residence, model.behind_barrier = Residence.ABSENT, False
        works = self._works(model, requests, bindings)
        for work in works.values():
            work.is_paid = is_paid
            self._expect_sampler(model, work)
        creation = model.creation
        if model.snapshot is None and creation is not None:
            works[0] = Work(model.creation_request_id, creation)
        self._training.requeue(model, works)
        if model.snapshot is not None:
            self._stand_at(model, model.snapshot)
        if model.slot is not None:
            self._training.scheduler(model.slot).wake()

    def _works(self, model: Model, requests: Sequence[Entry], bindings: Mapping[str, str]) -> dict[int, Work]:
        if model.slot is None:
            raise AssertionError(f"model {model.model_id!r} has no engine")
        works: dict[int, Work] = {}
        for entry in requests:
            record: RequestRecord = entry.value
            if entry.seq is None or entry.seq < model.first_seq or record.request is None:
                continue
            if isinstance(record.request, Deferred):
                works[entry.seq] = Work(entry.name, record.request, is_void=entry.failure is not None)
                continue
            request = self._custom_losses.attach(record.request, model.session_id)
            works[entry.seq] = Work(
                entry.name,
                request,
                num_train_tokens(request, model.slot.card),
                is_void=entry.failure is not None,
                binding=bindings.get(entry.name),
            )
        for entry in requests:
            if entry.seq is not None and entry.value.request is None:
                for seq in range(max(entry.seq, model.first_seq), entry.value.last_seq + 1):
                    works.setdefault(seq, _never_came(model.model_id, seq))
        return works

    def _expect_sampler(self, model: Model, work: Work) -> None:
        """Its samples wait until it is published again."""
        operation = work.operation
        if work.is_void or not isinstance(operation, SaveForSampler) or operation.sampling_session_seq_id is None:
            return
        sampler_id = sampler_name(model.session_id, operation.sampling_session_seq_id)
        known = self._samplers.get(sampler_id)
        if known is None or (known.origin == work.request_id and known.weights_folder is None):
            self._samplers.expect(sampler_id, model.model_id, is_inflight=operation.kind == "inflight")

    def _stand_at(self, model: Model, snapshot: SnapshotRecord) -> None:
        """It is what it was then; its adapter stays on disk until it is used."""
        model.metrics.update(snapshot.metrics)
        model.parent = snapshot.parent
        model.lora = snapshot.lora or model.lora or _lora_of(model)
        self._futures.resolve(model.creation_request_id, self._created(model))
        if model.status is ModelStatus.CREATING:
            model.status = ModelStatus.LIVE

    def _created(self, model: Model) -> Any:
        checkpoint = None if model.creation is None else model.creation.checkpoint
        if checkpoint is None:
            return model.model_id
        return LoadWeightsResponse(path=checkpoint.path, model_id=model.model_id)


def _lora_of(model: Model) -> LoraSpec | None:
    """As it was made."""
    if model.creation is None or model.creation.checkpoint is None:
        return None if model.creation is None else model.creation.lora
    return LoraSpec(**model.creation.checkpoint.lora)


def _never_came(model_id: str, seq: int) -> Work:
    error = InvalidInput(f"request seq {seq} of model {model_id!r} never came")
    return Work("", Rejected(model_id=model_id, seq_id=seq, error=error), is_void=True)
