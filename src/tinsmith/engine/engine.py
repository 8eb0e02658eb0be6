"""One engine: a base model, its adapters and snapshots, and the loop body that serves training and sampling in turn.

Operations on adapters run strictly in the order they came. Sampling runs beside them: after every training micro-batch
or decode step the side that has had less of the device's time goes next, so that neither starves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import psutil
import torch

from tinsmith.engine.adapter import Adapter, optim_steps
from tinsmith.engine.adapter_pool import AdapterPool
from tinsmith.engine.aside import Aside
from tinsmith.engine.base_model import BaseModel
from tinsmith.engine.checkpoint_io import StoredAdapter, load_checkpoint, save_checkpoint, save_weights
from tinsmith.engine.figures import Figures
from tinsmith.engine.lora import LoraLayout, LoraWeights
from tinsmith.engine.merged_export import Merge, export_merged
from tinsmith.engine.peft_import import import_adapter
from tinsmith.engine.sampler import Sampler
from tinsmith.engine.tokenizer import load_decoder
from tinsmith.engine.trainer import Finished, Trainer
from tinsmith.types.crash_points import crash_point
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import NotFound, ServerError, TinsmithError
from tinsmith.types.operations import (
    Answer,
    CancelSample,
    CreateAdapter,
    DropAdapter,
    DropSnapshot,
    EngineStatus,
    ImportAdapter,
    ImportedAdapter,
    LoadAdapter,
    LoadSnapshot,
    LoraSpec,
    MergeAdapter,
    Operation,
    OptimStep,
    ParkAdapter,
    Ping,
    PublishSnapshot,
    Sample,
    SaveAdapter,
    SavedCheckpoint,
    SaveSnapshot,
    TrainItem,
    UnparkAdapter,
)
from tinsmith.types.params import AdamParams
from tinsmith.types.pulse import Pulse
from tinsmith.types.shares import FairLine

Outcome: TypeAlias = Answer | TinsmithError
_Kind = TypeVar("_Kind", TrainItem, OptimStep)
_MAX_LEAD_S = 0.25
"""How far one side's time account may fall behind: idle time is not saved up."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Frozen weights that can be sampled."""

    weights: LoraWeights
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class _WaitingSample:
    ticket: int
    operation: Sample
    snapshot: Snapshot | None


