"""A model as control sees it: an adapter in an engine, and the requests that wait for their turn on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from tinsmith.control.engines import EngineSlot
from tinsmith.control.futures import Pending, RequestType
from tinsmith.control.identities import LOCAL_USER_ID
from tinsmith.control.journal import SnapshotRecord
from tinsmith.control.queues import ModelQueue
from tinsmith.control.records import CheckpointRow
from tinsmith.control.requests import (
    ApplyOptimizer,
    Deferred,
    ForwardBackward,
    LoadState,
    ModelRequest,
    Rejected,
    SaveExternal,
    SaveForSampler,
    SaveState,
    UnloadModel,
)
from tinsmith.types.errors import TinsmithError
from tinsmith.types.operations import LoraSpec


class ModelStatus(Enum):
    CREATING = auto()
    """Its adapter does not exist yet; requests are taken and wait. Next: LIVE, ENDED."""
    LIVE = auto()
    """Next: CLOSING, ENDED."""
    CLOSING = auto()
    """Its session was finished: what waits is still done, nothing more is taken. Next: ENDED."""
    ENDED = auto()
    """The adapter is gone, or never came to be; `Model.end` says why."""


class Residence(Enum):
    """Where a model's adapter is."""

    ABSENT = auto()
    """Not made yet, or in its snapshot on disk. Next: ENTERING."""
    ENTERING = auto()
    """It waits for room, or is read. Next: RESIDENT, or where it was."""
    RESIDENT = auto()
    """On the device; or about to be made there. Next: LEAVING."""
    LEAVING = auto()
    """It takes no more turns, and is written once what runs is answered. Next: PARKED, ABSENT, RESIDENT."""
    PARKED = auto()
    """In the host's memory. Next: ENTERING, LEAVING."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """Operation 0 of every model: from a shape, or from a checkpoint."""

    lora: LoraSpec | None = None
    checkpoint: CheckpointRow | None = None
    optimizer: bool = False


ModelOperation: TypeAlias = Creation | ModelRequest | Deferred

REQUEST_TYPES: dict[type, RequestType] = {
    Creation: "CreateModel",
    ForwardBackward: "ForwardBackward",
    ApplyOptimizer: "OptimStep",
    SaveState: "SaveWeights",
    SaveForSampler: "SaveWeightsForSampler",
    SaveExternal: "SaveWeightsExternal",
    LoadState: "LoadWeights",
    UnloadModel: "UnloadModel",
    Rejected: "ForwardBackward",
    Deferred: "ForwardBackward",
}


@dataclass(slots=True, eq=False)
class Work:
    """One request in a model's queue."""

    request_id: str
    operation: ModelOperation
    num_tokens: int = 0
    """Training tokens."""
    is_checked: bool = True
    """Whether validation has ended; the request's turn does not come before."""
    is_void: bool = False
    """It failed before its turn: its number is consumed, and nothing is done."""
    is_durable: bool = True
    """Whether it is in the ledger; its turn does not come before."""
    is_paid: bool = False
    """It was taken before the engine died: its tokens are not charged again, nor waited for."""
    binding: str | None = None
    """Id of the checkpoint that the path in a `LoadState` stood for when its turn first came."""

    @property
    def is_ready(self) -> bool:
        return self.is_checked and self.is_durable

    @property
    def is_training(self) -> bool:
        return isinstance(self.operation, ForwardBackward)

    @property
    def is_step(self) -> bool:
        return isinstance(self.operation, ApplyOptimizer)

    @property
    def is_barrier(self) -> bool:
        """Whether it needs everything before it answered, and lets nothing after it begin before its own answer."""
        return not isinstance(self.operation, ForwardBackward | ApplyOptimizer)


@dataclass(slots=True, eq=False, kw_only=True)
class Model:
    model_id: str
    session_id: str
    owner: str = LOCAL_USER_ID
    slot: EngineSlot | None
    """`None` only for a model whose engine could not be found; it ended at once."""
    status: ModelStatus = ModelStatus.CREATING
    end: TinsmithError | None = None
    lora: LoraSpec | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    orders_by_arrival: bool = False
    """Its requests come without numbers, and one with a number is refused."""
    queue: ModelQueue[Work] = field(default_factory=ModelQueue)
    pending_tokens: int = 0
    running: set[str] = field(default_factory=set)
    """Request ids an engine works on."""
    behind_barrier: bool = False
    over_quota: str | None = None
    """Why its training waits for more tokens."""
    parent: str | None = None
    """Id of the checkpoint saved or loaded last."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last training request and the last optimizer step."""
    is_corrupted: bool = False
    """Its numbers are no longer finite: it refuses training until a checkpoint is loaded into it."""
    last_request_at: float = 0.0
    is_dirty: bool = False
    """`last_request_at` is newer than the registry's."""
    creation: Creation | None = None
    creation_request_id: str = ""
    journaled: dict[int, str] = field(default_factory=dict)
    """Request ids by number, of those that the ledger would replay."""
    snapshot: SnapshotRecord | None = None
    replayed_tokens: int = 0
    """About how many training tokens a replay would compute."""
    snapshot_at: float = 0.0
    """Monotonic seconds of the last snapshot, or of its creation."""
    snapshot_due: bool = False
    """It takes no turn until what runs is answered and a snapshot was ordered."""
    is_saving: bool = False
    """A snapshot is being written."""
    residence: Residence = Residence.ABSENT
    entered_at: float = 0.0
    """Monotonic seconds when its adapter came to the device last."""
    used_at: float = 0.0
    """Monotonic seconds when a request of it was answered last."""

    @property
    def is_kept(self) -> bool:
        """Whether its snapshot on disk is what its adapter is now."""
        return self.snapshot is not None and self.snapshot.next_seq == self.queue.next_seq and not self.running

    @property
    def num_bytes(self) -> int:
        """Of its adapter on the device."""
        creation, spec = self.creation, self.lora
        if spec is None and creation is not None:
            spec = creation.lora
            if spec is None and creation.checkpoint is not None:
                spec = LoraSpec(**creation.checkpoint.lora)
        return 0 if spec is None or self.slot is None else self.slot.card.adapter_bytes(spec)

    @property
    def first_seq(self) -> int:
        """Where a replay begins."""
        return 0 if self.snapshot is None else self.snapshot.next_seq

    @property
    def takes_requests(self) -> bool:
        return self.status in (ModelStatus.CREATING, ModelStatus.LIVE)

    @property
    def has_ended(self) -> bool:
        return self.status is ModelStatus.ENDED

    @property
    def is_drained(self) -> bool:
        return not self.queue and not self.running

    def pending(self) -> Pending:
        if self.over_quota is not None:
            return Pending(queue_state="paused_rate_limit", reason=self.over_quota)
        if self.slot is not None and self.slot.is_recovering:
            return Pending(queue_state="paused_capacity", reason=self.slot.pause_reason)
        missing = self.queue.missing_seq
        if missing is not None:
            return Pending(reason=f"waiting for request seq {missing} of model {self.model_id!r}")
        if self.residence in (Residence.ENTERING, Residence.LEAVING):
            return Pending(
                queue_state="paused_capacity",
                reason=f"model {self.model_id!r} waits for its turn in the memory that adapters share",
            )
        return Pending()


def slot_of(model: Model) -> EngineSlot:
    """Of a model that takes requests."""
    if model.slot is None:
        raise AssertionError(f"model {model.model_id!r} has no engine and takes no requests")
    return model.slot
