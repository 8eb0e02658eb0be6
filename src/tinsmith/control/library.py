"""`Library`: what is looked up, taken away and tidied: sessions, runs, checkpoints, copies, traces, audit, usage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tinsmith.control import audit, records
from tinsmith.control.audit import AuditEntry, EventType
from tinsmith.control.catalogue import Catalogue
from tinsmith.control.checkpoints import CheckpointStore
from tinsmith.control.copies import Copies, CopyOrder, check_destination
from tinsmith.control.exports import Exports, MergeOrder
from tinsmith.control.folder_store import StoredFile
from tinsmith.control.futures import FutureStore
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.identity import Clock
from tinsmith.control.imports import ImportOrder, Imports
from tinsmith.control.records import CheckpointRow
from tinsmith.control.registry import Registry
from tinsmith.control.session_search import FoundSession, SessionQuery, search
from tinsmith.control.sessions import SessionBook
from tinsmith.control.traces import TraceLog, trace_document
from tinsmith.control.usage import Meter, StoredShare, UsageReport
from tinsmith.types.checkpoint import PATH_KINDS, Checkpoint
from tinsmith.types.errors import NotFound
from tinsmith.types.rest import GetSessionResponse, TrainingRun, WeightsInfoResponse


class Library:
    """`owner` keeps to what one user owns, `reader` to what one user may read; `None` is everything."""

    def __init__(
        self,
        *,
        registry: Registry,
        sessions: SessionBook,
        futures: FutureStore,
        catalogue: Catalogue,
        checkpoints: CheckpointStore,
        copies: Copies,
        imports: Imports,
        exports: Exports,
        traces: TraceLog,
        meter: Meter,
        clock: Clock,
    ) -> None:
        self._registry = registry
        self._sessions = sessions
        self._futures = futures
        self._catalogue = catalogue
        self._checkpoints = checkpoints
        self._copies = copies
        self._imports = imports
        self._exports = exports
        self._traces = traces
        self._meter = meter
        self._clock = clock

    # ---- sessions and runs ----

    async def get_session(self, session_id: str) -> GetSessionResponse:
        return await self._catalogue.session(session_id)

    async def list_sessions(self, limit: int, offset: int, *, owner: str | None = None) -> tuple[list[str], int]:
        """Ids, newest first, and how many there are."""
        return await self._catalogue.sessions(limit, offset, owner)

    async def search_sessions(self, query: SessionQuery) -> list[FoundSession]:
        """Newest first."""
        now = self._clock.time()
        return await self._registry.read(lambda c: search(c, query, now))

    async def assign_project(self, session_id: str, project_id: str) -> None:
        """Raises `NotFound`."""
        at = self._clock.time()
        row = await self._registry.read(lambda c: records.session(c, session_id))
        if row is None:
            raise NotFound(f"no session {session_id!r}")
        details = {"session_id": session_id, "project_id": project_id}

        def work(connection: sa.Connection) -> bool:
            audit.note(connection, "project_session_assign", at, row.owner, **details)
            return records.assign_project(connection, session_id, project_id)

        await self._registry.write(work)
        if (session := self._sessions.find(session_id)) is not None:
            session.project_id = project_id

    async def trace(self, session_id: str) -> dict[str, Any]:
        """What the session's requests did when, in Chrome's trace format. Raises `NotFound`, also for a session of an
        earlier server process: traces are not kept over a restart."""
        if self._sessions.find(session_id) is None:
            if await self._registry.read(lambda c: records.session(c, session_id)) is None:
                raise NotFound(f"no session {session_id!r}")
            raise NotFound(f"session {session_id!r} ended when the server was restarted; its trace is not kept")
        spans = self._traces.spans(session_id) + self._futures.open_spans(session_id)
        return await asyncio.to_thread(trace_document, session_id, spans, self._clock.time())

    async def get_training_run(self, run_id: str) -> TrainingRun:
        return await self._catalogue.training_run(run_id)

    async def list_training_runs(
        self, limit: int, offset: int, project_id: str | None = None, *, owner: str | None = None
    ) -> tuple[list[TrainingRun], int]:
        return await self._catalogue.training_runs(limit, offset, project_id, owner)

    # ---- checkpoints ----

    async def list_checkpoints(self, run_id: str, kinds: Collection[str] = PATH_KINDS) -> list[Checkpoint]:
        return await self._catalogue.checkpoints_of_run(run_id, kinds)

    async def list_user_checkpoints(
        self, limit: int, offset: int, kinds: Collection[str] = PATH_KINDS, *, owner: str | None = None
    ) -> tuple[list[Checkpoint], int]:
        return await self._catalogue.checkpoints(limit, offset, kinds, owner)

    async def get_checkpoint(self, run_id: str, checkpoint_id: str, *, reader: str | None = None) -> Checkpoint:
        """`checkpoint_id` is `<kind>/<address>`. Raises `NotFound`, `InvalidInput`."""
        return await self._catalogue.checkpoint(run_id, checkpoint_id, reader)

    async def weights_info(self, path: str, *, reader: str | None = None) -> WeightsInfoResponse:
        return await self._catalogue.weights_info(path, reader)

    async def find_checkpoint(self, path: str, *, reader: str | None = None) -> CheckpointRow:
        """The current version behind a path. Raises `InvalidInput` for no path, `NotFound` for no checkpoint."""
        return await self._checkpoints.find(path, reader=reader)

    async def delete_checkpoint(self, run_id: str, checkpoint_id: str, *, owner: str | None = None) -> None:
        """With all its versions; `checkpoint_id` is `<kind>/<name>`. Or one, of `<kind>/<name>~<version>`.

        Raises `NotFound`, `InvalidInput`.
        """
        await self._checkpoints.delete_at(run_id, checkpoint_id, owner=owner)

    async def set_checkpoint_ttl(
        self, run_id: str, checkpoint_id: str, ttl_seconds: int | None, *, owner: str | None = None
    ) -> None:
        """Counted from now; `None` keeps it for ever."""
        row = await self._checkpoints.find_in_run(run_id, checkpoint_id, owner=owner)
        await self._checkpoints.set_ttl(row, ttl_seconds)

    async def set_published(self, run_id: str, checkpoint_id: str, public: bool, *, owner: str | None = None) -> None:
        """Idempotent."""
        row = await self._checkpoints.find_in_run(run_id, checkpoint_id, owner=owner)
        await self._checkpoints.set_public(row, public)

    async def set_pinned(self, run_id: str, checkpoint_id: str, pinned: bool, *, owner: str | None = None) -> None:
        """Idempotent."""
        row = await self._checkpoints.find_in_run(run_id, checkpoint_id, owner=owner)
        await self._checkpoints.set_pinned(row, pinned)

    async def copy_weights(self, order: CopyOrder, idempotency_key: str | None) -> str:
        """The path of the copy. Raises `NotFound`, `InvalidInput`, `AlreadyExists`, `SessionEnded`."""
        check_destination(order)
        if order.session_id is not None:
            self._sessions.get_live(order.session_id)
        return await self._copies.copy(order, idempotency_key)

    def upload_place(self) -> AbstractAsyncContextManager[Path]:
        """An empty folder for an archive that arrives, there as long as the context lasts."""
        return self._imports.place()

    async def import_adapter(self, archive: Path, order: ImportOrder, idempotency_key: str | None) -> Checkpoint:
        """Raises `InvalidInput`, `Unsupported`, `NotFound`, `PayloadConflict`, `StorageError`."""
        return (await self._imports.take(archive, order, idempotency_key)).as_checkpoint()

    async def export_merged(self, order: MergeOrder, *, owner: str | None = None) -> Checkpoint | None:
        """The export once it is made; `None` if it is not yet: ask again. Raises as `Exports.merged`."""
        row = await self._exports.merged(order, owner=owner)
        return None if row is None else row.as_checkpoint()

    async def checkpoint_files(
        self, run_id: str, checkpoint_id: str, *, reader: str | None = None
    ) -> tuple[CheckpointRow, list[StoredFile]]:
        row = await self._checkpoints.find_in_run(run_id, checkpoint_id, reader=reader)
        return row, await self._checkpoints.folders.files(row.folder)

    @asynccontextmanager
    async def checkpoint_folder(
        self, path: str, purpose: str, *, by: str = LOCAL_USER_ID, reader: str | None = None
    ) -> AsyncIterator[Path]:
        """A checkpoint's files, on this machine while the context lasts; noted as read by `by`. Raises `NotFound`."""
        row = await self._checkpoints.find(path, reader=reader)
        self._checkpoints.note_read(row.path, purpose, by)
        async with self._checkpoints.local(row) as folder:
            yield folder

    # ---- what was done and used ----

    async def audit_log(self, event_type: EventType, day: date | None, *, owner: str | None = None) -> list[AuditEntry]:
        """Of one day (UTC), today by default; oldest first."""
        chosen = day or records.moment(self._clock.time()).date()
        await self._registry.flush()  # reads are noted without waiting
        return await self._registry.read(lambda c: audit.entries(c, event_type, chosen, owner))

    async def usage(self, start: float, end: float, *, owner: str | None = None) -> UsageReport:
        return await self._meter.report(start, end, owner)

    async def stored_checkpoints(self, project_id: str | None, *, owner: str | None = None) -> list[StoredShare]:
        return await self._meter.stored(project_id, owner)
