"""Sampling sessions of base models and of checkpoints: which weights a number of a session stands for."""

from __future__ import annotations

from tinsmith.control import records
from tinsmith.control.checkpoints import CheckpointStore
from tinsmith.control.engines import EngineBook
from tinsmith.control.execution import sampler_name
from tinsmith.control.identity import Clock
from tinsmith.control.journal import Journal, SamplerRecord
from tinsmith.control.ledger import Entry, put
from tinsmith.control.registry import SAMPLERS, Registry
from tinsmith.control.samplers import Sampler, SamplerBook, checkpoint_snapshot_id
from tinsmith.control.sessions import Session, SessionBook
from tinsmith.types.errors import InvalidInput, NotFound, PayloadConflict
from tinsmith.types.operations import LoraSpec
from tinsmith.types.rest import GetSamplerResponse


class SamplingSessions:
    def __init__(
        self,
        *,
        engines: EngineBook,
        sessions: SessionBook,
        samplers: SamplerBook,
        registry: Registry,
        checkpoints: CheckpointStore,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._engines = engines
        self._sessions = sessions
        self._samplers = samplers
        self._registry = registry
        self._checkpoints = checkpoints
        self._journal = journal
        self._clock = clock
        self._bindings: dict[str, tuple[str | None, str | None]] = {}
        """What was asked for: a base model, a path."""

    async def create(self, session_id: str, seq_id: int, base_model: str | None, model_path: str | None) -> str:
        """Idempotent on `(session_id, seq_id)`. A `model_path` wins over `base_model`.

        Raises `NotFound`, `SessionEnded`, `InvalidInput`, `PayloadConflict` (the number names another sampler), or what
        the engine met when it loaded the checkpoint.
        """
        owner = self._sessions.get_live(session_id).owner
        if seq_id < 0:
            raise InvalidInput(f"sampling_session_seq_id must be at least 0, not {seq_id!r}")
        sampler_id = sampler_name(session_id, seq_id)
        if self._is_known(sampler_id, base_model, model_path):
            return sampler_id
        if model_path is not None:
            sampler = await self._checkpoint_sampler(session_id, owner, sampler_id, model_path)
        elif base_model is not None:
            slot = self._engines.resolve(base_model)
            sampler = Sampler(sampler_id=sampler_id, session_id=session_id, owner=owner, slot=slot, snapshot_id=None)
        else:
            raise InvalidInput("create_sampling_session needs a base_model or a model_path")
        await self._record(sampler, (base_model, model_path))
        session = self._sessions.get_live(session_id)
        if self._is_known(sampler_id, base_model, model_path):  # a retry overtook this call while it loaded
            return sampler_id
        self._adopt(session, sampler, (base_model, model_path))
        session.last_seen = self._clock.monotonic()
        return sampler_id

    def restore(self, session: Session, sampler: Sampler, record: SamplerRecord) -> None:
        """One that an earlier process had."""
        self._adopt(session, sampler, record.bound_to)

    def describe(self, sampler_id: str) -> GetSamplerResponse:
        """Raises `NotFound`. Knows the samplers of ended sessions too."""
        sampler = self._samplers.get(sampler_id)
        if sampler is not None:
            card = sampler.slot.card
            return GetSamplerResponse(
                sampler_id=sampler_id,
                base_model=card.name,
                model_path=sampler.model_path,
                tokenizer_id=card.tokenizer_id,
            )
        row = self._registry.read_now(lambda c: records.sampler(c, sampler_id))
        if row is None:
            raise NotFound(f"no sampling session {sampler_id!r}")
        return GetSamplerResponse(sampler_id=sampler_id, base_model=row.base_model, model_path=row.model_path)

    def digest(self, sampler_id: str) -> str | None:
        """Of the adapter it samples. Raises `NotFound`."""
        if (sampler := self._samplers.get(sampler_id)) is not None:
            return sampler.digest
        row = self._registry.read_now(lambda c: records.sampler(c, sampler_id))
        if row is None:
            raise NotFound(f"no sampling session {sampler_id!r}")
        return row.digest

    def forget(self, sampler_ids: list[str]) -> None:
        for sampler_id in sampler_ids:
            self._bindings.pop(sampler_id, None)

    def _adopt(self, session: Session, sampler: Sampler, bound_to: tuple[str | None, str | None]) -> None:
        self._bindings[sampler.sampler_id] = bound_to
        self._samplers.add(sampler)
        session.sampler_ids.append(sampler.sampler_id)

    def _is_known(self, sampler_id: str, base_model: str | None, model_path: str | None) -> bool:
        if self._samplers.get(sampler_id) is None:
            return False
        if self._bindings.get(sampler_id) != (base_model, model_path):
            raise PayloadConflict(
                f"sampling session {sampler_id!r} exists and samples something else; take the next number"
            )
        return True

    async def _checkpoint_sampler(self, session_id: str, owner: str, sampler_id: str, model_path: str) -> Sampler:
        row = await self._checkpoints.find(model_path, reader=owner)
        slot = self._engines.resolve(row.base_model)
        async with self._checkpoints.local(row) as folder:
            num_bytes = slot.card.snapshot_bytes(LoraSpec(**row.lora))
            load = self._samplers.pool(slot).load(
                checkpoint_snapshot_id(row), str(folder), num_bytes, is_checkpoint=True
            )
            digest = await load
        self._checkpoints.note_read(row.path, "sampling", owner)
        return Sampler(
            sampler_id=sampler_id,
            session_id=session_id,
            owner=owner,
            slot=slot,
            snapshot_id=checkpoint_snapshot_id(row),
            checkpoint=row,
            model_path=row.present_path,
            digest=digest,
        )

    async def _record(self, sampler: Sampler, bound_to: tuple[str | None, str | None]) -> None:
        """A sampler that cannot be written is not there: whoever asks again has it written again."""
        row = sampler.row(self._clock.time())
        await self._registry.write(lambda c: records.insert_if_new(c, SAMPLERS, row))
        record = SamplerRecord(
            base_model=sampler.slot.card.name,
            bound_to=bound_to,
            checkpoint_id=None if sampler.checkpoint is None else sampler.checkpoint.checkpoint_id,
            digest=sampler.digest,
        )
        entry = Entry(kind="sampler", name=sampler.sampler_id, session_id=sampler.session_id, value=record)
        await self._journal.write([put(entry)])
