"""`GuardedLibrary`: the library as one caller sees it: its own things, and what others have published."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from tinsmith.control.audit import AuditEntry, EventType
from tinsmith.control.copies import CopyOrder
from tinsmith.control.exports import MergeOrder
from tinsmith.control.folder_store import StoredFile
from tinsmith.control.identities import Caller, Scope
from tinsmith.control.imports import ImportOrder
from tinsmith.control.library import Library
from tinsmith.control.owners import Owners
from tinsmith.control.records import CheckpointRow
from tinsmith.control.session_search import FoundSession, SessionQuery
from tinsmith.control.usage import StoredShare, UsageReport
from tinsmith.types.checkpoint import PATH_KINDS, Checkpoint
from tinsmith.types.errors import NotFound
from tinsmith.types.rest import GetSessionResponse, TrainingRun, WeightsInfoResponse


class _Permit(Protocol):
    def __call__(self, *scopes: Scope) -> Caller: ...


class _Shelves(Protocol):
    """What of control is needed here."""

    @property
    def library(self) -> Library: ...
    @property
    def owners(self) -> Owners: ...


class GuardedLibrary:
    """Lists hold the caller's own things; with `everything`, an admin's hold all. Whoever is no admin is not told
    that there is more."""

    def __init__(self, shelves: _Shelves, permit: _Permit) -> None:
        self._shelves = shelves
        self._permit = permit

    @property
    def _library(self) -> Library:
        return self._shelves.library

    def _read(self) -> Caller:
        return self._permit("read", "train", "sample", "admin")

    def _check_sees(self, object_id: str, what: str) -> None:
        """Raises `NotFound`, as if there were no such thing."""
        caller = self._read()
        if not caller.sees_all and self._shelves.owners.of(object_id) != caller.user_id:
            raise NotFound(f"no {what} {object_id!r}")

    def _check_owns(self, session_id: str, caller: Caller) -> None:
        if not caller.is_local and self._shelves.owners.of(session_id) != caller.user_id:
            raise NotFound(f"no session {session_id!r}")

    # ---- sessions and runs ----

    async def get_session(self, session_id: str) -> GetSessionResponse:
        self._check_sees(session_id, "session")
        return await self._library.get_session(session_id)

    async def list_sessions(self, limit: int, offset: int, *, everything: bool = False) -> tuple[list[str], int]:
        return await self._library.list_sessions(limit, offset, owner=_owner(self._read(), everything))

    async def search_sessions(self, query: SessionQuery) -> list[FoundSession]:
        """`owners` of the query: only an admin finds sessions of others."""
        caller = self._read()
        if not caller.sees_all:
            mine = caller.user_id in query.owners if query.owners is not None else True
            query = replace(query, owners=[caller.user_id] if mine else [])
        return await self._library.search_sessions(query)

    async def assign_project(self, session_id: str, project_id: str) -> None:
        caller = self._permit("train", "sample")
        self._check_owns(session_id, caller)
        if not caller.is_local:
            check_project(caller, project_id)
        await self._library.assign_project(session_id, project_id)

    async def trace(self, session_id: str) -> dict[str, Any]:
        self._check_sees(session_id, "session")
        return await self._library.trace(session_id)

    async def get_training_run(self, run_id: str) -> TrainingRun:
        self._check_sees(run_id, "training run")
        return await self._library.get_training_run(run_id)

    async def list_training_runs(
        self, limit: int, offset: int, project_id: str | None = None, *, everything: bool = False
    ) -> tuple[list[TrainingRun], int]:
        owner = _owner(self._read(), everything)
        return await self._library.list_training_runs(limit, offset, project_id, owner=owner)

    # ---- checkpoints ----

    async def list_checkpoints(self, run_id: str, kinds: Collection[str] = PATH_KINDS) -> list[Checkpoint]:
        self._check_sees(run_id, "training run")
        return await self._library.list_checkpoints(run_id, kinds)

    async def list_user_checkpoints(
        self, limit: int, offset: int, kinds: Collection[str] = PATH_KINDS
    ) -> tuple[list[Checkpoint], int]:
        return await self._library.list_user_checkpoints(limit, offset, kinds, owner=_owner(self._read(), False))

    async def get_checkpoint(self, run_id: str, checkpoint_id: str) -> Checkpoint:
        return await self._library.get_checkpoint(run_id, checkpoint_id, reader=_reader(self._read()))

    async def weights_info(self, path: str) -> WeightsInfoResponse:
        return await self._library.weights_info(path, reader=_reader(self._read()))

    async def find_checkpoint(self, path: str) -> CheckpointRow:
        return await self._library.find_checkpoint(path, reader=_reader(self._read()))

    async def delete_checkpoint(self, run_id: str, checkpoint_id: str) -> None:
        await self._library.delete_checkpoint(run_id, checkpoint_id, owner=_owner(self._permit("train"), False))

    async def set_checkpoint_ttl(self, run_id: str, checkpoint_id: str, ttl_seconds: int | None) -> None:
        owner = _owner(self._permit("train"), False)
        await self._library.set_checkpoint_ttl(run_id, checkpoint_id, ttl_seconds, owner=owner)

    async def set_published(self, run_id: str, checkpoint_id: str, public: bool) -> None:
        owner = _owner(self._permit("train"), False)
        await self._library.set_published(run_id, checkpoint_id, public, owner=owner)

    async def set_pinned(self, run_id: str, checkpoint_id: str, pinned: bool) -> None:
        owner = _owner(self._permit("train"), False)
        await self._library.set_pinned(run_id, checkpoint_id, pinned, owner=owner)

    async def copy_weights(self, order: CopyOrder, idempotency_key: str | None) -> str:
        caller = self._permit("train")
        if order.session_id is not None and not caller.is_local:
            owner = self._shelves.owners.of(order.session_id)
            if owner != caller.user_id:
                raise NotFound(f"no session {order.session_id!r} in this server process")
        if not caller.is_local:
            check_project(caller, order.project_id)
        order = replace(order, owner=caller.user_id, is_for_all=caller.sees_all)
        return await self._library.copy_weights(order, idempotency_key)

    def upload_place(self) -> AbstractAsyncContextManager[Path]:
        self._permit("train")
        return self._library.upload_place()

    async def import_adapter(self, archive: Path, order: ImportOrder, idempotency_key: str | None) -> Checkpoint:
        caller = self._permit("train")
        if not caller.is_local:
            check_project(caller, order.project_id)
        return await self._library.import_adapter(archive, replace(order, owner=caller.user_id), idempotency_key)

    async def export_merged(self, order: MergeOrder) -> Checkpoint | None:
        return await self._library.export_merged(order, owner=_owner(self._permit("train"), False))

    async def checkpoint_files(self, run_id: str, checkpoint_id: str) -> tuple[CheckpointRow, list[StoredFile]]:
        return await self._library.checkpoint_files(run_id, checkpoint_id, reader=_reader(self._read()))

    def checkpoint_folder(self, path: str, purpose: str) -> AbstractAsyncContextManager[Path]:
        caller = self._read()
        return self._library.checkpoint_folder(path, purpose, by=caller.user_id, reader=_reader(caller))

    # ---- what was done and used ----

    async def audit_log(self, event_type: EventType, day: date | None) -> list[AuditEntry]:
        """An admin's is everyone's."""
        return await self._library.audit_log(event_type, day, owner=_reader(self._read()))

    async def usage(self, start: float, end: float) -> UsageReport:
        """An admin's is everyone's, here and below."""
        return await self._library.usage(start, end, owner=_reader(self._read()))

    async def stored_checkpoints(self, project_id: str | None) -> list[StoredShare]:
        return await self._library.stored_checkpoints(project_id, owner=_reader(self._read()))


def check_project(caller: Caller, project_id: str | None) -> None:
    """Raises `NotFound` for a project that is not there, or of which the caller is no member."""
    if project_id is not None and project_id not in caller.project_ids:
        raise NotFound(f"you are a member of no project {project_id!r}; `tinsmith admin projects add-member` adds you")


def _reader(caller: Caller) -> str | None:
    return None if caller.sees_all else caller.user_id


def _owner(caller: Caller, everything: bool) -> str | None:
    return None if caller.is_local or (everything and caller.sees_all) else caller.user_id
