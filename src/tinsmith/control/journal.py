"""What control writes into the ledger: one record per kind of entry, and the few ways they are written.

    session   a session that is live                   sampler   one of a base model or of a checkpoint
    model     how it came to be                        weights   an unnamed sampler's, on disk
    request   of a model, in its order                 sample    asked for, and not fetched yet
    binding   which version a path stood for           loss      that a user uploaded
    snapshot  where a live model can go on from        result    of a request that is in no model's order any more
    strike    a request that was there when an engine died, and how often
    job       of which a dialect puts the answer together
    memo      what else a dialect remembers of a session (memos.py)

A request is done only once its entry is on disk. With the ledger off, everything is "on disk" at once.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinsmith.control.completions import Group
from tinsmith.control.futures import Ended, FutureStore, RequestType
from tinsmith.control.ledger import Change, Entry, Ledger, OnWritten, mark_failed, put, remove
from tinsmith.control.ledger_codec import recorded
from tinsmith.control.requests import Deferred, ModelRequest, NewSession, Recipe, SampleRequest
from tinsmith.types.custom_loss import CustomLoss
from tinsmith.types.errors import StorageError, TinsmithError
from tinsmith.types.operations import LoraSpec

logger = logging.getLogger(__name__)

FETCHED_GRACE_S = 30.0
"""How long a result that was fetched is still kept for a client whose reply was lost on the way."""


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """Its name is the session's id."""

    request: NewSession


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """Its name is the model's id."""

    base_model: str
    request_id: str
    request_type: RequestType
    fingerprint: bytes
    lora: LoraSpec | None = None
    """With its seed drawn; `None` for a model made from a checkpoint."""
    checkpoint_id: str | None = None
    optimizer: bool = False
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    context: Any = None
    """Of its future, here and below."""


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """Its name is the request's id, or `gap:…` for numbers that were given up."""

    request_type: RequestType
    fingerprint: bytes
    request: ModelRequest | Deferred | None
    """`None` for numbers that never came and were given up."""
    last_seq: int | None = None
    """The last of the numbers that were given up."""
    context: Any = None


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRecord:
    """Its name is the model's id."""

    next_seq: int
    """Everything before it is in the snapshot, and nothing from it on."""
    folder: str
    """Relative to the data directory."""
    metrics: Mapping[str, float]
    parent: str | None
    lora: LoraSpec | None = None
    """`None` in entries of before this was written: as the model was made."""


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """Its name is the request's id; its seed is drawn."""

    fingerprint: bytes
    request: SampleRequest


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRecord:
    """Its name is the sampler's id."""

    base_model: str
    bound_to: tuple[str | None, str | None]
    """What was asked for: a base model, a path."""
    checkpoint_id: str | None
    digest: str | None


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRecord:
    """Its name is the sampler's id."""

    base_model: str
    folder: str
    model_id: str
    model_path: str | None
    digest: str | None
    origin: str | None
    """The request that published it."""
    snapshot_id: str
    """The sampler whose weights these are: its own, or the newest of an inflight one's model."""
    inflight_of: str | None = None
    num_bytes: int = 0
    """In the engine's memory."""


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class LossRecord:
    """Its name is the loss's id."""

    request_id: str
    fingerprint: bytes
    seq_id: int
    loss: CustomLoss


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRecord:
    """Its name is the request's id; a failure stands beside it."""

    request_type: RequestType
    fingerprint: bytes
    key: Hashable | None
    subject: str | None
    finished_at: float
    group: Group | None = None
    owner: str | None = None
    result: Any = None
    context: Any = None


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """Its name is the request's id."""

    request_type: RequestType
    recipe: Recipe
    subject: str | None
    context: Any = None


OUTLIVE_FINISHED_SESSIONS = ("model", "request", "binding", "snapshot", "strike", "loss")
"""Kinds of entries that stay until the models of a session that its client finished have done what waits."""
_LOSSES_OF_NOBODY = (
    "kind = 'loss' AND session_id = ? AND NOT EXISTS (SELECT 1 FROM entries AS other"
    " WHERE other.session_id = entries.session_id AND other.kind IN ('session', 'model'))"
)


class Journal:
    """The way to the ledger, or around it if there is none."""

    def __init__(self, ledger: Ledger | None) -> None:
        self.ledger = ledger
        self.lone: set[str] = set()
        """Request ids of samples, jobs and results: entries that go once they were fetched, or have expired."""

    @property
    def is_on(self) -> bool:
        return self.ledger is not None

    @property
    def fault(self) -> str | None:
        return None if self.ledger is None else self.ledger.fatal or self.ledger.fault

    def post(self, changes: Sequence[Change], on_written: OnWritten) -> None:
        """`on_written` is told at once if there is no ledger."""
        if self.ledger is None:
            on_written(None)
        else:
            self.ledger.post(changes, on_written)

    def note(self, changes: Sequence[Change]) -> None:
        """As `post`, for what need not be waited for; a failure is logged."""
        if self.ledger is not None:
            self.ledger.post(changes, _log_failure)

    async def write(self, changes: Sequence[Change]) -> None:
        """On disk when it returns. Raises `StorageError`."""
        if self.ledger is not None:
            await self.ledger.write(changes)

    async def note_failed(self, request_id: str, error: TinsmithError) -> None:
        """Before it is told: what failed for want of memory or of a checkpoint must not succeed in a replay."""
        try:
            await self.write([mark_failed("request", request_id, error)])
        except StorageError as unwritten:
            logger.warning("a replay may not know that request %s has failed: %s", request_id, unwritten)

    def keep_result(self, request_id: str, ended: Ended, on_written: OnWritten, at: float) -> None:
        """Of a request that failed before it got into any order."""
        self.lone.add(request_id)
        self.post([put(result_entry(request_id, ended, at))], on_written)

    def end_session(self, session_id: str, *, drop: bool) -> None:
        """`drop`: its models go with it; else each goes once it has done what waits."""
        kept = "" if drop else f" AND kind NOT IN {OUTLIVE_FINISHED_SESSIONS}"
        self.note([remove(f"session_id = ?{kept}", session_id), remove(_LOSSES_OF_NOBODY, session_id)])

    def end_model(self, model_id: str, session_id: str, results: Sequence[Entry]) -> None:
        """`results` stay fetchable."""
        self.lone.update(entry.name for entry in results)
        kinds = OUTLIVE_FINISHED_SESSIONS
        ended = remove(f"model_id = ? AND kind IN {kinds}", model_id)
        self.note([*map(put, results), ended, remove(_LOSSES_OF_NOBODY, session_id)])

    def trim(self, futures: FutureStore) -> None:
        """Do away with samples, jobs and results that were fetched, or have expired."""
        spent = [request_id for request_id in self.lone if futures.is_spent(request_id, FETCHED_GRACE_S)]
        self.lone.difference_update(spent)
        if spent:
            lone = "kind IN ('sample', 'job', 'result', 'strike') AND name = ?"
            self.note([remove(lone, request_id) for request_id in spent])


def result_entry(request_id: str, ended: Ended, at: float) -> Entry:
    outcome = ended.outcome
    record = ResultRecord(
        request_type=outcome.request_type,
        fingerprint=ended.fingerprint,
        key=ended.key,
        subject=outcome.subject,
        finished_at=at,
        group=ended.group,
        owner=ended.owner,
        result=outcome.result,
        context=outcome.context,
    )
    return Entry(kind="result", name=request_id, value=record, failure=outcome.error)


def _log_failure(error: StorageError | None) -> None:
    if error is not None:
        logger.error("an entry of the ledger was not written: %s", error)
