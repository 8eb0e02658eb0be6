"""Snapshots of live models: where a replay begins. Taken in the background, in the model's order of requests.

A snapshot holds everything before one request and nothing after: the model takes no turn until what runs is answered,
the engine is asked to copy the adapter, and goes on at once; the copy is written aside. Once it is on disk the ledger
forgets the requests that it holds.

`data_dir/snapshots/<model>/<number>/`, and `weights-<sampler>` beside it for unnamed samplers that a replay would not
publish again.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmith.control.engines import EngineSlot
from tinsmith.control.identity import Clock
from tinsmith.control.journal import Journal, SnapshotRecord, WeightsRecord
from tinsmith.control.ledger import Change, Entry, put, remove
from tinsmith.control.models import Model, ModelStatus, Residence
from tinsmith.control.samplers import Sampler, SamplerBook
from tinsmith.control.training import Training
from tinsmith.types.crash_points import crash_point
from tinsmith.types.errors import EngineDied, TinsmithError
from tinsmith.types.operations import SaveAdapter, SaveSnapshot

logger = logging.getLogger(__name__)

FOLDER = "snapshots"


@dataclass(frozen=True, slots=True)
class _Aside:
    """Weights of an unnamed sampler that are being written."""

    samplers: list[Sampler]
    """All that sample these weights."""
    folder: str
    answer: Any

    @property
    def snapshot_id(self) -> str:
        return self.samplers[-1].sampler_id

    def settle(self, *, is_kept: bool) -> None:
        for sampler in self.samplers:
            sampler.is_saving = False
            if is_kept and sampler.snapshot_id == self.snapshot_id:  # else it follows newer weights by now
                sampler.weights_folder = self.folder


class Snapshots:
    def __init__(
        self,
        *,
        data_dir: Path,
        training: Training,
        samplers: SamplerBook,
        journal: Journal,
        clock: Clock,
        interval_s: float,
        max_requests: int,
        max_tokens: int,
    ) -> None:
        self._data_dir = data_dir
        self._training = training
        self._samplers = samplers
        self._journal = journal
        self._clock = clock
        self._interval_s = interval_s
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._tasks: dict[asyncio.Task[Any], EngineSlot] = {}
        """Each with the engine that writes."""
        self._saves: dict[str, asyncio.Task[TinsmithError | None]] = {}
        """Of models, by id."""
        self._weight_saves: dict[str, asyncio.Task[None]] = {}
        """Of unnamed samplers alone, by the snapshot they share."""
        samplers.on_superseded = self._superseded

    def watch(self, slots: Iterable[EngineSlot]) -> None:
        for slot in slots:
            self._training.scheduler(slot).take_snapshot = self._take

    def consider(self) -> None:
        """Ask for a snapshot of every model whose replay would be long."""
        now = self._clock.monotonic()
        for model in self._training.models:
            if model.slot is None or model.slot.dead is not None or not self._is_due(model, now):
                continue
            model.snapshot_due = True
            self._training.scheduler(model.slot).wake()

    def _is_due(self, model: Model, now: float) -> bool:
        num_done = model.queue.next_seq - model.first_seq
        if model.status is not ModelStatus.LIVE or model.is_saving or model.snapshot_due or num_done == 0:
            return False
        is_long = num_done >= self._max_requests or model.replayed_tokens >= self._max_tokens
        return is_long or now - model.snapshot_at >= self._interval_s

    async def put_away(self, model: Model) -> None:
        """Have on disk what a model is now; nothing of it runs, and it takes no turns meanwhile. Numbers that are given
        up meanwhile change nothing in it.

        Raises `StorageError`, or what else kept it from being written.
        """
        if (running := self._saves.get(model.model_id)) is not None:
            await asyncio.wait([running])
        if model.is_kept or model.has_ended:
            return
        self._take(model, is_idle=True)
        save = self._saves.get(model.model_id)
        if save is None:
            raise EngineDied(f"model {model.model_id!r} could not be written: its engine is gone")
        error = await asyncio.shield(save)
        if error is not None:
            raise error

    async def put_weights_away(self, samplers: list[Sampler]) -> None:
        """Have on disk what unnamed samplers share. Raises `StorageError`, or what else kept it from being written."""
        name = samplers[-1].sampler_id
        if name not in self._weight_saves:
            if samplers[-1].is_saving or samplers[-1].weights_folder is not None:
                return
            aside = self._put_aside(samplers[-1].slot, samplers)
            task = asyncio.create_task(self._complete_weights(aside))
            self._weight_saves[name] = task
            self._track(task, aside.samplers[-1].slot)
            task.add_done_callback(lambda _: self._weight_saves.pop(name, None))
        await asyncio.shield(self._weight_saves[name])

    async def _complete_weights(self, aside: _Aside) -> None:
        is_kept = False
        try:
            await aside.answer
            await self._journal.write([put(entry) for entry in _weights_entries(aside)])
            is_kept = True
        finally:
            aside.settle(is_kept=is_kept)

    def _track(self, task: asyncio.Task[Any], slot: EngineSlot) -> None:
        def ended(task: asyncio.Task[Any]) -> None:
            del self._tasks[task]
            if not task.cancelled():
                task.exception()  # whoever waits gets it

        self._tasks[task] = slot
        task.add_done_callback(ended)

    def _take(self, model: Model, *, is_idle: bool = False) -> None:
        """Order it, with everything the model has done and nothing else. Nothing of the model runs.

        It stays due while another is written.
        """
        if model.is_saving:
            return
        model.snapshot_due, model.replayed_tokens = False, 0
        if model.status is not ModelStatus.LIVE and not (is_idle and model.status is ModelStatus.CLOSING):
            return
        if model.slot is None or model.residence in (Residence.ABSENT, Residence.ENTERING):
            return
        next_seq = model.queue.next_seq
        folder = f"{FOLDER}/{model.model_id.replace(':', '~')}/{next_seq}"
        if model.snapshot is not None and model.snapshot.folder == folder:
            return
        record = SnapshotRecord(
            next_seq=next_seq, folder=folder, metrics=dict(model.metrics), parent=model.parent, lora=model.lora
        )
        path = self._data_dir / folder
        shutil.rmtree(path, ignore_errors=True)  # left by one that was never in the ledger
        operation = SaveAdapter(
            model_id=model.model_id,
            folder=str(path),
            optimizer=True,
            gradients=True,
            is_idle=is_idle,
            record={"training_run_id": model.model_id, "next_seq": next_seq},
        )
        try:
            saved = model.slot.submit(operation).answer
            aside = [self._put_aside(model.slot, samplers) for samplers in self._unkept_samplers(model)]
        except EngineDied:
            return
        model.is_saving = True
        task = asyncio.create_task(self._complete(model, record, saved, aside))
        self._saves[model.model_id] = task
        self._track(task, model.slot)

    def _unkept_samplers(self, model: Model) -> list[list[Sampler]]:
        """That only requests before the snapshot would publish again, by the weights they share."""
        inflight = self._samplers.inflight(model.model_id)
        is_unkept = bool(inflight) and inflight[-1].weights_folder is None and not inflight[-1].is_saving
        shared = [inflight] if is_unkept else []
        return shared + [
            [sampler]
            for sampler in self._samplers
            if sampler.model_id == model.model_id
            and sampler.is_ephemeral
            and sampler.gone is None
            and sampler.weights_folder is None
            and not sampler.is_saving
            and not self._samplers.is_expected(sampler.sampler_id)
        ]

    def _put_aside(self, slot: EngineSlot, samplers: list[Sampler]) -> _Aside:
        sampler = samplers[-1]
        folder = f"{FOLDER}/weights-{sampler.sampler_id.replace(':', '~')}"
        shutil.rmtree(self._data_dir / folder, ignore_errors=True)
        operation = SaveSnapshot(snapshot_id=sampler.sampler_id, folder=str(self._data_dir / folder))
        answer = slot.submit(operation).answer
        for sharing in samplers:
            sharing.is_saving = True
        return _Aside(list(samplers), folder, answer)

    async def _complete(
        self, model: Model, record: SnapshotRecord, saved: Any, aside: list[_Aside]
    ) -> TinsmithError | None:
        """What kept it from being taken, if something did."""
        others = [save for name, save in self._weight_saves.items() if self._is_of(name, model)]
        try:
            await asyncio.gather(saved, *(one.answer for one in aside), *others)
            crash_point("snapshot.written")
            if model.has_ended:
                await asyncio.to_thread(_remove, self._data_dir / record.folder)
                return None
            await self._journal.write(self._changes(model, record, aside))
            crash_point("snapshot.committed")
            await self._committed(model, record, aside)
        except EngineDied as error:
            return error
        except TinsmithError as error:
            logger.warning("no snapshot of model %r could be taken: %s", model.model_id, error)
            model.snapshot_at = self._clock.monotonic()
            return error
        finally:
            model.is_saving = False
            del self._saves[model.model_id]
            for one in aside:
                one.settle(is_kept=False)
            if model.slot is not None:
                self._training.scheduler(model.slot).wake()
        return None

    def _is_of(self, snapshot_id: str, model: Model) -> bool:
        sampler = self._samplers.get(snapshot_id)
        return sampler is not None and sampler.model_id == model.model_id

    def _changes(self, model: Model, record: SnapshotRecord, aside: list[_Aside]) -> list[Change]:
        def entry(kind: str, name: str, value: object) -> Entry:
            return Entry(kind=kind, name=name, session_id=model.session_id, model_id=model.model_id, value=value)

        results = self._training.entries.results_of(model, record.next_seq)
        self._journal.lone.update(result.name for result in results)
        weights = [weights_entry for one in aside for weights_entry in _weights_entries(one)]
        spent = "model_id = ? AND seq < ? AND kind IN ('request', 'binding', 'strike')"
        return [
            *(put(result) for result in results),
            *(put(one) for one in weights),
            put(entry("snapshot", model.model_id, record)),
            remove(spent, model.model_id, record.next_seq),
        ]

    async def _committed(self, model: Model, record: SnapshotRecord, aside: list[_Aside]) -> None:
        old, model.snapshot = model.snapshot, record
        model.snapshot_at = self._clock.monotonic()
        for seq in [seq for seq in model.journaled if seq < record.next_seq]:
            del model.journaled[seq]
        for one in aside:
            one.settle(is_kept=True)
        if old is not None and old.folder != record.folder:
            await asyncio.to_thread(_remove, self._data_dir / old.folder)

    def _superseded(self, sampler: Sampler) -> None:
        """Nobody can sample it any more."""
        if sampler.weights_folder is not None:
            self._journal.note([remove("kind = 'weights' AND name = ?", sampler.sampler_id)])
            folder, sampler.weights_folder = self._data_dir / sampler.weights_folder, None
            asyncio.get_running_loop().run_in_executor(None, _remove, folder)

    async def sweep(self) -> None:
        """Remove folders that no live model and no live sampler goes back to."""
        root = self._data_dir / FOLDER
        found = await asyncio.to_thread(lambda: [*root.glob("*/*"), *root.glob("weights-*")])
        unwanted = [path for path in found if not self._is_wanted(path)]
        for path in unwanted:
            if self._saves or self._weight_saves:
                return
            if not self._is_wanted(path):  # asked again: a snapshot may have come to its end meanwhile
                await asyncio.to_thread(_remove, path)

    def _is_wanted(self, path: Path) -> bool:
        if path.parent.name.startswith("weights-"):  # a file of such a folder
            return True
        folder = path.relative_to(self._data_dir).as_posix()
        return any(m.snapshot and m.snapshot.folder == folder and m.end is None for m in self._training.models) or any(
            sampler.weights_folder == folder for sampler in self._samplers
        )

    async def drain(self, slot: EngineSlot | None = None) -> None:
        """Wait for those that are being written, by one engine or by all."""
        while tasks := [task for task, writer in self._tasks.items() if slot in (None, writer)]:
            await asyncio.wait(tasks)


def _weights_entries(aside: _Aside) -> list[Entry]:
    return [
        Entry(
            kind="weights",
            name=sampler.sampler_id,
            session_id=sampler.session_id,
            value=WeightsRecord(
                base_model=sampler.slot.card.name,
                folder=aside.folder,
                model_id=sampler.model_id or "",
                model_path=sampler.model_path,
                digest=sampler.digest,
                origin=sampler.origin,
                snapshot_id=aside.snapshot_id,
                inflight_of=sampler.inflight_of,
                num_bytes=sampler.num_bytes,
            ),
        )
        for sampler in aside.samplers
    ]


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass  # removed before
    except OSError as error:
        logger.warning("cannot remove snapshot folder %s: %s", folder, error)