class Engine:
    """Not thread-safe: one thread calls `accept` and `work`."""

    def __init__(self, source: ModelSource, options: EngineOptions) -> None:
        """Loads the base model, inside `process_settings`. Raises `UserError` if it is not found or not supported."""
        self._base = BaseModel(source, options)
        self._options = options
        self.figures = Figures()
        self._num_pulses = 0
        self._is_deterministic = options.deterministic
        self._adapters = AdapterPool(self._base.device)
        self._snapshots: dict[str, Snapshot] = {}
        self._trainer = Trainer(
            self._base,
            max_micro_batch_tokens=options.max_micro_batch_tokens,
            share_passes=not options.deterministic,
            figures=self.figures,
        )
        self._done: list[tuple[int, Outcome]] = []
        self._sampler = Sampler(
            self._base,
            load_decoder(source),
            lambda ticket, outcome: self._done.append((ticket, outcome)),
            kv_cache_bytes=min(options.kv_cache_bytes, self._base.kv_bytes_useful),
            max_prefill_tokens=options.max_prefill_tokens,
            max_decode_batch=options.max_decode_batch,
            keep_prompts=not options.deterministic,
            figures=self.figures,
        )
        self._samples: FairLine[_WaitingSample] = FairLine()
        """Only where no two requests may share a pass: the samples that wait for the one that is drawn."""
        self._queue: deque[tuple[int, Operation]] = deque()
        self._pages: deque[tuple[int, Operation]] = deque()
        """Adapters that come and go; they wait for no pass but the one that runs."""
        self._training: tuple[list[int], Generator[list[Finished]]] | None = None
        self._training_ids: set[str] = set()
        """Whose adapters it passes through."""
        self._training_time_s = 0.0
        self._sampling_time_s = 0.0
        self._aside: Aside[Outcome, tuple[int, Operation]] = Aside()
        self.card = self._base.card

    @property
    def has_work(self) -> bool:
        return bool(
            self._queue
            or self._pages
            or self._training
            or self._sampler.has_work
            or self._samples
            or self._done
            or self._aside
        )

    def accept(self, ticket: int, operation: Operation) -> None:
        """Queue one operation; its outcome appears in a later `work`."""
        match operation:
            case Sample():
                self._add_sample(ticket, operation)
            case CancelSample():
                self._cancel_sample(operation.ticket)
                self._done.append((ticket, None))
            case Ping():
                self._done.append((ticket, self.status()))
            case _ if self._may_overtake(operation):
                self._pages.append((ticket, operation))
            case _:
                self._queue.append((ticket, operation))

    def _may_overtake(self, operation: Operation) -> bool:
        """Adapters come and go between any two passes, unless something else was asked of the same one before."""
        match operation:
            case (
                LoadAdapter(model_id=model_id, gradients=True)
                | SaveAdapter(model_id=model_id, gradients=True, is_idle=True)
                | DropAdapter(model_id=model_id)
                | ParkAdapter(model_id=model_id)
                | UnparkAdapter(model_id=model_id)
            ):
                asked = model_id in self._training_ids or self._aside.has_waiting(model_id)
                return not asked and all(getattr(o, "model_id", None) != model_id for _, o in self._queue)
        return False

    def _turn_pages(self) -> None:
        while self._pages:
            ticket, operation = self._pages.popleft()
            if self._aside.keeps_waiting(getattr(operation, "model_id", None), (ticket, operation)):
                continue
            match operation:
                case SaveAdapter():
                    self._save_aside(ticket, operation)
                case LoadAdapter():
                    self._load_aside(ticket, operation)
                case _:
                    work = partial(self._execute, operation)
                    self._done.append((ticket, self._attempt(type(operation).__name__, work)))

    def work(self) -> list[tuple[int, Outcome]]:
        """One slice of work: an operation, a micro-batch, or a sampling step. Returns what is finished."""
        with self.figures.slice():
            return self._work()

    def _work(self) -> list[tuple[int, Outcome]]:
        if not self._is_deterministic:
            self._base.adopt_compiled_layers()
        if self._samples and not self._sampler.has_work:
            self._draw_next()
        self._turn_pages()
        has_training = self._training is not None or self._next_operation() is not None
        if has_training and not (self._sampler.has_work and self._sampling_time_s < self._training_time_s):
            self._training_time_s = self._timed(self._advance_training, self._training_time_s, self._sampling_time_s)
        elif self._sampler.has_work:
            # how a prompt is cut must not depend on what else waits, where every bit counts
            step = partial(self._sampler.step, shared=has_training and not self._is_deterministic)
            self._sampling_time_s = self._timed(step, self._sampling_time_s, self._training_time_s)
        elif self._aside and not self._done:
            self._aside.wait()
        outcomes, freed = self._aside.collect()
        self._done.extend(outcomes)
        self._queue.extendleft(reversed(freed))
        done, self._done = self._done, []
        return done

    def _next_operation(self) -> Operation | None:
        """The first of the queue whose adapter is not held by what is written or read aside."""
        while self._queue:
            operation = self._queue[0][1]
            if not self._aside.keeps_waiting(getattr(operation, "model_id", None), self._queue[0]):
                return operation
            self._queue.popleft()
        return None

    def own_process(self) -> None:
        """Make the most of a process that is the engine's alone; it must end by `os._exit`."""
        self._base.own_process(compile_layers=not self._is_deterministic)

    def status(self) -> EngineStatus:
        return EngineStatus(
            num_adapters=len(self._adapters) + self._adapters.num_parked,
            num_snapshots=len(self._snapshots),
            num_running=self._sampler.num_running,
            num_waiting=self._sampler.num_waiting,
            rss_bytes=psutil.Process().memory_info().rss,
            tokens_trained=self._trainer.tokens_trained,
            tokens_sampled=self._sampler.tokens_sampled,
        )

    def pulse(self) -> Pulse:
        """May be called from any thread, at any time."""
        self._num_pulses += 1
        figures, device = self.figures, self._base.device
        blocks, free = self._sampler.cache_blocks
        return Pulse(
            number=self._num_pulses,
            slice_s=figures.slice_s,
            num_slices=figures.num_slices,
            phase_s=figures.phase_s(),
            tokens_trained=self._trainer.tokens_trained,
            tokens_prefilled=self._sampler.tokens_prefilled,
            tokens_sampled=self._sampler.tokens_sampled,
            num_training_passes=figures.num_training_passes,
            num_decode_passes=figures.num_decode_passes,
            num_decode_rows=figures.num_decode_rows,
            training_pass_tokens_max=self._options.max_micro_batch_tokens,
            decode_batch_max=self._options.max_decode_batch,
            num_running=self._sampler.num_running,
            num_waiting=self._sampler.num_waiting + len(self._samples),
            num_adapters=len(self._adapters),
            num_snapshots=len(self._snapshots),
            cache_blocks=blocks,
            cache_blocks_free=free,
            rss_bytes=psutil.Process().memory_info().rss,
            device_bytes=torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
        )

    @staticmethod
    def _timed(step: Any, spent_s: float, other_s: float) -> float:
        start = time.perf_counter()
        step()
        return max(spent_s, other_s - _MAX_LEAD_S) + time.perf_counter() - start

    def _advance_training(self) -> None:
        """One pass of the training requests that run, or the next operation; several optimizer steps count as one."""
        if self._training is not None and self._next_pass(*self._training):
            return
        match self._next_operation():
            case None:
                return
            case TrainItem():
                crash_point("engine.train")
                tickets, items = self._take_all(TrainItem)
                self._training = (tickets, self._trainer.run(items, self._adapters))
                self._training_ids = {item.model_id for item in items}
                self._next_pass(*self._training)
            case OptimStep():
                crash_point("engine.optim_step")
                tickets, steps = self._take_all(OptimStep)
                self._done.extend(zip(tickets, self._optim_steps(steps), strict=True))
            case SaveAdapter(gradients=True) | SaveSnapshot():
                self._save_aside(*self._queue.popleft())
            case LoadAdapter(gradients=True):
                self._load_aside(*self._queue.popleft())
            case ImportAdapter() as arrived:
                work = partial(self._import_adapter, arrived)
                self._aside.convert(self._queue.popleft()[0], lambda: self._attempt("importing", work))
            case MergeAdapter() as merging:
                merge = partial(self._merge_adapter, merging)
                self._aside.convert(self._queue.popleft()[0], lambda: self._attempt("merging", merge))
            case _:
                ticket, operation = self._queue.popleft()
                self._done.append((ticket, self._attempt(type(operation).__name__, partial(self._execute, operation))))

    def _next_pass(self, tickets: Sequence[int], passes: Generator[list[Finished]]) -> bool:
        try:
            self._done.extend((tickets[index], outcome) for index, outcome in next(passes))
        except StopIteration:
            self._training = None
            self._training_ids = set()
        return self._training is not None

    def _take_all(self, kind: type[_Kind]) -> tuple[list[int], list[_Kind]]:
        """The operations of one kind at the head of the queue; of optimizer steps, one for each adapter."""
        tickets: list[int] = []
        taken: list[_Kind] = []
        stepped: set[str] = set()
        while isinstance(operation := self._next_operation(), kind):
            if isinstance(operation, OptimStep):
                if operation.model_id in stepped:
                    break
                stepped.add(operation.model_id)
            tickets.append(self._queue.popleft()[0])
            taken.append(operation)
        return tickets, taken

    def _optim_steps(self, steps: Sequence[OptimStep]) -> list[Outcome]:
        outcomes: dict[str, Outcome] = {}
        due: list[tuple[Adapter, AdamParams]] = []
        for step in steps:
            try:
                due.append((self._adapters.on_device(step.model_id), step.params))
            except NotFound as error:
                outcomes[step.model_id] = error
        with self.figures.phase("optimizer"):
            stepped = optim_steps(due)
        for (adapter, _), outcome in zip(due, stepped, strict=True):
            outcomes[adapter.model_id] = outcome
        return [outcomes[step.model_id] for step in steps]

    @staticmethod
    def _attempt(what: str, work: Callable[[], Answer]) -> Outcome:
        try:
            return work()
        except TinsmithError as error:
            return error
        except (RuntimeError, MemoryError) as error:  # what torch raises for out-of-memory and device faults
            return ServerError(f"{what} failed on the device: {error}")

    def _save_aside(self, ticket: int, operation: Operation) -> None:
        """Copy what is to be saved, now; the copy is written by a thread of its own."""

        def prepare() -> Answer:
            holds: str | None = None
            if isinstance(operation, SaveSnapshot):
                write: Callable[[], Answer] = partial(
                    self._save_snapshot, operation, self._snapshot(operation.snapshot_id)
                )
            elif isinstance(operation, SaveAdapter):
                adapter = self._adapters.anywhere(operation.model_id)
                holds = adapter.model_id if operation.is_idle else None
                write = partial(self._save_adapter, operation, adapter if operation.is_idle else adapter.copy())
            self._aside.write(ticket, lambda: self._attempt("saving", write), holds=holds)
            return None

        fault = self._attempt(type(operation).__name__, prepare)
        if fault is not None:
            self._done.append((ticket, fault))

    def _load_aside(self, ticket: int, operation: Operation) -> None:
        """Read an adapter's files by a thread; it appears on the device between two passes."""
        assert isinstance(operation, LoadAdapter)

        def read() -> Callable[[], Outcome]:
            found: list[StoredAdapter] = []
            fault = self._attempt("loading", lambda: found.append(self._stored_adapter(operation)))
            if fault is not None:
                return lambda: fault
            return lambda: self._attempt("loading", lambda: self._put_adapter(operation.model_id, found.pop()))

        self._aside.read(ticket, read, holds=operation.model_id)

    def _execute(self, operation: Operation) -> Answer:
        match operation:
            case CreateAdapter(model_id=model_id, lora=spec):
                self._adapters.check_new(model_id)
                self._adapters.put(Adapter(model_id, self._base.layout(spec), self._base.device))
                return None
            case LoadAdapter():
                return self._put_adapter(operation.model_id, self._stored_adapter(operation))
            case DropAdapter():
                self._adapters.drop(operation.model_id)
                return None
            case ParkAdapter():
                self._adapters.park(operation.model_id)
                return None
            case UnparkAdapter():
                self._adapters.unpark(operation.model_id)
                return None
            case SaveAdapter():
                return self._save_adapter(operation, self._adapters.on_device(operation.model_id))
            case PublishSnapshot():
                weights = self._adapters.on_device(operation.model_id).snapshot()
                return self._keep_snapshot(operation.snapshot_id, weights)
            case LoadSnapshot():
                return self._load_snapshot(operation)
            case DropSnapshot():
                self._drop_snapshot(operation.snapshot_id)
                return None
            case _:
                raise ServerError(f"the engine has no operation {type(operation).__name__}")

    def _stored_adapter(self, operation: LoadAdapter) -> StoredAdapter:
        return load_checkpoint(
            Path(operation.folder), self._base.sites, optimizer=operation.optimizer, gradients=operation.gradients
        )

    def _put_adapter(self, model_id: str, stored: StoredAdapter) -> LoraSpec:
        layout = self._base.layout(stored.spec)
        weights_P = stored.weights_P.to(self._base.device)
        adapter = Adapter(model_id, layout, self._base.device, weights=weights_P, step=stored.step)
        if stored.optimizer is not None:
            adapter.optimizer.exp_avg_P.copy_(stored.optimizer.exp_avg_P)
            adapter.optimizer.exp_avg_sq_P.copy_(stored.optimizer.exp_avg_sq_P)
            adapter.optimizer.count = stored.optimizer.count
        if stored.gradients is not None:
            adapter.grads_P.copy_(stored.gradients.grads_P)
            adapter.num_pending = stored.gradients.num_pending
            adapter.corrupted = stored.gradients.corrupted
        self._adapters.put(adapter)
        return stored.spec

    def _save_adapter(self, operation: SaveAdapter, adapter: Adapter) -> SavedCheckpoint:
        crash_point("engine.snapshot" if operation.gradients else "engine.save")
        return save_checkpoint(
            adapter,
            Path(operation.folder),
            optimizer=operation.optimizer,
            gradients=operation.gradients,
            base_model=self.card.name,
            other_modules=self._base.other_modules,
            record=operation.record,
        )

    def _merge_adapter(self, operation: MergeAdapter) -> SavedCheckpoint:
        stored = load_checkpoint(Path(operation.source), self._base.sites, optimizer=False)
        layout = LoraLayout(self._base.sites, stored.spec)
        digest = LoraWeights(layout, stored.weights_P).digest()
        return export_merged(
            self.card.source,
            Merge(layout, stored.weights_P, digest),
            Path(operation.folder),
            dtype=operation.dtype,
            record=operation.record,
        )

    def _import_adapter(self, operation: ImportAdapter) -> ImportedAdapter:
        layout, flat_P = import_adapter(
            Path(operation.source),
            self._base.sites,
            lambda spec: self._base.layout(spec, copies=1),
            self._base.weight_of,
        )
        weights = LoraWeights(layout, flat_P)
        saved = save_weights(
            weights,
            Path(operation.folder),
            base_model=self.card.name,
            other_modules=self._base.other_modules,
            digest=weights.digest(),
            record=operation.record,
        )
        return ImportedAdapter(lora=layout.spec, saved=saved)

    def _snapshot(self, snapshot_id: str) -> Snapshot:
        if snapshot_id not in self._snapshots:
            raise NotFound(f"sampler weights {snapshot_id!r} are not loaded")
        return self._snapshots[snapshot_id]

    def _save_snapshot(self, operation: SaveSnapshot, snapshot: Snapshot) -> str:
        save_weights(
            snapshot.weights,
            Path(operation.folder),
            base_model=self.card.name,
            other_modules=self._base.other_modules,
            digest=snapshot.digest,
        )
        return snapshot.digest

    def _load_snapshot(self, operation: LoadSnapshot) -> str:
        stored = load_checkpoint(Path(operation.folder), self._base.sites, optimizer=False)
        layout = self._base.layout(stored.spec, copies=1)
        weights = LoraWeights(layout, stored.weights_P.to(self._base.device)).freeze()
        return self._keep_snapshot(operation.snapshot_id, weights)

    def _keep_snapshot(self, snapshot_id: str, weights: LoraWeights) -> str:
        """Snapshots of equal content share their weights, and so their place in a batch and their cached prompts."""
        digest = weights.digest()
        same = next((s.weights for s in self._snapshots.values() if s.digest == digest), weights)
        self._drop_snapshot(snapshot_id)
        self._snapshots[snapshot_id] = Snapshot(same, digest)
        return digest

    def _drop_snapshot(self, snapshot_id: str) -> None:
        dropped = self._snapshots.pop(snapshot_id, None)
        if dropped is not None and all(s.digest != dropped.digest for s in self._snapshots.values()):
            self._sampler.forget(dropped.digest)

    def _add_sample(self, ticket: int, operation: Sample) -> None:
        snapshot = None if operation.snapshot_id is None else self._snapshots.get(operation.snapshot_id)
        if snapshot is None and operation.snapshot_id is not None:
            self._done.append((ticket, NotFound(f"sampler weights {operation.snapshot_id!r} are not loaded")))
            return
        waiting = _WaitingSample(ticket, operation, snapshot)
        if self._is_deterministic and self._sampler.has_work:
            self._samples.append(operation.payer, waiting)
        else:
            self._draw(waiting)

    def _draw_next(self) -> None:
        self._samples.shares.compete(self._samples.payers)
        sample = self._samples.popleft()
        operation = sample.operation
        self._samples.shares.charge(
            operation.payer, len(operation.prompt) + operation.num_samples * operation.max_tokens
        )
        self._draw(sample)

    def _draw(self, sample: _WaitingSample) -> None:
        weights, digest = (None, None) if sample.snapshot is None else (sample.snapshot.weights, sample.snapshot.digest)
        self._sampler.add(sample.ticket, sample.operation, weights, digest)

    def _cancel_sample(self, ticket: int) -> None:
        for waiting in self._samples:
            if waiting.ticket == ticket:
                self._samples.remove(waiting.operation.payer, waiting)
                self._draw(waiting)
                break
        self._sampler.cancel(ticket)
