"""How the parts of control are put together: who is given whom, and who is told of what."""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import dataclass

from tinsmith.control import audit
from tinsmith.control.accounts import Accounts
from tinsmith.control.catalogue import Catalogue
from tinsmith.control.checkpoints import CheckpointStore
from tinsmith.control.completions import Completions
from tinsmith.control.copies import Copies
from tinsmith.control.custom_losses import CustomLosses
from tinsmith.control.engines import EngineBook
from tinsmith.control.exports import Exports
from tinsmith.control.fairness import Fairness
from tinsmith.control.folder_store import FolderStore
from tinsmith.control.futures import FutureStore, RequestSpan
from tinsmith.control.health import Health
from tinsmith.control.identity import Clock, Ids
from tinsmith.control.imports import Imports
from tinsmith.control.jobs import Jobs
from tinsmith.control.journal import Journal
from tinsmith.control.ledger import OnWritten
from tinsmith.control.library import Library
from tinsmith.control.observers import Observers, both
from tinsmith.control.owners import Owners
from tinsmith.control.paging import Paging
from tinsmith.control.quotas import Quotas
from tinsmith.control.recipes import Recipes
from tinsmith.control.refusals import Refusals
from tinsmith.control.registry import Registry
from tinsmith.control.result_store import ResultStore
from tinsmith.control.retention import Budget, Retention, checkpoints_in_use
from tinsmith.control.samplers import Sampler, SamplerBook
from tinsmith.control.sampling import Sampling
from tinsmith.control.sampling_sessions import SamplingSessions
from tinsmith.control.session_life import SessionLife
from tinsmith.control.sessions import SessionBook
from tinsmith.control.settings import ControlSettings
from tinsmith.control.snapshots import Snapshots
from tinsmith.control.traces import TraceLog
from tinsmith.control.training import Training
from tinsmith.control.usage import Meter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What the parts stand on; its stores are open and its engines run."""

    settings: ControlSettings
    clock: Clock
    ids: Ids
    engines: EngineBook
    registry: Registry
    folders: FolderStore
    results: ResultStore
    journal: Journal
    sessions: SessionBook
    accounts: Accounts
    observers: Observers
    recipes: Recipes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    futures: FutureStore
    health: Health
    meter: Meter
    checkpoints: CheckpointStore
    retention: Retention
    samplers: SamplerBook
    custom_losses: CustomLosses
    training: Training
    snapshots: Snapshots
    paging: Paging
    sampling_sessions: SamplingSessions
    sampling: Sampling
    session_life: SessionLife
    jobs: Jobs
    owners: Owners
    library: Library


def assemble(ground: Ground) -> Parts:
    settings, clock = ground.settings, ground.clock
    fairness = Fairness(ground.sessions, ground.accounts)
    quotas = Quotas(ground.sessions, ground.accounts, clock)
    traces = TraceLog()
    futures = _futures(ground, traces, quotas)
    meter = Meter(ground.registry, clock)
    meter.on_count = ground.observers.tokens
    checkpoints = CheckpointStore(
        registry=ground.registry,
        folders=ground.folders,
        ids=ground.ids,
        clock=clock,
        superseded_versions_kept=settings.superseded_versions_kept,
    )
    samplers = _samplers(ground)
    custom_losses = CustomLosses(
        sessions=ground.sessions,
        futures=futures,
        clock=clock,
        max_per_session=settings.max_custom_losses_per_session,
        journal=ground.journal,
    )
    training = Training(
        settings=settings,
        engines=ground.engines,
        sessions=ground.sessions,
        samplers=samplers,
        custom_losses=custom_losses,
        futures=futures,
        registry=ground.registry,
        checkpoints=checkpoints,
        clock=clock,
        ids=ground.ids,
        meter=meter,
        journal=ground.journal,
        fairness=fairness,
        quotas=quotas,
        recipes=ground.recipes,
    )
    snapshots = Snapshots(
        data_dir=settings.data_dir,
        training=training,
        samplers=samplers,
        journal=ground.journal,
        clock=clock,
        interval_s=settings.snapshot_interval_s,
        max_requests=settings.snapshot_requests,
        max_tokens=settings.snapshot_tokens,
    )
    paging = _paging(ground, training, futures, samplers, snapshots, fairness)
    sampling_sessions = SamplingSessions(
        engines=ground.engines,
        sessions=ground.sessions,
        samplers=samplers,
        registry=ground.registry,
        checkpoints=checkpoints,
        journal=ground.journal,
        clock=clock,
    )
    sampling = _sampling(ground, sampling_sessions, futures, samplers, checkpoints, meter, fairness, quotas)
    return Parts(
        futures=futures,
        health=Health(engines=ground.engines, settings=settings.health, data_dir=settings.data_dir, clock=clock),
        meter=meter,
        checkpoints=checkpoints,
        retention=_retention(ground, checkpoints, samplers, training),
        samplers=samplers,
        custom_losses=custom_losses,
        training=training,
        snapshots=snapshots,
        paging=paging,
        sampling_sessions=sampling_sessions,
        sampling=sampling,
        session_life=SessionLife(
            settings=settings,
            sessions=ground.sessions,
            registry=ground.registry,
            journal=ground.journal,
            training=training,
            sampling=sampling,
            samplers=samplers,
            clock=clock,
            ids=ground.ids,
        ),
        jobs=Jobs(futures, ground.journal, ground.recipes),
        owners=Owners(ground.sessions, futures, ground.registry),
        library=_library(ground, futures, checkpoints, training, traces, meter),
    )


def _futures(ground: Ground, traces: TraceLog, quotas: Quotas) -> FutureStore:
    settings, clock, journal = ground.settings, ground.clock, ground.journal
    futures = FutureStore(
        ids=ground.ids,
        clock=clock,
        ttl_s=settings.future_ttl_s,
        max_retained=settings.max_retained_futures,
        max_retained_bytes=settings.max_retained_bytes,
        store=ground.results if settings.max_stored_bytes > 0 else None,
    )

    def request_ended(span: RequestSpan) -> None:
        ground.observers.request_ended(span)
        quotas.sample_ended(span.request_id)

    def keep_failure(request_id: str, written: OnWritten) -> None:
        if (ended := futures.ended(request_id)) is not None:
            journal.keep_result(request_id, ended, written, clock.time())

    futures.on_open = ground.observers.request_opened
    futures.on_finish = both(traces.add, request_ended)
    if journal.is_on:
        futures.keep_failure = keep_failure
        # cursors that clients have from an earlier server lie before all that this one gives out
        futures.completions = Completions(first=lambda: int(clock.time() * 1000))
    return futures


def _samplers(ground: Ground) -> SamplerBook:
    settings, clock = ground.settings, ground.clock
    samplers = SamplerBook(
        ephemeral_per_session=settings.ephemeral_samplers_per_session,
        max_loaded=settings.max_loaded_checkpoints,
        clock=clock,
    )

    def note_expired(sampler: Sampler, reason: str) -> None:
        logger.info("sampler %s %s", sampler.sampler_id, reason)
        details = {"session_id": sampler.session_id, "sampler_id": sampler.sampler_id, "reason": reason}
        at = clock.time()
        ground.registry.post(lambda c: audit.note(c, "sampler_expire", at, sampler.owner, **details))

    samplers.on_expired = note_expired
    return samplers


def _retention(ground: Ground, checkpoints: CheckpointStore, samplers: SamplerBook, training: Training) -> Retention:
    def in_use() -> Set[str]:
        live = {session.session_id for session in ground.sessions.live}
        return checkpoints_in_use(list(samplers), training.models, live.__contains__)

    retention = Retention(
        registry=ground.registry,
        checkpoints=checkpoints,
        clock=ground.clock,
        keep=ground.settings.keep_checkpoints,
        in_use=in_use,
    )
    checkpoints.in_use = in_use
    checkpoints.on_saved = retention.saved
    checkpoints.make_room = Budget(
        max_bytes=ground.settings.checkpoint_bytes_max, quotas=ground.accounts, in_use=in_use
    ).make_room
    return retention


def _paging(
    ground: Ground,
    training: Training,
    futures: FutureStore,
    samplers: SamplerBook,
    snapshots: Snapshots,
    fairness: Fairness,
) -> Paging:
    return Paging(
        ground.engines,
        data_dir=ground.settings.data_dir,
        training=training,
        samplers=samplers,
        snapshots=snapshots,
        refusals=Refusals(
            training=training,
            futures=futures,
            journal=ground.journal,
            registry=ground.registry,
            samplers=samplers,
        ),
        fairness=fairness,
        clock=ground.clock,
    )


def _sampling(
    ground: Ground,
    sampling_sessions: SamplingSessions,
    futures: FutureStore,
    samplers: SamplerBook,
    checkpoints: CheckpointStore,
    meter: Meter,
    fairness: Fairness,
    quotas: Quotas,
) -> Sampling:
    return Sampling(
        sampling_sessions=sampling_sessions,
        sessions=ground.sessions,
        samplers=samplers,
        futures=futures,
        checkpoints=checkpoints,
        clock=ground.clock,
        ids=ground.ids,
        meter=meter,
        journal=ground.journal,
        fairness=fairness,
        quotas=quotas,
        max_pending=ground.settings.max_pending_samples,
        data_dir=ground.settings.data_dir,
    )


def _library(
    ground: Ground,
    futures: FutureStore,
    checkpoints: CheckpointStore,
    training: Training,
    traces: TraceLog,
    meter: Meter,
) -> Library:
    registry, engines, ids, clock = ground.registry, ground.engines, ground.ids, ground.clock
    return Library(
        registry=registry,
        sessions=ground.sessions,
        futures=futures,
        catalogue=Catalogue(registry=registry, checkpoints=checkpoints, training=training, clock=clock),
        checkpoints=checkpoints,
        copies=Copies(registry=registry, checkpoints=checkpoints, ids=ids, clock=clock),
        imports=Imports(
            registry=registry,
            checkpoints=checkpoints,
            engines=engines,
            ids=ids,
            clock=clock,
            folder=ground.settings.data_dir / "uploads",
            max_bytes=ground.settings.max_adapter_bytes,
        ),
        exports=Exports(checkpoints=checkpoints, engines=engines, ids=ids, clock=clock),
        traces=traces,
        meter=meter,
        clock=clock,
    )
