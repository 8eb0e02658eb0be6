"""Checkpoints: folders in a store and their rows in the registry.

A folder's key is `checkpoints/<run>/<kind>/<name>/v<version>`, with `:` in run and name written as `~`. A folder is
complete before its row exists, and a row is gone before its folder is: whatever is listed can be loaded. An overwrite
makes a new version; versions it supersedes stay for a while (`ControlSettings.superseded_versions_kept`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import sqlalchemy as sa

from tinsmith.control import audit, records
from tinsmith.control.addresses import resolve
from tinsmith.control.audit import AuditEvent
from tinsmith.control.engines import EngineSlot
from tinsmith.control.errors import Unsettled
from tinsmith.control.folder_store import CHECKPOINTS, FolderStore
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.identity import Clock, Ids
from tinsmith.control.records import CheckpointRow
from tinsmith.control.registry import Registry
from tinsmith.control.validation import check_ttl
from tinsmith.types.checkpoint import CheckpointAddress, ParsedCheckpointTinkerPath
from tinsmith.types.crash_points import crash_point
from tinsmith.types.errors import AlreadyExists, InvalidInput, StorageError, TinsmithError
from tinsmith.types.operations import BaseModelCard, LoraSpec, SaveAdapter, SavedCheckpoint

logger = logging.getLogger(__name__)

MakeRoom: TypeAlias = Callable[[sa.Connection, CheckpointRow, float], Sequence[CheckpointRow]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOrder:
    """What to save under which name."""

    checkpoint_id: str | None = None
    """Of a request that may be done again after a crash, always the same; `None` draws a new one."""
    model_id: str
    owner: str
    kind: str
    name: str
    overwrite: bool = False
    optimizer: bool
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] | None = None
    lora: LoraSpec
    parent: str | None
    metrics: Mapping[str, float]


class CheckpointStore:
    def __init__(
        self, *, registry: Registry, folders: FolderStore, ids: Ids, clock: Clock, superseded_versions_kept: int
    ) -> None:
        self.folders = folders
        self._registry = registry
        self._ids = ids
        self._clock = clock
        self._superseded_versions_kept = superseded_versions_kept
        self.make_room: MakeRoom = lambda connection, row, at: []
        """Asked in the transaction that has registered a checkpoint: what was marked deleted for it."""
        self.in_use: Callable[[], Set[str]] = frozenset
        """Ids of checkpoints that live models and samplers may read again."""
        self.on_saved: Callable[[str], None] = lambda run_id: None
        """Told of every run that has a checkpoint more."""

    async def find(self, path: str, *, reader: str | None = None, owner: str | None = None) -> CheckpointRow:
        """What an address means now. Raises `InvalidInput` for no such form, `NotFound` for no such thing.

        With `reader`, what that user may not read is no such thing either; with `owner`, what it does not own.
        """
        address, now = CheckpointAddress.parse(path), self._clock.time()

        def counts(row: CheckpointRow) -> bool:
            return (reader is None or may_read(row, reader)) and owner in (None, row.owner)

        return await self._registry.read(lambda c: resolve(c, address, now, counts))

    async def find_in_run(
        self, run_id: str, checkpoint_id: str, *, reader: str | None = None, owner: str | None = None
    ) -> CheckpointRow:
        return await self.find(f"tinker://{run_id}/{checkpoint_id}", reader=reader, owner=owner)

    def local(self, row: CheckpointRow) -> AbstractAsyncContextManager[Path]:
        """Its files on this machine while the context lasts. Raises `NotFound` if they were deleted, `StorageError`."""
        return self.folders.local(row.folder)

    async def save(self, order: SaveOrder, slot: EngineSlot) -> CheckpointRow:
        """Write, then register. Raises `AlreadyExists`, or what the engine or the registry met; then nothing changed.

        A model's saves are asked for one after another. One that was registered already, before a crash, is answered
        as it was.
        """
        if order.checkpoint_id is not None and (done := await self.find_version(order.checkpoint_id)) is not None:
            return done
        version = await self._registry.read(lambda c: _next_version(c, order, self._clock.time()))
        while await self.folders.exists(_key(order, version)):  # left by a save that was never registered
            version += 1
        draft = self._draft(order, version, slot.card)
        crash_point("save.begun")
        saved: SavedCheckpoint = await slot.call(
            SaveAdapter(
                model_id=order.model_id,
                folder=str(self.folders.draft(draft.folder)),
                optimizer=order.optimizer,
                record=describe(draft),
            )
        )
        await self._put(draft.folder)
        crash_point("save.written")
        row = replace(draft, step=saved.step, digest=saved.digest, size_bytes=saved.size_bytes)
        await self._register(row, overwrite=order.overwrite)
        crash_point("save.registered")
        return row

    async def add(
        self, key: str, write: Callable[[Path], Awaitable[CheckpointRow]], register: records.Register
    ) -> CheckpointRow:
        """A checkpoint that no model saves: `write` its files and tell its row, then `register` it.

        Raises what either raises, or `StorageError`; nothing is left behind then.
        """
        row = await write(self.folders.draft(key))
        await self._put(key)
        await self.register_new(row, register)
        return row

    async def next_version(self, row: CheckpointRow) -> int:
        """Of a name: one that no version had, and under which nothing was left."""
        older = await self._registry.read(lambda c: records.versions(c, row.run_id, row.kind, row.name))
        version = older[0].version + 1 if older else 1
        while await self.folders.exists(folder_key(row.run_id, row.kind, row.name, version)):
            version += 1
        return version

    async def register_new(self, row: CheckpointRow, register: records.Register) -> None:
        """One whose files are whole in the store; they are removed if this raises, but for `Unsettled`."""

        def work(connection: sa.Connection) -> list[str]:
            register(connection, row)
            return [old.folder for old in self.make_room(connection, row, row.created_at)]

        try:
            doomed = await self._registry.write(work)
        except Unsettled:
            raise  # it may be registered: what is listed must be there
        except TinsmithError:
            await self._remove_folders([row.folder])
            raise
        await self._remove_folders(doomed)

    async def _put(self, key: str) -> None:
        try:
            await self.folders.put(key)
        except StorageError:
            await self._remove_folders([key])
            raise

    async def find_version(self, checkpoint_id: str) -> CheckpointRow | None:
        """Whatever became of it since."""
        return await self._registry.read(lambda c: records.checkpoint_by_id(c, checkpoint_id))

    def _draft(self, order: SaveOrder, version: int, card: BaseModelCard) -> CheckpointRow:
        """All that is known before the engine has written."""
        now = self._clock.time()
        return CheckpointRow(
            checkpoint_id=order.checkpoint_id or self._ids.checkpoint_id(),
            run_id=order.model_id,
            owner=order.owner,
            kind=order.kind,
            name=order.name,
            version=version,
            folder=_key(order, version),
            base_model=card.name,
            tokenizer=card.source,
            lora=asdict(order.lora),
            has_optimizer=order.optimizer,
            step=0,
            metrics=dict(order.metrics),
            digest="",
            size_bytes=0,
            parent=order.parent,
            user_metadata=None if order.user_metadata is None else dict(order.user_metadata),
            created_at=now,
            expires_at=None if order.ttl_seconds is None else now + order.ttl_seconds,
        )

    async def _register(self, row: CheckpointRow, *, overwrite: bool) -> None:
        keep, in_use = self._superseded_versions_kept, self.in_use()

        def work(connection: sa.Connection) -> list[str]:
            records.register_checkpoint(connection, row, overwrite=overwrite)
            audit.note_checkpoint(connection, "checkpoint_create", row, row.created_at, size_bytes=row.size_bytes)
            doomed = records.delete_superseded(connection, row, row.created_at, keep=keep, in_use=in_use)
            return doomed + [old.folder for old in self.make_room(connection, row, row.created_at)]

        try:
            doomed = await self._registry.write(work)
        except Unsettled:
            raise  # it may be registered: what is listed must be there
        except TinsmithError:
            await self._remove_folders([row.folder])
            raise
        await self._remove_folders(doomed)
        self.on_saved(row.run_id)

    async def delete(
        self, row: CheckpointRow, event: AuditEvent = "checkpoint_delete", *, reason: str = "asked for"
    ) -> None:
        """All versions of the name, but unless it is asked for not those older ones that are published or pinned.

        Raises `StorageError` if the registry refuses; then nothing changed.
        """
        at = self._clock.time()

        def work(connection: sa.Connection) -> list[str]:
            audit.note_checkpoint(connection, event, row, at, reason=reason)
            return records.delete_versions(connection, row, at, by_rule=event != "checkpoint_delete")

        await self._remove_folders(await self._registry.write(work))
        logger.info("checkpoint %s was removed: %s", row.path, reason)

    async def delete_at(self, run_id: str, checkpoint_id: str, *, owner: str | None = None) -> None:
        """What a user names: a name with all its versions, or one version.

        Raises `NotFound`, and `InvalidInput` for an address that means something else later.
        """
        address = CheckpointAddress.parse(f"tinker://{run_id}/{checkpoint_id}")
        row = await self.find(address.path, owner=owner)
        if address.is_chosen:
            raise InvalidInput(f"{address.path!r} is {row.address!r} just now; delete that by its name or version")
        await (self.delete(row) if address.version is None else self.delete_version(row))

    async def delete_version(
        self, row: CheckpointRow, event: AuditEvent = "checkpoint_delete", *, reason: str = "asked for"
    ) -> None:
        """This one alone; nothing takes the place of a current version. Raises as `delete`."""
        at = self._clock.time()

        def work(connection: sa.Connection) -> None:
            audit.note_checkpoint(connection, event, row, at, version=row.version, reason=reason)
            records.update_checkpoint(connection, row.checkpoint_id, deleted_at=at)

        await self._registry.write(work)
        await self._remove_folders([row.folder])
        logger.info("checkpoint %s was removed: %s", row.address, reason)

    async def set_ttl(self, row: CheckpointRow, ttl_seconds: int | None) -> None:
        check_ttl(ttl_seconds)
        at = self._clock.time()
        expires_at = None if ttl_seconds is None else at + ttl_seconds

        def work(connection: sa.Connection) -> None:
            audit.note_checkpoint(connection, "checkpoint_ttl_set", row, at, ttl_seconds=ttl_seconds)
            records.update_checkpoint(connection, row.checkpoint_id, expires_at=expires_at)

        await self._registry.write(work)

    async def set_public(self, row: CheckpointRow, public: bool) -> None:
        """Idempotent; what changes nothing is not noted."""
        event: AuditEvent = "checkpoint_publish" if public else "checkpoint_unpublish"
        at = self._clock.time()

        def work(connection: sa.Connection) -> None:
            if row.public != public:
                audit.note_checkpoint(connection, event, row, at)
            records.update_checkpoint(connection, row.checkpoint_id, public=public)

        await self._registry.write(work)

    async def set_pinned(self, row: CheckpointRow, pinned: bool) -> None:
        """Whether rules may remove it. Idempotent; what changes nothing is not noted."""
        event: AuditEvent = "checkpoint_pin" if pinned else "checkpoint_unpin"
        metadata = {key: value for key, value in (row.user_metadata or {}).items() if key != records.PIN}
        if pinned:
            metadata[records.PIN] = records.PINNED
        at = self._clock.time()

        def work(connection: sa.Connection) -> None:
            if row.is_pinned != pinned:
                audit.note_checkpoint(connection, event, row, at)
            records.update_checkpoint(connection, row.checkpoint_id, user_metadata=metadata or None)

        await self._registry.write(work)

    def note_read(self, path: str, purpose: str, reader: str) -> None:
        """In the audit log of `reader`; without waiting for it."""
        run_id = ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
        details = {"tinker_path": path, "training_run_id": run_id, "purpose": purpose}
        at = self._clock.time()
        self._registry.post(lambda c: audit.note(c, "checkpoint_read", at, reader, **details))

    async def delete_expired(self) -> int:
        """The number of checkpoints deleted."""
        now = self._clock.time()
        expired = await self._registry.read(lambda c: records.expired_checkpoints(c, now))
        for row in expired:
            await self.delete(row, "checkpoint_expire", reason="its time to live is over")
        return len(expired)

    async def sweep_orphans(self) -> int:
        """Remove what an interrupted save or deletion left: folders in the place of a known run that no checkpoint
        owns. Folders of runs that this registry does not know are left alone. The number removed."""
        kept, run_ids = await self._registry.read(lambda c: (records.checkpoint_folders(c), records.run_ids(c)))
        known_runs = {_file_safe(run_id) for run_id in run_ids}
        orphans = [key for key in await self.folders.keys() if key.split("/")[1] in known_runs and key not in kept]
        await self._remove_folders(orphans)
        await self.folders.tidy()
        return len(orphans)

    async def _remove_folders(self, keys: list[str]) -> None:
        """What cannot be removed is left over, and swept when a server starts."""
        for key in keys:
            try:
                await self.folders.delete(key)
            except StorageError as error:
                logger.warning("%s", error)


def may_read(row: CheckpointRow, user_id: str) -> bool:
    """To whoever uses a data folder without keys, everything in it belongs."""
    return row.public or user_id in (row.owner, LOCAL_USER_ID)


def check_loadable(row: CheckpointRow, *, optimizer: bool) -> None:
    """Raises `InvalidInput` if optimizer state is asked of a checkpoint that has none."""
    if optimizer and not row.has_optimizer:
        raise InvalidInput(
            f"checkpoint {row.path!r} holds weights for sampling and no optimizer state; "
            "load it with optimizer=false, or a checkpoint made by save_state"
        )


def describe(row: CheckpointRow) -> dict[str, Any]:
    """What `checkpoint.json` says beside what the engine adds."""
    return {
        "id": row.checkpoint_id,
        "training_run_id": row.run_id,
        "name": row.name,
        "version": row.version,
        "parent": row.parent,
        "metrics": dict(row.metrics),
        "base_model": row.base_model,
        "tokenizer": row.tokenizer,
        "has_optimizer": row.has_optimizer,
        "created_at": records.moment(row.created_at).isoformat(),
    }


def _next_version(connection: sa.Connection, order: SaveOrder, now: float) -> int:
    older = records.versions(connection, order.model_id, order.kind, order.name)
    for row in older:
        is_current = row.superseded_at is None and row.deleted_at is None
        if is_current and not order.overwrite and (row.expires_at is None or row.expires_at > now):
            raise AlreadyExists(f"checkpoint {row.path!r} exists; set overwrite, or take another name")
    return older[0].version + 1 if older else 1


def _key(order: SaveOrder, version: int) -> str:
    return folder_key(order.model_id, order.kind, order.name, version)


def folder_key(run_id: str, kind: str, name: str, version: int) -> str:
    return "/".join([CHECKPOINTS, _file_safe(run_id), kind, _file_safe(name), f"v{version}"])


def _file_safe(name: str) -> str:
    """`~` stands in no run id and no checkpoint name, so that no two of them share a folder."""
    return name.replace(":", "~")
