"""What happens when a request's turn has come: ask the engine, keep the records, answer the future."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from tinsmith.control import records
from tinsmith.control.checkpoints import CheckpointStore, SaveOrder, check_loadable
from tinsmith.control.engines import EngineSlot
from tinsmith.control.errors import ModelEnded
from tinsmith.control.futures import ExternalSaved, FutureStore, SamplerSaved
from tinsmith.control.identity import Clock
from tinsmith.control.journal import Journal
from tinsmith.control.ledger import Entry, put
from tinsmith.control.models import Creation, Model, ModelOperation, ModelStatus, Work, slot_of
from tinsmith.control.records import CheckpointRow, RunRow
from tinsmith.control.registry import RUNS, SAMPLERS, Registry
from tinsmith.control.requests import (
    ApplyOptimizer,
    Deferred,
    ForwardBackward,
    LoadState,
    Rejected,
    SaveExternal,
    SaveForSampler,
    SaveState,
    UnloadModel,
)
from tinsmith.control.samplers import Sampler, SamplerBook
from tinsmith.control.scheduler import OnAnswered, Turn
from tinsmith.control.sessions import SessionBook
from tinsmith.control.validation import check_adapter_memory
from tinsmith.types.errors import (
    AdapterCorrupted,
    EngineDied,
    InvalidInput,
    PayloadConflict,
    ServerError,
    TinsmithError,
)
from tinsmith.types.operations import (
    CreateAdapter,
    DropAdapter,
    LoadAdapter,
    LoraSpec,
    OptimStep,
    PublishSnapshot,
    TrainItem,
)
from tinsmith.types.rest import LoadWeightsResponse
from tinsmith.types.results import ForwardBackwardOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    futures: FutureStore
    registry: Registry
    checkpoints: CheckpointStore
    samplers: SamplerBook
    sessions: SessionBook
    clock: Clock
    journal: Journal
    end_model: Callable[[Model, TinsmithError], None]
    """Fails what waits for a model, and forgets its adapter."""

    async def execute(self, turn: Turn, on_answered: OnAnswered) -> None:
        """Answer every future of the turn: training requests, optimizer steps, or one other operation. Never raises."""
        try:
            answers = self._begin(turn)
        except Exception as error:  # noqa: BLE001 - a task's boundary: nobody else would answer
            for model, work in turn:
                await self._fail(model, work, _fault(error))
            return
        parts = [
            self._settle(model, work, answer, on_answered) for (model, work), answer in zip(turn, answers, strict=True)
        ]
        await asyncio.gather(*parts)

    def _begin(self, turn: Turn) -> list[Awaitable[Any]]:
        """Hand the turn to the engine, all of it at once."""
        model, work = turn[0]
        if not (work.is_training or work.is_step):
            return [self._perform(model, work)]
        slot = slot_of(model)
        calls = slot.submit_all([_engine_operation(work.operation) for _, work in turn])
        return [slot.answer(call) for call in calls]

    async def _settle(self, model: Model, work: Work, answer: Awaitable[Any], on_answered: OnAnswered) -> None:
        try:
            result = await answer
            if isinstance(result, ForwardBackwardOutput):
                model.metrics.update(result.metrics)
            elif work.is_step:
                model.metrics.update(result)
            self.futures.resolve(work.request_id, result)
        except Exception as error:  # noqa: BLE001 - a task's boundary: nobody else would answer
            await self._fail(model, work, _fault(error))
        on_answered(model, work)

    async def _fail(self, model: Model, work: Work, error: TinsmithError) -> None:
        if isinstance(error, EngineDied) and model.slot is not None and model.slot.is_recovering:
            return  # it will be done again
        if isinstance(work.operation, SaveForSampler):
            self.samplers.settle(_sampler_id(model, work.operation))
        if isinstance(error, AdapterCorrupted):
            self._note_corrupted(model)
        else:
            await self.journal.note_failed(work.request_id, error)  # one that met NaN meets it again
        self.futures.fail(work.request_id, error)
        if isinstance(work.operation, Creation):
            self.end_model(model, ModelEnded(f"model {model.model_id!r} could not be created: {error}"))

    def _note_corrupted(self, model: Model) -> None:
        model.is_corrupted = True
        self.registry.post(lambda c: records.update_run(c, model.model_id, corrupted=True))

    async def _perform(self, model: Model, work: Work) -> object:
        match operation := work.operation:
            case Creation():
                return await self._create(model, operation)
            case SaveState():
                return await self._save_state(model, operation, work.request_id)
            case SaveForSampler():
                return await self._save_for_sampler(model, operation, work.request_id)
            case SaveExternal():
                row = await self._save(model, operation, work.request_id, kind="external_weights", name=operation.name)
                return ExternalSaved(path=row.path, size_bytes=row.size_bytes)
            case LoadState():
                return await self._load_state(model, operation, work)
            case UnloadModel():
                self.end_model(model, ModelEnded(f"model {model.model_id!r} was unloaded"))
                return model.model_id
            case ForwardBackward() | ApplyOptimizer() | Deferred() | Rejected():
                raise AssertionError(f"{type(operation).__name__} is not performed alone")

    # ---- the life of a model ----

    async def _create(self, model: Model, creation: Creation) -> str | LoadWeightsResponse:
        """The model's id, or for one made from a checkpoint what a load answers."""
        slot, now = slot_of(model), self.clock.time()
        if creation.checkpoint is not None:
            model.lora = await self._load(model, creation.checkpoint, optimizer=creation.optimizer)
            model.parent = creation.checkpoint.checkpoint_id
        elif creation.lora is not None:
            await slot.call(CreateAdapter(model_id=model.model_id, lora=creation.lora))
            model.lora = creation.lora
        row = RunRow(
            run_id=model.model_id,
            session_id=model.session_id,
            owner=model.owner,
            base_model=slot.card.name,
            lora=asdict(_lora(model)),
            parent=None if creation.checkpoint is None else creation.checkpoint.present_path,
            user_metadata=dict(model.user_metadata),
            created_at=now,
            last_request_at=now,
        )
        await self.registry.write(lambda c: records.insert_if_new(c, RUNS, row))
        model.snapshot_at = self.clock.monotonic()
        model.snapshot_due = self.journal.is_on and creation.checkpoint is not None
        if model.status is ModelStatus.CREATING:
            model.status = ModelStatus.LIVE
        if creation.checkpoint is not None:
            return LoadWeightsResponse(path=creation.checkpoint.present_path, model_id=model.model_id)
        return model.model_id

    async def _load_state(self, model: Model, operation: LoadState, work: Work) -> LoadWeightsResponse:
        row = await self._bound_checkpoint(model, operation, work)
        check_loadable(row, optimizer=operation.optimizer)
        check_base_model(row, slot_of(model))
        check_adapter_memory(slot_of(model).card, LoraSpec(**row.lora))
        lora = await self._load(model, row, optimizer=operation.optimizer)
        model.lora, model.parent = lora, row.checkpoint_id
        await self.registry.write(lambda c: records.update_run(c, model.model_id, lora=asdict(lora), corrupted=False))
        model.is_corrupted = False
        model.snapshot_due = self.journal.is_on  # the checkpoint need not be there for ever
        return LoadWeightsResponse(path=operation.path, model_id=model.model_id)

    async def _load(self, model: Model, row: CheckpointRow, *, optimizer: bool) -> LoraSpec:
        async with self.checkpoints.local(row) as folder:
            load = LoadAdapter(model_id=model.model_id, folder=str(folder), optimizer=optimizer)
            lora: LoraSpec = await slot_of(model).call(load)
        return lora

    async def _bound_checkpoint(self, model: Model, operation: LoadState, work: Work) -> CheckpointRow:
        """The version behind the path: the same if the request is done again, whatever was saved there meanwhile."""
        if work.binding is not None and (row := await self.checkpoints.find_version(work.binding)) is not None:
            return row
        row = await self.checkpoints.find(operation.path, reader=model.owner)
        if self.journal.is_on:
            binding = Entry(
                kind="binding",
                name=work.request_id,
                session_id=model.session_id,
                model_id=model.model_id,
                seq=model.queue.next_seq - 1,  # its own: nothing after it has begun
                value=row.checkpoint_id,
            )
            await self.journal.write([put(binding)])
        return row

    # ---- saving ----

    async def _save_state(self, model: Model, operation: SaveState, request_id: str) -> str:
        row = await self._save(
            model, operation, request_id, kind="weights", name=operation.name, overwrite=operation.overwrite
        )
        return row.path

    async def _save_for_sampler(self, model: Model, operation: SaveForSampler, request_id: str) -> SamplerSaved:
        path = sampler_id = None
        if operation.name is not None:
            path = (await self._save(model, operation, request_id, kind="sampler_weights", name=operation.name)).path
        if operation.sampling_session_seq_id is not None:
            sampler_id = await self._publish(model, operation, path, request_id)
        return SamplerSaved(path=path, sampling_session_id=sampler_id)

    async def _save(
        self,
        model: Model,
        operation: SaveState | SaveForSampler | SaveExternal,
        request_id: str,
        *,
        kind: str,
        name: str,
        overwrite: bool = False,
    ) -> CheckpointRow:
        order = SaveOrder(
            checkpoint_id=_checkpoint_id(request_id) if self.journal.is_on else None,
            model_id=model.model_id,
            owner=model.owner,
            kind=kind,
            name=name,
            overwrite=overwrite,
            optimizer=kind == "weights",
            ttl_seconds=operation.ttl_seconds,
            user_metadata=operation.user_metadata,
            lora=_lora(model),
            parent=model.parent,
            metrics=model.metrics,
        )
        row = await self.checkpoints.save(order, slot_of(model))
        model.parent = row.checkpoint_id
        return row

    async def _publish(self, model: Model, operation: SaveForSampler, path: str | None, request_id: str) -> str:
        """Bind the present weights to a new unnamed sampler; an inflight one takes the model's older ones with it.

        Again to the one this request made before a crash.
        """
        slot, seq_id = slot_of(model), operation.sampling_session_seq_id
        session = self.sessions.get_live(model.session_id)
        sampler_id = _sampler_id(model, operation)
        known = self.samplers.get(sampler_id)
        if known is not None and known.origin == request_id:
            if known.snapshot_id == sampler_id:  # else it follows a newer one
                await slot.call(PublishSnapshot(model_id=model.model_id, snapshot_id=sampler_id))
                self.samplers.published(known)
            self.samplers.settle(sampler_id)
            return sampler_id
        if known is not None:
            raise PayloadConflict(f"sampling_session_seq_id {seq_id} of session {model.session_id!r} was already used")
        digest: str = await slot.call(PublishSnapshot(model_id=model.model_id, snapshot_id=sampler_id))
        sampler = Sampler(
            sampler_id=sampler_id,
            session_id=model.session_id,
            owner=model.owner,
            slot=slot,
            snapshot_id=sampler_id,
            model_path=path,
            digest=digest,
            origin=request_id,
            model_id=model.model_id,
            inflight_of=model.model_id if operation.kind == "inflight" else None,
            num_bytes=slot.card.snapshot_bytes(_lora(model)),
        )
        self.samplers.add(sampler)
        self.samplers.published(sampler)
        session.sampler_ids.append(sampler_id)
        row = sampler.row(self.clock.time())
        self.registry.post(lambda c: records.insert_if_new(c, SAMPLERS, row))
        if session.ended is not None:  # it ended while the engine copied
            self.samplers.release([sampler_id])
        self.samplers.settle(sampler_id)
        return sampler_id


