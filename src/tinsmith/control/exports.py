"""Exports of full weights: a base model with a checkpoint's adapter merged into it, as an external checkpoint."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import sqlalchemy as sa

from tinsmith.control import audit, records
from tinsmith.control.checkpoints import CheckpointStore, describe, folder_key
from tinsmith.control.engines import EngineBook
from tinsmith.control.identity import Clock, Ids
from tinsmith.control.records import CheckpointRow
from tinsmith.control.validation import check_ttl
from tinsmith.types.checkpoint import check_checkpoint_name
from tinsmith.types.errors import AlreadyExists, InvalidInput, NotFound
from tinsmith.types.operations import MergeAdapter, SavedCheckpoint

KIND = "external_weights"
HOLD_S = 25.0
"""How long a caller waits for an export before it is told to ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOrder:
    run_id: str
    checkpoint_id: str
    """`<kind>/<address>` of what is merged."""
    name: str | None = None
    """Of the export, in the same run; `None` takes that of the checkpoint and `-merged`."""
    dtype: str | None = None
    ttl_seconds: int | None = None


_Export: TypeAlias = tuple[CheckpointRow, MergeOrder, asyncio.Task[CheckpointRow]]
"""What of, how, and the making of it."""


class Exports:
    def __init__(self, *, checkpoints: CheckpointStore, engines: EngineBook, ids: Ids, clock: Clock) -> None:
        self._checkpoints = checkpoints
        self._engines = engines
        self._ids = ids
        self._clock = clock
        self._running: dict[str, _Export] = {}
        """By path; those that failed, too, until somebody asks."""

    async def merged(self, order: MergeOrder, *, owner: str | None, hold_s: float = HOLD_S) -> CheckpointRow | None:
        """The export; `None` if it is not ready after `hold_s`: ask again. One that is there is not made again.

        Raises `NotFound`, `InvalidInput`, `AlreadyExists` if the name is that of something else, and once what failed.
        """
        source = await self._checkpoints.find_in_run(order.run_id, order.checkpoint_id, owner=owner)
        draft = self._draft(source, order)
        running = self._running.get(draft.path)  # it may come to its end while the registry is asked
        if (done := await self._existing(draft)) is not None:
            return done
        of, asked, task = running or self._running.get(draft.path) or self._start(source, draft, order)
        if of.checkpoint_id != source.checkpoint_id or asked.dtype != order.dtype:
            if not task.done():
                raise AlreadyExists(f"{draft.path!r} is being made of something else; take another name")
            _, _, task = self._start(source, draft, order)
        await asyncio.wait({task}, timeout=hold_s)
        if not task.done():
            return None
        self._forget(draft.path, task)
        return await task

    def _start(self, source: CheckpointRow, draft: CheckpointRow, order: MergeOrder) -> _Export:
        """Whoever asks next is told of a failure; of what was made its record tells."""
        task = asyncio.create_task(self._merge(source, draft, order))
        self._running[draft.path] = export = (source, order, task)

        def ended(task: asyncio.Task[CheckpointRow]) -> None:
            if task.cancelled() or task.exception() is None:
                self._forget(draft.path, task)

        task.add_done_callback(ended)
        return export

    def _forget(self, path: str, task: asyncio.Task[CheckpointRow]) -> None:
        if path in self._running and self._running[path][2] is task:
            del self._running[path]

    async def _existing(self, draft: CheckpointRow) -> CheckpointRow | None:
        try:
            found = await self._checkpoints.find(draft.path)
        except NotFound:
            return None
        if (found.parent, found.user_metadata) != (draft.parent, draft.user_metadata):
            raise AlreadyExists(f"{draft.path!r} exists and is something else; delete it, or take another name")
        return found

    def _draft(self, source: CheckpointRow, order: MergeOrder) -> CheckpointRow:
        """All that is known before the engine has written."""
        if source.kind == KIND:
            raise InvalidInput(f"{source.path!r} is an export; merge a checkpoint of weights or sampler_weights")
        check_ttl(order.ttl_seconds)
        name, now = check_checkpoint_name(order.name or f"{source.name}-merged"), self._clock.time()
        return replace(
            source,
            checkpoint_id=self._ids.checkpoint_id(),
            kind=KIND,
            name=name,
            version=1,
            has_optimizer=False,
            parent=source.checkpoint_id,
            user_metadata={"merged": order.dtype or "as the base model"},
            public=False,
            superseded_at=None,
            created_at=now,
            expires_at=None if order.ttl_seconds is None else now + order.ttl_seconds,
        )

    async def _merge(self, source: CheckpointRow, draft: CheckpointRow, order: MergeOrder) -> CheckpointRow:
        version = await self._checkpoints.next_version(draft)
        draft = replace(draft, version=version, folder=folder_key(draft.run_id, KIND, draft.name, version))
        slot = self._engines.resolve(draft.base_model)

        async def write(folder: Path) -> CheckpointRow:
            async with self._checkpoints.local(source) as adapter:
                record = describe(draft) | {"step": draft.step}
                operation = MergeAdapter(source=str(adapter), folder=str(folder), dtype=order.dtype, record=record)
                saved: SavedCheckpoint = await slot.call(operation)
            return replace(draft, digest=saved.digest, size_bytes=saved.size_bytes)

        return await self._checkpoints.add(draft.folder, write, _register)


def _register(connection: sa.Connection, row: CheckpointRow) -> None:
    records.register_checkpoint(connection, row, overwrite=False)
    audit.note_checkpoint(connection, "checkpoint_export", row, row.created_at, size_bytes=row.size_bytes)
