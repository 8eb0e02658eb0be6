"""Which checkpoints stay: the newest of each run (keep-K), and how much may be stored.

Keep-K removes a run's older checkpoints after a save, each kind (`weights`, `sampler_weights`) counted for itself. It
never removes the newest, nor one that is published, pinned, or in use by a live model or sampler.

A budget never removes what can be named. What is superseded or expired makes room, the oldest first, unless it is
published, pinned or in use; if that is not enough, the save is refused. Copies and links count in full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa

from tinsmith.control import audit, records
from tinsmith.control.checkpoints import CheckpointStore
from tinsmith.control.errors import DiskBudgetExceeded
from tinsmith.control.identity import Clock
from tinsmith.control.metadata import KEEP, kept_by
from tinsmith.control.models import Model, ModelStatus
from tinsmith.control.records import CheckpointRow
from tinsmith.control.registry import Registry
from tinsmith.control.samplers import Sampler
from tinsmith.types.errors import InvalidInput

logger = logging.getLogger(__name__)

KEPT_KINDS = ("weights", "sampler_weights")
_MB = 1e6


class DiskQuota(Protocol):
    @property
    def disk_bytes(self) -> int | None: ...


class Quotas(Protocol):
    def quota_of_user(self, user_id: str) -> DiskQuota: ...

    def quota_of_project(self, project_id: str | None) -> DiskQuota: ...


def checkpoints_in_use(
    samplers: Iterable[Sampler], models: Iterable[Model], is_live: Callable[[str], bool]
) -> Set[str]:
    """Ids of checkpoints that samplers of live sessions sample, and that live models came from or saved last."""
    sampled = {s.checkpoint.checkpoint_id for s in samplers if s.checkpoint is not None and is_live(s.session_id)}
    live = [model for model in models if model.status is not ModelStatus.ENDED]
    origins = {m.creation.checkpoint.checkpoint_id for m in live if m.creation is not None and m.creation.checkpoint}
    return sampled | origins | {model.parent for model in live if model.parent is not None}


class Retention:
    def __init__(
        self,
        *,
        registry: Registry,
        checkpoints: CheckpointStore,
        clock: Clock,
        keep: int | None,
        in_use: Callable[[], Set[str]],
    ) -> None:
        """`in_use` tells ids of checkpoints that live models and samplers may read again."""
        self._registry = registry
        self._checkpoints = checkpoints
        self._clock = clock
        self._keep = keep
        self._in_use = in_use
        self._due: set[str] | None = None
        """Runs that may have more than they keep; `None` before all were looked at."""

    def saved(self, run_id: str) -> None:
        """A run has a checkpoint more."""
        if self._due is not None:
            self._due.add(run_id)

    async def tidy(self) -> int:
        """Remove what the rules of runs do not keep; the number of checkpoints removed."""
        if self._due is None:
            self._due = set(await self._registry.read(records.run_ids))
        removed = 0
        for run_id in list(self._due):
            removed += await self._tidy_run(run_id)
        return removed

    async def _tidy_run(self, run_id: str) -> int:
        in_use, now = self._in_use(), self._clock.time()
        surplus, keep = await self._registry.read(lambda c: self._surplus(c, run_id, now))
        free = [row for row, version_ids in surplus if in_use.isdisjoint(version_ids)]
        for row in free:
            await self._checkpoints.delete(row, "checkpoint_retire", reason=f"its run keeps the newest {keep}")
        if len(free) == len(surplus) and self._due is not None:
            self._due.discard(run_id)
        return len(free)

    def _surplus(
        self, connection: sa.Connection, run_id: str, now: float
    ) -> tuple[list[tuple[CheckpointRow, list[str]]], int | None]:
        """Each with the ids of all versions of its name."""
        run = records.run(connection, run_id)
        keep = None if run is None else _said(run.user_metadata, self._keep)
        if keep is None:
            return [], None
        surplus: list[CheckpointRow] = []
        for kind in KEPT_KINDS:
            rows = records.checkpoints(connection, now, run_id=run_id, kinds=[kind])[0]
            surplus += [row for row in rows if not (row.public or row.is_pinned)][keep:]
        ids = [[version.checkpoint_id for version in records.stored_versions(connection, row)] for row in surplus]
        return list(zip(surplus, ids, strict=True)), keep


def _said(metadata: Mapping[str, str], default: int | None) -> int | None:
    try:
        kept = kept_by(metadata)
    except InvalidInput:  # of a run of another version: nothing is removed on a guess
        return None
    return default if kept is None else kept


@dataclass(frozen=True, slots=True)
class _Limit:
    whose: str
    max_bytes: int
    owner: str | None = None
    project_id: str | None = None


class Budget:
    """How many bytes of checkpoints may be stored: in the data folder, per owner, per project."""

    def __init__(self, *, max_bytes: int | None, quotas: Quotas, in_use: Callable[[], Set[str]]) -> None:
        self._max_bytes = max_bytes
        self._quotas = quotas
        self._in_use = in_use

    def make_room(self, connection: sa.Connection, row: CheckpointRow, now: float) -> list[CheckpointRow]:
        """Called in the transaction that has registered `row`: what it had to mark deleted for it.

        Raises `DiskBudgetExceeded`, which undoes the transaction.
        """
        removed: list[CheckpointRow] = []
        for limit in self._limits(connection, row):
            removed += self._make_room_in(connection, row, limit, now)
        return removed

    def _limits(self, connection: sa.Connection, row: CheckpointRow) -> list[_Limit]:
        project_id = records.project_of_run(connection, row.run_id)
        limits = []
        if self._max_bytes is not None:
            limits.append(_Limit("this server", self._max_bytes))
        if (mine := self._quotas.quota_of_user(row.owner).disk_bytes) is not None:
            limits.append(_Limit(f"user {row.owner!r}", mine, owner=row.owner))
        if project_id is not None and (ours := self._quotas.quota_of_project(project_id).disk_bytes) is not None:
            limits.append(_Limit(f"project {project_id!r}", ours, project_id=project_id))
        return limits

    def _make_room_in(
        self, connection: sa.Connection, row: CheckpointRow, limit: _Limit, now: float
    ) -> list[CheckpointRow]:
        stored = records.stored_checkpoints(connection, owner=limit.owner, project_id=limit.project_id)
        taken, in_use = sum(one.size_bytes for one in stored), self._in_use()
        removed: list[CheckpointRow] = []
        for old in stored:
            if taken <= limit.max_bytes:
                return removed
            is_past = old.superseded_at is not None or (old.expires_at is not None and old.expires_at <= now)
            if is_past and not (old.public or old.is_pinned or old.checkpoint_id in in_use):
                records.update_checkpoint(connection, old.checkpoint_id, deleted_at=now)
                reason = f"{limit.whose} needed its room"
                audit.note_checkpoint(connection, "checkpoint_evict", old, now, version=old.version, reason=reason)
                logger.info("checkpoint %s was removed: %s", old.address, reason)
                removed.append(old)
                taken -= old.size_bytes
        if taken <= limit.max_bytes:
            return removed
        raise DiskBudgetExceeded(
            f"checkpoint {row.path!r} takes {row.size_bytes / _MB:.1f} MB; {limit.whose} may store "
            f"{limit.max_bytes / _MB:.1f} MB and has {(taken - row.size_bytes) / _MB:.1f} MB of checkpoints. Delete "
            f"some, let them expire (ttl_seconds), or keep fewer per run ({KEEP})"
        )
