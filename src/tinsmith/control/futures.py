"""Promises of results: one terminal state each, waiters woken, results kept for a while, then expired."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from tinsmith.control.completions import Completion, Completions, Group
from tinsmith.control.elsewhere import Elsewhere
from tinsmith.control.errors import FutureExpired
from tinsmith.control.identity import Clock, Ids
from tinsmith.types.errors import NotFound, PayloadConflict, RequestErrorCategory, StorageError, TinsmithError
from tinsmith.types.results import ForwardBackwardOutput, SampleResponse

if TYPE_CHECKING:
    from tinsmith.control.result_store import ResultStore, StoredResult

logger = logging.getLogger(__name__)

RequestType: TypeAlias = Literal[
    "CreateModel",
    "CreateCustomLoss",
    "ForwardBackward",
    "OptimStep",
    "SaveWeights",
    "SaveWeightsForSampler",
    "SaveWeightsExternal",
    "LoadWeights",
    "Sample",
    "UnloadModel",
]
_MAX_REFUSED = 1000
QueueState: TypeAlias = Literal["active", "paused_capacity", "paused_rate_limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a request: `error`, or else `result`."""

    request_type: RequestType
    result: Any = None
    error: TinsmithError | None = None
    subject: str | None = None
    """The model or sampler that was asked."""
    context: Any = field(default=None, compare=False)
    """What the dialect that submitted the request wanted to have back with its end; control does not look at it."""
    encoded: dict[str, bytes] = field(default_factory=dict, compare=False)
    """A place for the server to keep encodings of the result."""


