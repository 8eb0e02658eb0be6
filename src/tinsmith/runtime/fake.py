"""A deterministic engine without a model: for tests of everything above the runtime, and for trying a client.

It answers every operation of `types.operations` with plausible values: log-probabilities from a hash of the tokens,
losses that fall with every optimizer step, checkpoints that are real (tiny) folders. Faults are scripted:

    engine = FakeEngine()
    engine.fail_next(SaveAdapter, StorageError("disk full"))   # the next save fails
    engine.fail_items("model", InvalidInput("bad datum"))      # the next TrainItem of that model fails
    engine.pause(); engine.resume()                            # nothing is answered in between
    engine.die("killed")                                       # every open call fails with EngineDied

Its text of a token is one letter: `chr(97 + token % 26)`, so that stop strings can be tried.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinsmith.runtime.fake_model import draw_all, forward, tokens_in_turn
from tinsmith.runtime.fake_weights import FakeWeights, read_folder, write_folder
from tinsmith.runtime.handle import EngineCall, Pulseless
from tinsmith.types.errors import (
    AdapterCorrupted,
    EngineDied,
    InvalidInput,
    NotFound,
    ServerError,
    TinsmithError,
    UserError,
)
from tinsmith.types.operations import (
    Answer,
    BaseModelCard,
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
from tinsmith.types.results import ForwardBackwardOutput, SampleResponse

FAKE_CARD = BaseModelCard(
    name="tinsmith/fake",
    source="tinsmith/fake",
    architecture="FakeForCausalLM",
    vocab_size=512,
    max_context=256,
    num_parameters=1000,
    dtype="float32",
    device="cpu",
    eos_token_ids=(0,),
    max_rank=64,
)


@dataclass(slots=True)
class _Adapter:
    weights: FakeWeights
    gradient_norm: float = 0.0
    has_gradients: bool = False


@dataclass(slots=True)
class _Job:
    call: EngineCall
    operation: Operation

    @property
    def ticket(self) -> int:
        return self.call.ticket

    @property
    def answer(self) -> asyncio.Future[Any]:
        return self.call.answer


class FakeEngine(Pulseless):
    """An `EngineHandle`. `operations` lists what was submitted, in order; `bursts` what was submitted together."""

    def __init__(
        self, card: BaseModelCard = FAKE_CARD, *, delay_s: float = 0.0, start_error: UserError | None = None
    ) -> None:
        self.num_starts = 0
        self.operations: list[Operation] = []
        self.bursts: list[tuple[Operation, ...]] = []
        self.delay_s = delay_s
        self._card = card
        self._start_error = start_error
        self._started = False
        self._dead: str | None = None
        self._adapters: dict[str, _Adapter] = {}
        self._parked: dict[str, _Adapter] = {}
        self._snapshots: dict[str, FakeWeights] = {}
        self._faults: deque[tuple[type, TinsmithError]] = deque()
        self._item_faults: deque[tuple[str, TinsmithError]] = deque()
        self._tickets = itertools.count(1)
        self._lanes = {lane: _Lane(self) for lane in ("train", "sample")}
        self._tokens_trained = 0
        self._tokens_sampled = 0
        self._handlers: dict[type, Callable[[Any], Answer]] = {
            CreateAdapter: self._create,
            LoadAdapter: self._load,
            DropAdapter: self._drop,
            ParkAdapter: self._park,
            UnparkAdapter: self._unpark,
            TrainItem: self._train,
            OptimStep: self._optim_step,
            SaveAdapter: self._save,
            ImportAdapter: self._import,
            MergeAdapter: self._merge,
            PublishSnapshot: self._publish,
            LoadSnapshot: self._load_snapshot,
            SaveSnapshot: self._save_snapshot,
            DropSnapshot: self._drop_snapshot,
            Sample: self._sample,
            CancelSample: self._cancel,
            Ping: self._status,
        }

    # ---- EngineHandle ----

    @property
    def card(self) -> BaseModelCard:
        if not self._started:
            raise RuntimeError("the engine has not started")
        return self._card

    @property
    def is_alive(self) -> bool:
        return self._started and self._dead is None

    async def start(self) -> BaseModelCard:
        if self._start_error is not None:
            raise self._start_error
        self._started, self._dead = True, None
        self._adapters.clear()
        self._parked.clear()
        self._snapshots.clear()
        self.num_starts += 1
        for lane in self._lanes.values():
            lane.start()
        return self._card

    def submit(self, operation: Operation) -> EngineCall:
        (call,) = self.submit_all([operation])
        return call

    def submit_all(self, operations: Sequence[Operation]) -> list[EngineCall]:
        if not self.is_alive:
            raise EngineDied(self._dead or "the engine has not started")
        self.bursts.append(tuple(operations))
        return [self._submit(operation) for operation in operations]

    def _submit(self, operation: Operation) -> EngineCall:
        self.operations.append(operation)
        job = _Job(EngineCall(next(self._tickets), asyncio.get_running_loop().create_future()), operation)
        if isinstance(operation, CancelSample | Ping):
            self._execute(job)
        else:
            sampling = isinstance(operation, Sample | LoadSnapshot | DropSnapshot)
            self._lanes["sample" if sampling else "train"].put(job)
        return job.call

    async def close(self) -> None:
        self._dead = self._dead or "the engine was closed"
        for lane in self._lanes.values():
            await lane.close(EngineDied(self._dead))

    # ---- faults ----

    def fail_next(self, operation_type: type, error: TinsmithError) -> None:
        """The next operation of this type is answered with `error` and has no effect."""
        self._faults.append((operation_type, error))

    def fail_items(self, model_id: str, error: TinsmithError) -> None:
        """The next `TrainItem` of this model is answered with `error` and has no effect; its neighbours succeed."""
        self._item_faults.append((model_id, error))

    def pause(self) -> None:
        for lane in self._lanes.values():
            lane.open.clear()

    def step(self) -> None:
        """While paused: execute the one training operation that is next."""
        self._lanes["train"].step()

    def resume(self) -> None:
        for lane in self._lanes.values():
            lane.open.set()

    def die(self, reason: str = "the engine was killed") -> None:
        self._dead = reason
        for lane in self._lanes.values():
            lane.fail_all(EngineDied(reason))

    # ---- execution ----

    def _execute(self, job: _Job) -> None:
        if job.answer.done():
            return
        try:
            fault = self._take_fault(type(job.operation))
            if fault is not None:
                raise fault
            result = self._handlers[type(job.operation)](job.operation)
            if isinstance(result, SampleResponse) and job.call.on_token is not None:
                for drawn in tokens_in_turn(result):
                    job.call.on_token(drawn)
            job.answer.set_result(result)
        except TinsmithError as error:
            job.answer.set_exception(error)
        except Exception as error:  # noqa: BLE001 - the boundary of an operation: a bug must answer, not hang
            job.answer.set_exception(ServerError(f"fake engine: {error!r}"))

    def _take_fault(self, operation_type: type) -> TinsmithError | None:
        for entry in self._faults:
            if entry[0] is operation_type:
                self._faults.remove(entry)
                return entry[1]
        return None

    def _adapter(self, model_id: str) -> _Adapter:
        if model_id not in self._adapters:
            raise NotFound(f"no adapter {model_id!r} in this engine")
        return self._adapters[model_id]

    def _create(self, operation: CreateAdapter) -> None:
        self._adapters[operation.model_id] = _Adapter(FakeWeights(operation.lora))

    def _load(self, operation: LoadAdapter) -> LoraSpec:
        folder = Path(operation.folder)
        weights = read_folder(folder)
        if operation.optimizer and not (folder / "optimizer.safetensors").exists():
            raise InvalidInput(f"checkpoint {operation.folder!r} has no optimizer state")
        adapter = _Adapter(weights if operation.optimizer else replace(weights, step=0))
        if operation.gradients:
            adapter.gradient_norm, adapter.has_gradients = json.loads((folder / "gradients.json").read_text())
        self._adapters[operation.model_id] = adapter
        return weights.lora

    def _import(self, operation: ImportAdapter) -> ImportedAdapter:
        config = json.loads((Path(operation.source) / "adapter_config.json").read_text())
        lora = LoraSpec(rank=config["r"], seed=0, alpha=config["lora_alpha"])
        saved = write_folder(Path(operation.folder), FakeWeights(lora), optimizer=False, record=operation.record)
        return ImportedAdapter(lora=lora, saved=saved)

    def _merge(self, operation: MergeAdapter) -> SavedCheckpoint:
        weights = read_folder(Path(operation.source))
        return write_folder(Path(operation.folder), weights, optimizer=False, record=operation.record)

    def _drop(self, operation: DropAdapter) -> None:
        self._adapters.pop(operation.model_id, None)
        self._parked.pop(operation.model_id, None)

    def _park(self, operation: ParkAdapter) -> None:
        self._parked[operation.model_id] = self._adapter(operation.model_id)
        del self._adapters[operation.model_id]

    def _unpark(self, operation: UnparkAdapter) -> None:
        self._adapters[operation.model_id] = self._parked.pop(operation.model_id)

    def _train(self, item: TrainItem) -> ForwardBackwardOutput:
        for entry in self._item_faults:
            if entry[0] == item.model_id:
                self._item_faults.remove(entry)
                raise entry[1]
        adapter = self._adapter(item.model_id)
        if adapter.weights.corrupted:
            raise AdapterCorrupted(f"adapter {item.model_id!r} is corrupted")
        output = forward(item, adapter.weights.factor)
        self._tokens_trained += int(output.metrics["tokens:sum"])
        if not item.forward_only:
            adapter.has_gradients = True
            adapter.gradient_norm += abs(output.metrics["loss:sum"])
        return output

    def _optim_step(self, operation: OptimStep) -> dict[str, float]:
        adapter = self._adapter(operation.model_id)
        applied = adapter.has_gradients
        effect = applied and operation.params.learning_rate > 0
        norm, adapter.gradient_norm, adapter.has_gradients = adapter.gradient_norm, 0.0, False
        old = adapter.weights
        adapter.weights = replace(old, step=old.step + applied, num_effects=old.num_effects + effect)
        rate = operation.params.learning_rate
        return {"step_applied": float(applied), "grad_norm:mean": norm, "learning_rate:mean": rate}

    def _save(self, operation: SaveAdapter) -> SavedCheckpoint:
        parked, folder = self._parked.get(operation.model_id), Path(operation.folder)
        adapter = self._adapter(operation.model_id) if parked is None else parked
        saved = write_folder(folder, adapter.weights, optimizer=operation.optimizer, record=operation.record)
        if operation.gradients:
            (folder / "gradients.json").write_text(json.dumps([adapter.gradient_norm, adapter.has_gradients]))
        return saved

    def _publish(self, operation: PublishSnapshot) -> str:
        weights = self._adapter(operation.model_id).weights
        self._snapshots[operation.snapshot_id] = weights
        return weights.digest

    def _load_snapshot(self, operation: LoadSnapshot) -> str:
        weights = read_folder(Path(operation.folder))
        self._snapshots[operation.snapshot_id] = weights
        return weights.digest

    def _save_snapshot(self, operation: SaveSnapshot) -> str:
        weights = self._snapshots[operation.snapshot_id]
        return write_folder(Path(operation.folder), weights, optimizer=False, record={}).digest

    def _drop_snapshot(self, operation: DropSnapshot) -> None:
        self._snapshots.pop(operation.snapshot_id, None)

    def _sample(self, operation: Sample) -> SampleResponse:
        if operation.snapshot_id is None:
            factor = 1.0
        elif operation.snapshot_id in self._snapshots:
            factor = self._snapshots[operation.snapshot_id].factor
        else:
            raise NotFound(f"no snapshot {operation.snapshot_id!r} in this engine")
        response = draw_all(operation, factor, self._card.vocab_size)
        self._tokens_sampled += sum(len(sequence.tokens) for sequence in response.sequences)
        return response

    def _cancel(self, operation: CancelSample) -> None:
        self._lanes["sample"].fail_ticket(operation.ticket, UserError("the sample was cancelled"))

    def _status(self, operation: Ping) -> EngineStatus:
        return EngineStatus(
            num_adapters=len(self._adapters),
            num_snapshots=len(self._snapshots),
            num_running=0,
            num_waiting=sum(lane.num_waiting for lane in self._lanes.values()),
            rss_bytes=0,
            tokens_trained=self._tokens_trained,
            tokens_sampled=self._tokens_sampled,
        )


class _Lane:
    """Operations that are executed one after another, in order."""

    def __init__(self, engine: FakeEngine) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self._engine = engine
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._jobs)

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def put(self, job: _Job) -> None:
        self._jobs.append(job)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._jobs:
                await self.open.wait()
                await asyncio.sleep(self._engine.delay_s)
                if self._jobs and self.open.is_set():
                    self._engine._execute(self._jobs.popleft())

    def step(self) -> None:
        self._engine._execute(self._jobs.popleft())

    def fail_all(self, error: TinsmithError) -> None:
        for job in self._jobs:
            _fail(job, error)
        self._jobs.clear()

    def fail_ticket(self, ticket: int, error: TinsmithError) -> None:
        for job in self._jobs:
            if job.ticket == ticket:
                _fail(job, error)

    async def close(self, error: TinsmithError) -> None:
        self.fail_all(error)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None


def _fail(job: _Job, error: TinsmithError) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)
