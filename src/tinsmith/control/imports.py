"""Imports: adapters from elsewhere become checkpoints, each in a run of its own, to sample and to train on from."""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sqlalchemy as sa

from tinsmith.control import audit, records
from tinsmith.control.checkpoints import CheckpointStore, describe, folder_key
from tinsmith.control.engines import EngineBook, EngineSlot
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.identity import Clock, Ids
from tinsmith.control.once import Once
from tinsmith.control.records import CheckpointRow, RunRow, SessionRow
from tinsmith.control.registry import RUNS, SESSIONS, Registry
from tinsmith.control.uploads import ADAPTER_FILES, unpack_adapter
from tinsmith.control.validation import check_ttl
from tinsmith.types.checkpoint import check_checkpoint_name
from tinsmith.types.errors import InvalidInput, NotFound
from tinsmith.types.operations import ImportAdapter, ImportedAdapter

KIND = "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOrder:
    name: str
    base_model: str | None = None
    """`None` takes the one that the adapter says it was made for."""
    project_id: str | None = None
    ttl_seconds: int | None = None
    owner: str = LOCAL_USER_ID
    fingerprint: bytes = b""
    """Of the archive: what came before under the same key must be the same."""


class Imports:
    def __init__(
        self,
        *,
        registry: Registry,
        checkpoints: CheckpointStore,
        engines: EngineBook,
        ids: Ids,
        clock: Clock,
        folder: Path,
        max_bytes: int,
    ) -> None:
        """`folder` is for what has arrived and is not imported yet; nothing in it outlives the server."""
        self._registry = registry
        self._checkpoints = checkpoints
        self._engines = engines
        self._ids = ids
        self._clock = clock
        self._folder = folder
        self._max_bytes = max_bytes
        self._is_swept = False
        self._once = Once[CheckpointRow]("import")

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Path]:
        """An empty folder on the server, there as long as the context lasts."""
        if not self._is_swept:
            self._is_swept = True
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)  # what an earlier server left
        place = self._folder / uuid.uuid4().hex
        await asyncio.to_thread(place.mkdir, parents=True)
        try:
            yield place
        finally:
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)

    async def take(self, archive: Path, order: ImportOrder, idempotency_key: str | None) -> CheckpointRow:
        """Make a checkpoint of an adapter in PEFT's layout, in a tar archive.

        Raises `InvalidInput` if the archive or the adapter is damaged or does not fit, `Unsupported` if it does what
        adapters here cannot, `NotFound` for its base model, `StorageError`; then nothing changed.
        """
        return await self._once.do(order.owner, idempotency_key, order, lambda: self._take(archive, order))

    async def _take(self, archive: Path, order: ImportOrder) -> CheckpointRow:
        check_checkpoint_name(order.name)
        check_ttl(order.ttl_seconds)
        async with self.place() as source:
            await asyncio.to_thread(unpack_adapter, archive, source, max_bytes=self._max_bytes)
            config = await asyncio.to_thread(_read_config, source)
            slot = self._slot(order, config)
            draft = self._draft(order, slot)

            async def write(folder: Path) -> CheckpointRow:
                operation = ImportAdapter(source=str(source), folder=str(folder), record=describe(draft))
                done: ImportedAdapter = await slot.call(operation)
                saved = done.saved
                return replace(draft, lora=asdict(done.lora), digest=saved.digest, size_bytes=saved.size_bytes)

            return await self._checkpoints.add(draft.folder, write, _registers(order, config))

    def _slot(self, order: ImportOrder, config: Mapping[str, object]) -> EngineSlot:
        """Raises `NotFound` with what there is."""
        if order.base_model is not None:
            return self._engines.resolve(order.base_model)
        said = config.get("base_model_name_or_path")
        for slot in self._engines:
            if said is not None and said in (slot.card.name, slot.card.source):
                return self._engines.resolve(slot.card.name)
        there = ", ".join(slot.card.name for slot in self._engines)
        raise NotFound(
            f"the adapter was made for base model {said!r}, which this server does not have; say base_model to import "
            f"it for one of: {there}"
        )

    def _draft(self, order: ImportOrder, slot: EngineSlot) -> CheckpointRow:
        """All that is known before the engine has read the adapter."""
        now = self._clock.time()
        run_id = f"{self._ids.session_id()}:train:0"
        return CheckpointRow(
            checkpoint_id=self._ids.checkpoint_id(),
            run_id=run_id,
            owner=order.owner,
            kind=KIND,
            name=order.name,
            version=1,
            folder=folder_key(run_id, KIND, order.name, 1),
            base_model=slot.card.name,
            tokenizer=slot.card.source,
            lora={},
            has_optimizer=False,
            step=0,
            metrics={},
            digest="",
            size_bytes=0,
            created_at=now,
            expires_at=None if order.ttl_seconds is None else now + order.ttl_seconds,
        )


def _registers(order: ImportOrder, config: Mapping[str, object]) -> records.Register:
    def work(connection: sa.Connection, row: CheckpointRow) -> None:
        now, session_id = row.created_at, row.run_id.partition(":")[0]
        session = SessionRow(
            session_id=session_id,
            owner=order.owner,
            created_at=now,
            ended_at=now,
            end_reason="success",
            end_detail=f"import of {order.name}",
            tags=["import"],
            project_id=order.project_id,
        )
        run = RunRow(
            run_id=row.run_id,
            session_id=session_id,
            owner=order.owner,
            base_model=row.base_model,
            lora=row.lora,
            created_at=now,
            last_request_at=now,
            ended_at=now,
        )
        records.insert(connection, SESSIONS, session)
        records.insert(connection, RUNS, run)
        records.register_checkpoint(connection, row, overwrite=False)
        made_for = config.get("base_model_name_or_path")
        audit.note_checkpoint(connection, "checkpoint_import", row, now, made_for=made_for)

    return work


def _read_config(folder: Path) -> Mapping[str, object]:
    try:
        config = json.loads((folder / ADAPTER_FILES[0]).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{ADAPTER_FILES[0]} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{ADAPTER_FILES[0]} must be a JSON object, not {type(config).__name__}")
    return config
