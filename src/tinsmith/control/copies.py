"""Copies of checkpoints: in a run of their own, in another project or session, with a life of their own."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, replace

import sqlalchemy as sa

from tinsmith.control import audit, records
from tinsmith.control.checkpoints import CheckpointStore, describe, folder_key
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.identity import Clock, Ids
from tinsmith.control.once import Once
from tinsmith.control.records import CheckpointRow, RunRow, SessionRow
from tinsmith.control.registry import RUNS, SESSIONS, Registry
from tinsmith.control.validation import check_ttl
from tinsmith.types.errors import AlreadyExists, InvalidInput, NotFound, StorageError

RECORD = "checkpoint.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOrder:
    source_path: str
    owner: str = LOCAL_USER_ID
    """Of the copy."""
    is_for_all: bool = False
    """Whether the source need not be the owner's, nor published."""
    project_id: str | None = None
    session_id: str | None = None
    """Of a live session that will own the copy; `None` makes a session for it."""
    model_seq_id: int | None = None
    """The number of the run in that session."""
    ttl_seconds: int | None = None


class Copies:
    def __init__(self, *, registry: Registry, checkpoints: CheckpointStore, ids: Ids, clock: Clock) -> None:
        self._registry = registry
        self._checkpoints = checkpoints
        self._folders = checkpoints.folders
        self._ids = ids
        self._clock = clock
        self._once = Once[str]("copy")
        self._making: set[str] = set()
        """Runs that copies under way will make."""

    async def copy(self, order: CopyOrder, idempotency_key: str | None) -> str:
        """The path of the copy. The same order under the same key again is the same copy, after a crash too; a failure
        is not kept.

        Raises `NotFound`, `InvalidInput`, `AlreadyExists` (the run's number is taken), `PayloadConflict` or
        `StorageError`.
        """
        return await self._once.do(order.owner, idempotency_key, order, lambda: self._copy(order, idempotency_key))

    async def _copy(self, order: CopyOrder, key: str | None) -> str:
        check_ttl(order.ttl_seconds)
        checkpoint_id = self._ids.checkpoint_id() if key is None else _checkpoint_id(order, key)
        if (done := await self._checkpoints.find_version(checkpoint_id)) is not None:
            return done.path
        source = await self._checkpoints.find(order.source_path, reader=None if order.is_for_all else order.owner)
        now = self._clock.time()
        session_id = order.session_id or self._ids.session_id()
        row = self._row(source, checkpoint_id, f"{session_id}:train:{order.model_seq_id or 0}", order, now)
        run = RunRow(
            run_id=row.run_id,
            session_id=session_id,
            owner=order.owner,
            base_model=row.base_model,
            lora=row.lora,
            parent=source.present_path,
            created_at=now,
            last_request_at=now,
            ended_at=now,
        )
        if await self._registry.read(lambda c: records.run(c, row.run_id)) is not None:
            raise AlreadyExists(f"training run {row.run_id!r} exists; take the next model_seq_id")
        if row.run_id in self._making:
            raise AlreadyExists(f"training run {row.run_id!r} is being made; take the next model_seq_id")
        self._making.add(row.run_id)
        try:
            await self._make(source, row, run, order)
        finally:
            self._making.discard(row.run_id)
        return row.path

    async def _make(self, source: CheckpointRow, row: CheckpointRow, run: RunRow, order: CopyOrder) -> None:
        session_id, now = run.session_id, row.created_at
        await self._copy_folder(source, row)

        def register(connection: sa.Connection, row: CheckpointRow) -> None:
            if order.session_id is None:
                records.insert(connection, SESSIONS, _session_for_copy(session_id, order, now))
            records.insert(connection, RUNS, run)
            records.register_checkpoint(connection, row, overwrite=False)
            audit.note_checkpoint(connection, "checkpoint_copy", row, now, source_path=source.present_path)

        await self._checkpoints.register_new(row, register)

    async def _copy_folder(self, source: CheckpointRow, row: CheckpointRow) -> None:
        """All but the record is the same. Raises `StorageError`; nothing is left behind then."""
        try:
            async with self._checkpoints.local(source) as folder:
                record = json.loads(await asyncio.to_thread((folder / RECORD).read_bytes)) | describe(row)
            changed = {RECORD: json.dumps(record, indent=2, sort_keys=True).encode()}
            await self._folders.copy(source.folder, row.folder, changed)
        except (StorageError, NotFound, OSError, ValueError) as error:
            raise StorageError(f"checkpoint {source.path!r} could not be copied: {error}") from error

    def _row(
        self, source: CheckpointRow, checkpoint_id: str, run_id: str, order: CopyOrder, now: float
    ) -> CheckpointRow:
        return replace(
            source,
            checkpoint_id=checkpoint_id,
            run_id=run_id,
            owner=order.owner,
            version=1,
            folder=folder_key(run_id, source.kind, source.name, 1),
            parent=source.checkpoint_id,
            public=False,
            superseded_at=None,
            created_at=now,
            expires_at=None if order.ttl_seconds is None else now + order.ttl_seconds,
        )


def check_destination(order: CopyOrder) -> None:
    """Raises `InvalidInput` unless the copy has one place to go."""
    if (order.session_id is None) != (order.model_seq_id is None):
        raise InvalidInput("session_id and model_seq_id of a copy belong together; give both or neither")
    if order.session_id is not None and order.project_id is not None:
        raise InvalidInput("give either destination_project_id or session_id and model_seq_id, not both")


def _checkpoint_id(order: CopyOrder, key: str) -> str:
    """So that a copy that is asked for again after a crash is found."""
    return f"ckpt-{hashlib.blake2b(repr((order, key)).encode(), digest_size=8).hexdigest()}"


def _session_for_copy(session_id: str, order: CopyOrder, now: float) -> SessionRow:
    return SessionRow(
        session_id=session_id,
        owner=order.owner,
        created_at=now,
        ended_at=now,
        end_reason="success",
        end_detail=f"copy of {order.source_path}",
        tags=["copy_weights"],
        project_id=order.project_id,
    )