@dataclass(frozen=True, slots=True)
class Ended:
    outcome: Outcome
    key: Hashable | None
    fingerprint: bytes
    group: Group | None
    owner: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    queue_state: QueueState = "active"
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSaved:
    """Result of `SaveForSampler`: a checkpoint's path, a sampler's id, or both."""

    path: str | None = None
    sampling_session_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalSaved:
    """Result of `SaveExternal`."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpan:
    """When one request came, began and ended; seconds since 1970."""

    request_id: str
    request_type: RequestType
    session_id: str
    subject: str
    """The model or sampler it was asked of."""
    opened_at: float
    started_at: float | None
    finished_at: float | None
    """`None` while it is open."""
    error: str | None = None
    category: RequestErrorCategory | None = None
    """Whose fault the error was; `None` without one."""


@dataclass(slots=True)
class _Promise:
    request_type: RequestType
    key: Hashable | None
    fingerprint: bytes
    on_poll: Callable[[], Pending] | None
    session_id: str | None
    subject: str | None = None
    context: Any = None
    group: Group | None = None
    opened_at: float = 0.0
    started_at: float | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Outcome | None = None
    num_bytes: int = 0
    is_released: bool = False
    """Its client has the result; what was kept of it is gone."""
    committed: asyncio.Future[None] | None = None
    """Ends when the request is on disk; `None` once it is."""
    fetched_at: float | None = None
    owner: str | None = None
    """Whose it is, if that does not follow from its session or subject."""


_WORTH_STORING = 4096
"""Bytes of a result below which its place on disk would cost as much memory."""
_BACKLOG_BYTES = 256 * 2**20
"""Memory may hold so much more than its budget, or as much again if that is more, while the disk is being written."""


class FutureStore:
    """All futures of one server. Used from one event loop.

    A future may be opened under a key, which makes its request idempotent for as long as the future is kept.
    """

    def __init__(
        self,
        *,
        ids: Ids,
        clock: Clock,
        ttl_s: float,
        max_retained: int,
        max_retained_bytes: int = 2**62,
        store: ResultStore | None = None,
    ) -> None:
        """`store` takes large results that are beyond `max_retained_bytes`; without one they expire."""
        self._store = store
        self._large: deque[str] = deque()
        """Whose results are in memory and worth a place on disk, oldest first."""
        self._leaving_bytes = 0
        """Of results that are being written."""
        self._is_store_failing = False
        self._ids = ids
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_retained = max_retained
        self._max_retained_bytes = max_retained_bytes
        self._promises: dict[str, _Promise] = {}
        self._unfinished: dict[str, _Promise] = {}
        self._by_key: dict[Hashable, str] = {}
        self._finished: OrderedDict[str, float] = OrderedDict()
        """When they ended, oldest first."""
        self._retained_bytes = 0
        self._refused: OrderedDict[str, StorageError] = OrderedDict()
        """The newest requests that could not be written, for whoever has yet to ask."""
        self.completions = Completions()
        self.on_open: Callable[[str, RequestType, str | None, str | None], None] = lambda *_: None
        """Told the id, type, session and subject of every request, in the context of whoever asked."""
        self.on_finish: Callable[[RequestSpan], None] = lambda span: None
        """Told of every request that ends."""
        self.keep_failure: Callable[[str, Callable[[StorageError | None], None]], None] | None = None
        """Write the end of a request that failed at once, and tell when it is on disk."""

    def __len__(self) -> int:
        return len(self._promises)

    @property
    def num_open(self) -> int:
        return len(self._promises) - len(self._finished)

    @property
    def num_kept(self) -> int:
        return len(self._finished)

    @property
    def kept_bytes(self) -> int:
        return self._retained_bytes

    def census(self) -> tuple[Counter[str], Counter[str]]:
        """Open requests by type: those that wait for their turn, and those whose turn has come."""
        queued: Counter[str] = Counter()
        running: Counter[str] = Counter()
        for promise in self._unfinished.values():
            (queued if promise.started_at is None else running)[promise.request_type] += 1
        return queued, running

    def claim(self, key: Hashable, fingerprint: bytes, what: str) -> str | None:
        """The request already opened under `key`, if it had the same payload.

        Raises `PayloadConflict` if it had another; `what` names the request there.
        """
        request_id = self._by_key.get(key)
        if request_id is None:
            return None
        if self._promises[request_id].fingerprint != fingerprint:
            raise PayloadConflict(
                f"{what} was already used with another payload; retry with the original body or take the next number"
            )
        return request_id

    def open(
        self,
        request_type: RequestType,
        *,
        key: Hashable | None = None,
        fingerprint: bytes = b"",
        on_poll: Callable[[], Pending] | None = None,
        session_id: str | None = None,
        subject: str | None = None,
        context: Any = None,
        group: Group | None = None,
        request_id: str | None = None,
        owner: str | None = None,
        is_durable: bool = True,
    ) -> str:
        """A new request id. `on_poll` is asked what an unfinished request waits for; `group` is where its end is
        announced among others (`Completions`).

        `request_id` is given for a request that an earlier process took. One that is not durable waits for `commit`.
        """
        request_id = request_id or self._ids.request_id()
        promise = _Promise(
            request_type, key, fingerprint, on_poll, session_id, subject, context, group, self._clock.time()
        )
        promise.owner = owner
        if not is_durable:
            promise.committed = asyncio.get_running_loop().create_future()
        self._promises[request_id] = self._unfinished[request_id] = promise
        if key is not None:
            self._by_key[key] = request_id
        self.on_open(request_id, request_type, session_id, subject)
        return request_id

    def resolve(self, request_id: str, result: Any) -> bool:
        """Whether this was the terminal state; a second one changes nothing."""
        return self._finish(request_id, result, None)

    def fail(self, request_id: str, error: TinsmithError) -> bool:
        """As `resolve`, with an error."""
        return self._finish(request_id, None, error)

    def start(self, request_id: str) -> None:
        """Note that its turn has come."""
        if (promise := self._promises.get(request_id)) is not None:
            promise.started_at = self._clock.time()

    def has_succeeded(self, request_id: str) -> bool:
        promise = self._promises.get(request_id)
        return promise is not None and promise.outcome is not None and promise.outcome.error is None

    def release(self, request_id: str, group: Group) -> None:
        """Let go of a finished result of `group` that its client has fetched; asked for again, it has expired."""
        promise = self._promises.get(request_id)
        if promise is None or promise.outcome is None or promise.group != group:
            return
        self._unstore(promise)
        promise.outcome = Outcome(request_type=promise.request_type)
        promise.is_released = True
        self._retained_bytes -= promise.num_bytes
        promise.num_bytes = 0

    def open_spans(self, session_id: str) -> list[RequestSpan]:
        """Of the session's requests that have not ended."""
        return [
            _span(request_id, promise, None)
            for request_id, promise in self._promises.items()
            if promise.session_id == session_id and promise.outcome is None
        ]

    def failed(
        self,
        request_type: RequestType,
        error: TinsmithError,
        context: Any = None,
        group: Group | None = None,
        *,
        subject: str | None = None,
        owner: str | None = None,
    ) -> str:
        """The id of a request that fails at once."""
        keep = self.keep_failure
        request_id = self.open(
            request_type, context=context, group=group, subject=subject, owner=owner, is_durable=keep is None
        )
        self.fail(request_id, error)
        if keep is not None and self.knows(request_id):
            keep(request_id, partial(self.commit, request_id))
        return request_id

    def commit(self, request_id: str, error: StorageError | None) -> None:
        """The request is on disk; or it could not be written, and was never taken."""
        promise = self._promises.get(request_id)
        if promise is None or promise.committed is None:
            return
        committed, promise.committed = promise.committed, None
        if error is None:
            committed.set_result(None)
            return
        committed.set_exception(error)
        committed.exception()  # whoever waits gets it; it is no complaint if nobody does
        self._refused[request_id] = error
        while len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)
        if promise.outcome is None:
            self._forget(request_id)
            promise.outcome = Outcome(request_type=promise.request_type, error=error, subject=promise.subject)
            promise.done.set()

    async def durable(self, request_id: str) -> None:
        """Returns once the request would survive a power failure. Raises `StorageError` if it was not taken."""
        promise = self._promises.get(request_id)
        if promise is not None and promise.committed is not None:
            await asyncio.shield(promise.committed)
        elif (refusal := self._refused.get(request_id)) is not None:
            raise refusal

    def is_spent(self, request_id: str, grace_s: float) -> bool:
        """Whether its result was fetched at least `grace_s` ago, or is no longer kept."""
        promise = self._promises.get(request_id)
        if promise is None or promise.is_released:
            return True
        return promise.fetched_at is not None and promise.fetched_at <= self._clock.monotonic() - grace_s

    def ended(self, request_id: str) -> Ended | None:
        """The end of a request, and what it was opened under; `None` if it has none yet."""
        promise = self._promises.get(request_id)
        if promise is None or promise.outcome is None:
            return None
        return Ended(promise.outcome, promise.key, promise.fingerprint, promise.group, promise.owner)

    def knows(self, request_id: str) -> bool:
        return request_id in self._promises

    def context_of(self, request_id: str) -> Any:
        promise = self._promises.get(request_id)
        return None if promise is None else promise.context

    def session_of(self, request_id: str) -> str | None:
        """The session whose client asks for this result, if that is known."""
        promise = self._promises.get(request_id)
        return None if promise is None else promise.session_id

    def claimant(self, request_id: str) -> tuple[str | None, str | None]:
        """Whose this request is, or the session, model or sampler whose owner has it; neither if it is not known."""
        promise = self._promises.get(request_id)
        return (None, None) if promise is None else (promise.owner, promise.session_id or promise.subject)

    async def wait(self, request_id: str, timeout_s: float) -> Outcome | Pending:
        """The outcome, or after `timeout_s` what the request waits for.

        Raises `FutureExpired` if the result is no longer kept, `NotFound` if the id was never given out.
        """
        promise = self._promises.get(request_id)
        if promise is None or promise.is_released:
            if self._ids.issued(request_id):
                raise FutureExpired(f"the result of request {request_id!r} is no longer kept; submit it again")
            raise NotFound(f"no request {request_id!r}")
        if promise.outcome is None and timeout_s > 0:
            try:
                async with asyncio.timeout(timeout_s):
                    await promise.done.wait()
            except TimeoutError:
                pass  # answered below: still pending
        if promise.outcome is not None:
            promise.fetched_at = self._clock.monotonic()
            return await _whole(promise.outcome)
        return Pending() if promise.on_poll is None else promise.on_poll()

    def expire(self) -> int:
        """Drop results older than their time to live; the number dropped."""
        limit = self._clock.monotonic() - self._ttl_s
        dropped = 0
        while self._finished and self._finished[oldest := next(iter(self._finished))] <= limit:
            self._drop(oldest)
            dropped += 1
        return dropped

    def fail_all(self, error: TinsmithError) -> None:
        for request_id in [r for r, promise in self._promises.items() if promise.outcome is None]:
            self.fail(request_id, error)

    def _finish(self, request_id: str, result: Any, error: TinsmithError | None) -> bool:
        promise = self._promises.get(request_id)
        if promise is None or promise.outcome is not None:
            return False
        promise.outcome = Outcome(
            request_type=promise.request_type,
            result=result,
            error=error,
            subject=promise.subject or "",
            context=promise.context,
        )
        promise.num_bytes = result_bytes(result)
        promise.on_poll = None
        promise.done.set()
        self._retained_bytes += promise.num_bytes
        self._unfinished.pop(request_id, None)
        self._finished[request_id] = self._clock.monotonic()
        if promise.group is not None:
            self.completions.add(promise.group, Completion(request_id, promise.num_bytes // 2, error is not None))
        self.on_finish(_span(request_id, promise, self._clock.time()))
        if promise.num_bytes >= _WORTH_STORING:
            self._large.append(request_id)
        self._make_room()
        return True

    def _make_room(self) -> None:
        """The oldest large results go to disk; if there is none, or it cannot keep up, the oldest expire early."""
        if self._store is not None and self._store.has_room:
            while len(self._large) > 1 and self._retained_bytes - self._leaving_bytes > self._max_retained_bytes:
                self._put_on_disk(self._large.popleft(), self._store)
        backlog = max(self._max_retained_bytes, _BACKLOG_BYTES) if self._leaving_bytes else 0
        limit = self._max_retained_bytes + backlog
        while len(self._finished) > self._max_retained:
            self._drop(next(iter(self._finished)))
        while self._retained_bytes > limit and len(self._finished) > 1:
            largest = self._large.popleft() if len(self._large) > 1 else next(iter(self._finished))
            if largest in self._finished:
                self._drop(largest)

    def _put_on_disk(self, request_id: str, store: ResultStore) -> None:
        promise = self._promises.get(request_id)
        if promise is None or promise.outcome is None or promise.is_released:
            return
        num_bytes = promise.num_bytes
        self._leaving_bytes += num_bytes

        def written(done: asyncio.Future[StoredResult]) -> None:
            self._leaving_bytes -= num_bytes
            if done.cancelled():
                return
            if (error := done.exception()) is not None:
                if not self._is_store_failing:
                    logger.warning("the oldest results expire early: %s", error)
                self._is_store_failing = True
                if request_id in self._finished and self._retained_bytes > self._max_retained_bytes:
                    self._drop(request_id)
            elif self._promises.get(request_id) is promise and promise.outcome is not None and not promise.is_released:
                self._is_store_failing = False
                store.keep(done.result())
                promise.outcome = replace(promise.outcome, result=done.result(), encoded={})
                promise.num_bytes = 0
                self._retained_bytes -= num_bytes

        asyncio.wrap_future(store.put(promise.outcome.result)).add_done_callback(written)

    def _unstore(self, promise: _Promise) -> None:
        if self._store is not None and promise.outcome is not None and isinstance(promise.outcome.result, Elsewhere):
            self._store.release(promise.outcome.result)

    def _drop(self, request_id: str) -> None:
        del self._finished[request_id]
        self._retained_bytes -= self._forget(request_id).num_bytes
        while self._large and self._large[0] not in self._finished:
            self._large.popleft()

    def _forget(self, request_id: str) -> _Promise:
        promise = self._promises.pop(request_id)
        self._unstore(promise)
        self._unfinished.pop(request_id, None)
        if promise.key is not None and self._by_key.get(promise.key) == request_id:
            del self._by_key[promise.key]
        if promise.group is not None:
            self.completions.drop(promise.group, request_id)
        return promise


async def _whole(outcome: Outcome) -> Outcome:
    """With its result, wherever that was."""
    if not isinstance(outcome.result, Elsewhere):
        return outcome
    try:
        return replace(outcome, result=await asyncio.to_thread(outcome.result.load), encoded={})
    except StorageError as error:
        return replace(outcome, result=None, error=error, encoded={})


def _span(request_id: str, promise: _Promise, finished_at: float | None) -> RequestSpan:
    error = None if promise.outcome is None else promise.outcome.error
    return RequestSpan(
        request_id=request_id,
        request_type=promise.request_type,
        session_id=promise.session_id or "",
        subject=promise.subject or "",
        opened_at=promise.opened_at,
        started_at=promise.started_at,
        finished_at=finished_at,
        error=None if error is None else error.message,
        category=None if error is None else error.category,
    )


def result_bytes(result: Any) -> int:
    """Roughly how much memory a result holds, its future encoding included."""
    if isinstance(result, ForwardBackwardOutput):
        arrays = sum(tensor.nbytes for output in result.loss_fn_outputs for tensor in output.values())
        return 2 * arrays + 400 * len(result.loss_fn_outputs)
    if isinstance(result, SampleResponse):
        parts: list[np.ndarray | None] = [result.prompt_logprobs_np]
        if result.topk_prompt_logprobs_np is not None:
            parts += [result.topk_prompt_logprobs_np.token_ids, result.topk_prompt_logprobs_np.logprobs]
        for sequence in result.sequences:
            parts += [sequence.tokens_np, sequence.logprobs_np]
            if sequence.topk_logprobs_np is not None:
                parts += [sequence.topk_logprobs_np.token_ids, sequence.topk_logprobs_np.logprobs]
        return 2 * sum(part.nbytes for part in parts if part is not None) + 400 * len(result.sequences)
    return 400