def _sampler_id(model: Model, operation: SaveForSampler) -> str:
    seq_id = operation.sampling_session_seq_id
    return "" if seq_id is None else sampler_name(model.session_id, seq_id)


def _checkpoint_id(request_id: str) -> str:
    """So that a save that is done again after a crash finds what it has done."""
    return f"ckpt-{hashlib.blake2b(request_id.encode(), digest_size=8).hexdigest()}"


def sampler_name(session_id: str, sampling_session_seq_id: int) -> str:
    return f"{session_id}:sample:{sampling_session_seq_id}"


def check_base_model(row: CheckpointRow, slot: EngineSlot) -> None:
    """Raises `InvalidInput` if a checkpoint belongs to another base model."""
    if row.base_model != slot.card.name:
        raise InvalidInput(
            f"checkpoint {row.path!r} was trained on base model {row.base_model!r} and does not fit {slot.card.name!r}"
        )


def drop_adapter(model: Model) -> None:
    if model.slot is not None:
        model.slot.tell(DropAdapter(model_id=model.model_id))


def _lora(model: Model) -> LoraSpec:
    if model.lora is None:
        raise AssertionError(f"model {model.model_id!r} has no adapter yet and takes no turns")
    return model.lora


def _engine_operation(operation: ModelOperation) -> TrainItem | OptimStep:
    if isinstance(operation, ApplyOptimizer):
        return OptimStep(model_id=operation.model_id, params=operation.params)
    if not isinstance(operation, ForwardBackward):
        raise AssertionError(f"{type(operation).__name__} cannot share a turn")
    return TrainItem(
        model_id=operation.model_id,
        data=operation.data,
        loss_fn=operation.loss_fn,
        loss_fn_config=operation.loss_fn_config,
        forward_only=operation.forward_only,
        custom_loss=operation.custom_loss,
    )


def _fault(error: Exception) -> TinsmithError:
    if isinstance(error, TinsmithError):
        return error
    logger.error("a request failed inside the server", exc_info=error)
    return ServerError(f"internal error: {error!r}; the server's log has the details")
