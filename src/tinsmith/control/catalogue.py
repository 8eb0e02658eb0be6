"""What can be looked up: runs, checkpoints, sessions, and what stands behind a path."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from tinsmith.control import records
from tinsmith.control.checkpoints import CheckpointStore
from tinsmith.control.identity import Clock
from tinsmith.control.records import RunRow
from tinsmith.control.registry import Registry
from tinsmith.control.session_search import shown_metadata
from tinsmith.control.training import Training
from tinsmith.types.checkpoint import PATH_KINDS, Checkpoint
from tinsmith.types.errors import InvalidInput, NotFound
from tinsmith.types.rest import GetSessionResponse, TrainingRun, WeightsInfoResponse

MAX_PAGE = 1000


class Catalogue:
    def __init__(self, *, registry: Registry, checkpoints: CheckpointStore, training: Training, clock: Clock) -> None:
        self._registry = registry
        self._checkpoints = checkpoints
        self._training = training
        self._clock = clock

    async def session(self, session_id: str) -> GetSessionResponse:
        """Raises `NotFound`."""

        def work(connection: sa.Connection) -> GetSessionResponse:
            row = records.session(connection, session_id)
            if row is None:
                raise NotFound(f"no session {session_id!r}")
            run_ids = records.run_ids_of_session(connection, session_id)
            corrupted = records.corrupted_runs(connection, session_id)
            return GetSessionResponse(
                training_run_ids=run_ids,
                corrupted_training_run_ids=[i for i in run_ids if i in corrupted or self._training.is_corrupted(i)],
                sampler_ids=records.sampler_ids_of_session(connection, session_id),
                user_metadata=shown_metadata(row.user_metadata),
                display_name=row.display_name,
            )

        await self._registry.flush()  # the newest samplers are recorded without waiting
        return await self._registry.read(work)

    async def sessions(self, limit: int, offset: int, owner: str | None = None) -> tuple[list[str], int]:
        _check_page(limit, offset)
        return await self._registry.read(lambda c: records.sessions(c, limit, offset, owner))

    async def training_run(self, run_id: str) -> TrainingRun:
        """Raises `NotFound`."""

        def work(connection: sa.Connection) -> TrainingRun:
            row = records.run(connection, run_id)
            if row is None:
                raise NotFound(f"no training run {run_id!r}")
            return self._describe(connection, row)

        return await self._registry.read(work)

    async def training_runs(
        self, limit: int, offset: int, project_id: str | None = None, owner: str | None = None
    ) -> tuple[list[TrainingRun], int]:
        _check_page(limit, offset)

        def work(connection: sa.Connection) -> tuple[list[TrainingRun], int]:
            rows, total = records.runs(connection, limit, offset, project_id, owner)
            return [self._describe(connection, row) for row in rows], total

        return await self._registry.read(work)

    def _describe(self, connection: sa.Connection, row: RunRow) -> TrainingRun:
        now = self._clock.time()
        state = records.newest_checkpoint(connection, row.run_id, "weights", now)
        sampler = records.newest_checkpoint(connection, row.run_id, "sampler_weights", now)
        return TrainingRun(
            training_run_id=row.run_id,
            base_model=row.base_model,
            model_owner=row.owner,
            is_lora=True,
            corrupted=row.corrupted or self._training.is_corrupted(row.run_id),
            lora_rank=row.lora["rank"],
            last_request_time=records.moment(self._training.last_request_at(row.run_id) or row.last_request_at),
            last_checkpoint=None if state is None else records.describe(connection, [state])[0],
            last_sampler_checkpoint=None if sampler is None else records.describe(connection, [sampler])[0],
            user_metadata=dict(row.user_metadata),
        )

    async def checkpoints_of_run(self, run_id: str, kinds: Collection[str] = PATH_KINDS) -> list[Checkpoint]:
        """Newest first. Raises `NotFound` for an unknown run."""
        now = self._clock.time()

        def work(connection: sa.Connection) -> list[Checkpoint]:
            if records.run(connection, run_id) is None:
                raise NotFound(f"no training run {run_id!r}")
            return records.describe(connection, records.checkpoints(connection, now, run_id=run_id, kinds=kinds)[0])

        return await self._registry.read(work)

    async def checkpoint(self, run_id: str, checkpoint_id: str, reader: str | None = None) -> Checkpoint:
        """What `<kind>/<address>` means now; its `tinker_path` says which. Raises `InvalidInput`, `NotFound`."""
        row = await self._checkpoints.find_in_run(run_id, checkpoint_id, reader=reader)
        (found,) = await self._registry.read(lambda c: records.describe(c, [row]))
        return found.model_copy(update={"tinker_path": row.present_path})

    async def checkpoints(
        self, limit: int, offset: int, kinds: Collection[str] = PATH_KINDS, owner: str | None = None
    ) -> tuple[list[Checkpoint], int]:
        _check_page(limit, offset)
        now = self._clock.time()

        def work(connection: sa.Connection) -> tuple[list[Checkpoint], int]:
            rows, total = records.checkpoints(connection, now, kinds=kinds, owner=owner, limit=limit, offset=offset)
            return records.describe(connection, rows), total

        return await self._registry.read(work)

    async def weights_info(self, path: str, reader: str | None = None) -> WeightsInfoResponse:
        """Raises `InvalidInput` for no path, `NotFound` for no checkpoint that `reader` may read."""
        row = await self._checkpoints.find(path, reader=reader)
        return WeightsInfoResponse(
            base_model=row.base_model,
            is_lora=True,
            lora_rank=row.lora["rank"],
            train_unembed=row.lora["train_unembed"],
            train_mlp=row.lora["train_mlp"],
            train_attn=row.lora["train_attn"],
        )


def _check_page(limit: int, offset: int) -> None:
    if not 0 <= limit <= MAX_PAGE:
        raise InvalidInput(f"limit must be 0..{MAX_PAGE}, not {limit!r}")
    if not 0 <= offset < 2**63:
        raise InvalidInput(f"offset must be 0..2**63 - 1, not {offset!r}")
