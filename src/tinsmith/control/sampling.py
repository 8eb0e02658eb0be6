"""Samples: they go straight to the engine, in no order."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tinsmith.control.attending import attend
from tinsmith.control.checkpoints import CheckpointStore
from tinsmith.control.completions import Completion, Group
from tinsmith.control.engines import EngineSlot
from tinsmith.control.errors import SamplerGone, SessionEnded
from tinsmith.control.fairness import Fairness
from tinsmith.control.futures import FutureStore, Pending
from tinsmith.control.identity import Clock, Ids
from tinsmith.control.journal import Journal, SampleRecord
from tinsmith.control.ledger import Entry, mark_failed, put
from tinsmith.control.quotas import Quotas
from tinsmith.control.requests import DrawSamples, RejectedSample, SampleRequest, Submission
from tinsmith.control.samplers import Sampler, SamplerBook
from tinsmith.control.sampling_sessions import SamplingSessions
from tinsmith.control.sessions import SessionBook
from tinsmith.control.usage import Meter
from tinsmith.control.validation import MAX_SAMPLES, sampling_operation
from tinsmith.types.errors import (
    CheckpointDamaged,
    EngineDied,
    NotFound,
    Overloaded,
    PayloadConflict,
    ServerError,
    StorageError,
    TinsmithError,
    UserError,
)
from tinsmith.types.operations import CancelSample, Sample
from tinsmith.types.results import DrawnToken, SampleResponse

logger = logging.getLogger(__name__)

CLIENT_BLOCK = 10**9
"""Sequence numbers of one client of a sampling session."""


@dataclass(slots=True)
class _Open:
    """A sample without an answer."""

    slot: EngineSlot
    request: SampleRequest
    session_id: str
    prompt_tokens: int
    ticket: int | None = None
    """`None` while its snapshot is being loaded, or its engine started again."""
    is_loading: bool = False


class Sampling:
    def __init__(
        self,
        *,
        sampling_sessions: SamplingSessions,
        sessions: SessionBook,
        samplers: SamplerBook,
        futures: FutureStore,
        checkpoints: CheckpointStore,
        clock: Clock,
        ids: Ids,
        meter: Meter,
        journal: Journal,
        fairness: Fairness,
        quotas: Quotas,
        max_pending: int,
        data_dir: Path,
    ) -> None:
        self._quotas = quotas
        self._data_dir = data_dir
        self._fairness = fairness
        self._meter = meter
        self._journal = journal
        self._sampling_sessions = sampling_sessions
        self._sessions = sessions
        self._samplers = samplers
        self._futures = futures
        self._checkpoints = checkpoints
        self._clock = clock
        self._ids = ids
        self._max_pending = max_pending
        self._open: dict[str, _Open] = {}
        self._num_unwritten = 0
        """Samples that are not on disk yet."""
        self._num_attended = 0
        """Samples that a caller waits for in place."""
        self._loads: set[asyncio.Task[None]] = set()
        self._held: dict[str, list[str]] = {}
        """Samples of samplers that are expected, by sampler."""
        self._requests_held: dict[str, SampleRequest] = {}
        self._numbers = itertools.count()
        samplers.on_settled = self._release_held

    def submit(self, request: SampleRequest, fingerprint: bytes) -> Submission:
        """Idempotent on `(sampling_session_id, seq_id)`. Raises `Overloaded` if too many samples wait."""
        sampler_id, key = request.sampling_session_id, ("sample", request.sampling_session_id, request.seq_id)
        what, group = (
            f"seq {request.seq_id} of sampling session {sampler_id!r}",
            client_group(sampler_id, request.seq_id),
        )
        try:
            known = self._futures.claim(key, fingerprint, what)
        except PayloadConflict as error:
            return receipt_of_sample(self._futures.failed("Sample", error, group=group, subject=sampler_id), request)
        if known is not None:
            return receipt_of_sample(known, request)
        self._check_room()
        session_id = self._session_of(sampler_id)
        if session_id is not None:
            self._quotas.check_sample(session_id)
        if self._journal.is_on:
            request = self._with_seed(request)
        request_id = self._open_future(request, fingerprint, None)
        self._num_unwritten += 1

        def written(error: StorageError | None) -> None:
            self._num_unwritten -= 1
            self._futures.commit(request_id, error)
            if error is None:
                self._begin_or_fail(request_id, request)
            else:
                self._quotas.sample_ended(request_id)

        record = SampleRecord(fingerprint=fingerprint, request=request)
        entry = Entry(kind="sample", name=request_id, session_id=session_id, value=record)
        if self._journal.is_on:
            self._journal.lone.add(request_id)
        self._journal.post([put(entry)], written)
        return receipt_of_sample(request_id, request)

    def restore(
        self, request_id: str, record: SampleRecord, failure: TinsmithError | None, *, is_suspect: bool
    ) -> None:
        """A sample that an earlier process took: it is drawn again, with the same seed, unless it had failed.

        A suspect waits for `send_again`.
        """
        self._open_future(record.request, record.fingerprint, request_id)
        self._journal.lone.add(request_id)
        if failure is not None:
            self._futures.fail(request_id, failure)
        elif is_suspect and (sampler := self._samplers.get(record.request.sampling_session_id)) is not None:
            self._open[request_id] = _Open(sampler.slot, record.request, sampler.session_id, 0)
        else:
            self._begin_or_fail(request_id, record.request)

    def _open_future(self, request: SampleRequest, fingerprint: bytes, request_id: str | None) -> str:
        sampler_id = request.sampling_session_id
        session_id = self._session_of(sampler_id)
        request_id = self._futures.open(
            "Sample",
            key=("sample", sampler_id, request.seq_id),
            fingerprint=fingerprint,
            session_id=session_id,
            subject=sampler_id,
            on_poll=lambda: self._pending(sampler_id),
            group=client_group(sampler_id, request.seq_id),
            request_id=request_id,
            is_durable=request_id is not None or not self._journal.is_on,
        )
        if session_id is not None:
            self._quotas.sample_began(request_id, session_id)
        return request_id

    def _session_of(self, sampler_id: str) -> str | None:
        sampler = self._samplers.get(sampler_id)
        return None if sampler is None else sampler.session_id

    def _pending(self, sampler_id: str) -> Pending:
        sampler = self._samplers.get(sampler_id)
        if sampler is not None and sampler.slot.is_recovering:
            return Pending(queue_state="paused_capacity", reason=sampler.slot.pause_reason)
        return Pending()

    def _with_seed(self, request: SampleRequest) -> SampleRequest:
        """With its seed drawn, so that it is the same sample if it is drawn again."""
        if not isinstance(request, DrawSamples) or request.params.seed is not None:
            return request
        return replace(request, params=request.params.model_copy(update={"seed": self._ids.seed()}))

    def _begin_or_fail(self, request_id: str, request: SampleRequest, *, is_paid: bool = False) -> None:
        """`is_paid`: it was begun before its engine died, and its prompt was charged."""
        try:
            self._begin(request_id, request, is_paid=is_paid)
        except TinsmithError as error:
            self._open.pop(request_id, None)
            self._futures.fail(request_id, error)

    def _check_room(self) -> None:
        num_waiting = len(self._open) + len(self._requests_held) + self._num_unwritten + self._num_attended
        if num_waiting >= self._max_pending:
            raise Overloaded(f"{num_waiting} samples are waiting, the most this server takes; try again later")

    async def draw(self, request: DrawSamples, on_token: Callable[[DrawnToken], None] | None) -> SampleResponse:
        """Submit a sample and wait for it; nothing is kept for a second asking, and its `seq_id` means nothing.

        `on_token` is told of every token as it is drawn. It survives a death of its engine. Cancelling the wait stops
        the drawing. Raises `Overloaded`, or what `submit` would fail the future with.
        """
        self._check_room()
        sampler = self._live_sampler(request.sampling_session_id)
        self._quotas.check_sample(sampler.session_id)
        operation = self._operation(request, sampler)

        async def ready() -> Sample:
            await self._samplers.arrival(sampler.sampler_id)
            await self._load(sampler)
            return replace(operation, stream=on_token is not None, snapshot_id=sampler.snapshot_id)

        self._quotas.spend(sampler.session_id, len(operation.prompt))
        attended = f"attended {next(self._numbers)}"
        self._quotas.sample_began(attended, sampler.session_id)
        self._num_attended += 1
        try:
            response = await attend(sampler.slot, ready, on_token)
        finally:
            self._num_attended -= 1
            self._quotas.sample_ended(attended)
        sampler.slot.num_results += 1
        self._count(sampler.session_id, sampler.slot.card.name, len(operation.prompt), response)
        return response

    def _begin(self, request_id: str, request: SampleRequest, *, is_paid: bool) -> None:
        if self._samplers.is_expected(request.sampling_session_id):
            self._held.setdefault(request.sampling_session_id, []).append(request_id)
            self._requests_held[request_id] = request
            return
        sampler = self._live_sampler(request.sampling_session_id)
        if isinstance(request, RejectedSample):
            raise request.error
        operation = self._operation(request, sampler)
        is_loaded = self._is_loaded(sampler)
        opened = _Open(sampler.slot, request, sampler.session_id, len(operation.prompt), is_loading=not is_loaded)
        self._open[request_id] = opened
        if not is_paid:
            self._quotas.spend(sampler.session_id, len(operation.prompt))
        if is_loaded:
            self._send(request_id, operation)
            return
        task = asyncio.create_task(self._load_and_send(request_id, operation, sampler))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    def _operation(self, request: DrawSamples, sampler: Sampler) -> Sample:
        payer = self._fairness.payer(sampler.session_id, sampler.sampler_id)
        return sampling_operation(request, sampler.slot.card, sampler.snapshot_id, self._ids.seed, payer)

    def _release_held(self, sampler_id: str) -> None:
        for request_id in self._held.pop(sampler_id, []):
            if (request := self._requests_held.pop(request_id, None)) is not None:
                self._begin_or_fail(request_id, request)

    def _live_sampler(self, sampler_id: str) -> Sampler:
        sampler = self._samplers.get(sampler_id)
        if sampler is None:
            self._sampling_sessions.describe(sampler_id)
            raise SamplerGone(f"sampling session {sampler_id!r} ended with its session; create a new one")
        session = self._sessions.get_live(sampler.session_id)
        if sampler.gone is not None:
            raise sampler.gone
        sampler.used_at = self._clock.monotonic()
        self._sessions.touch(session.session_id, sampler.used_at)
        return sampler

    async def _load_and_send(self, request_id: str, operation: Sample, sampler: Sampler) -> None:
        try:
            await self._load(sampler)
            if request_id in self._open:
                self._open[request_id].is_loading = False
                self._send(request_id, replace(operation, snapshot_id=sampler.snapshot_id))
        except TinsmithError as error:
            self._finish(request_id, error)

    def _is_loaded(self, sampler: Sampler) -> bool:
        """Whether an operation submitted before the next await finds its weights in the engine."""
        return sampler.snapshot_id is None or self._samplers.pool(sampler.slot).touch_if_ready(sampler.snapshot_id)

    async def _load(self, sampler: Sampler) -> None:
        """Returns when `_is_loaded`. Raises `SamplerGone`, or what the engine met."""
        pool = self._samplers.pool(sampler.slot)
        while not self._is_loaded(sampler):
            snapshot_id, row = sampler.snapshot_id or "", sampler.checkpoint
            try:
                if row is None:
                    folder = self._put_aside_folder(sampler)
                    await pool.load(snapshot_id, str(folder), sampler.num_bytes, is_checkpoint=False)
                    continue
                async with self._checkpoints.local(row) as folder:
                    await pool.load(snapshot_id, str(folder), sampler.num_bytes, is_checkpoint=True)
            except NotFound as error:
                raise _gone(sampler) from error
            except CheckpointDamaged as error:
                if row is None:
                    sampler.gone = SamplerGone(f"the weights of sampler {sampler.sampler_id!r} are lost: {error}")
                    raise sampler.gone from error
                raise

    def _put_aside_folder(self, sampler: Sampler) -> Path:
        if sampler.weights_folder is None:
            raise _gone(sampler)
        return self._data_dir / sampler.weights_folder

    def _send(self, request_id: str, operation: Sample) -> None:
        try:
            call = self._open[request_id].slot.submit(operation)
        except EngineDied:
            if self._open[request_id].slot.is_recovering:
                return  # it is sent once the engine is there again
            self._open.pop(request_id, None)
            raise
        self._open[request_id].ticket = call.ticket
        self._futures.start(request_id)
        call.answer.add_done_callback(partial(self._answered, request_id))

    def _answered(self, request_id: str, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled():
            self._finish(request_id, EngineDied("the engine was closed"))
        elif (error := answer.exception()) is not None:
            self._note_death(request_id, error)
            if not self._is_paused(request_id, error):
                self._finish(request_id, error)
        else:
            sample = self._open.get(request_id)
            if sample is not None and self._meter.is_first(request_id):
                sample.slot.num_results += 1
                self._count(sample.session_id, sample.slot.card.name, sample.prompt_tokens, answer.result())
            self._finish(request_id, _complete(answer.result(), request_id))

    def _count(self, session_id: str, base_model: str, prompt_tokens: int, response: SampleResponse) -> None:
        cached = response.prompt_cache_hit_tokens
        self._meter.count("cached_prefill", session_id, base_model, cached)
        self._meter.count("prefill", session_id, base_model, prompt_tokens - cached)
        self._meter.count("sampled", session_id, base_model, _num_drawn(response))
        self._quotas.spend(session_id, _num_drawn(response))

    def _note_death(self, request_id: str, error: BaseException) -> None:
        sample = self._open.get(request_id)
        if sample is not None and isinstance(error, EngineDied):
            sample.slot.declare_dead(error)

    def _is_paused(self, request_id: str, error: BaseException) -> bool:
        """Whether it will be sent again."""
        sample = self._open.get(request_id)
        if sample is None or not isinstance(error, EngineDied) or not sample.slot.is_recovering:
            return False
        sample.ticket = None
        return True

    def in_flight(self, slot: EngineSlot) -> dict[str, str]:
        """Samples that an engine draws, each with its session."""
        drawn = ((r, sample) for r, sample in self._open.items() if sample.slot is slot)
        return {request_id: sample.session_id for request_id, sample in drawn if sample.ticket is not None}

    def slots_paused(self) -> set[EngineSlot]:
        """Engines for which samples wait that are to be sent again."""
        return {sample.slot for sample in self._open.values() if sample.ticket is None and not sample.is_loading}

    def waiting(self, slot: EngineSlot) -> list[str]:
        """Samples that are to be sent again."""
        paused = ((r, sample) for r, sample in self._open.items() if sample.slot is slot and not sample.is_loading)
        return [request_id for request_id, sample in paused if sample.ticket is None]

    def send_again(self, request_id: str) -> None:
        """To an engine that was started again."""
        sample = self._open.pop(request_id, None)
        if sample is not None:
            self._begin_or_fail(request_id, sample.request, is_paid=sample.prompt_tokens > 0)

    def fail(self, request_id: str, error: TinsmithError) -> None:
        self._finish(request_id, error)

    def _finish(self, request_id: str, answer: SampleResponse | BaseException) -> None:
        self._open.pop(request_id, None)
        if isinstance(answer, TinsmithError):
            if isinstance(answer, UserError):  # cancelled, say: nobody wants it of the next server either
                self._journal.note([mark_failed("sample", request_id, answer)])
            self._futures.fail(request_id, answer)
        elif isinstance(answer, BaseException):
            logger.error("sampling failed inside the engine", exc_info=answer)
            self._futures.fail(request_id, ServerError(f"internal error: {answer!r}; the server's log has the details"))
        else:
            self._futures.resolve(request_id, answer)

    async def completions(
        self, sampler_id: str, client: int, cursor: int, timeout_s: float
    ) -> tuple[list[Completion], int]:
        """Samples of one client of a sampler that ended after `cursor`, and the next cursor.

        Raises `NotFound` for no sampler, `SessionEnded` for one of an earlier server process.
        """
        sampler = self._samplers.get(sampler_id)
        if sampler is None and not self._samplers.is_expected(sampler_id):
            self._sampling_sessions.describe(sampler_id)
            raise SessionEnded(f"sampling session {sampler_id!r} ended with its session; create a new one")
        if sampler is not None:
            self._sessions.touch(sampler.session_id, self._clock.monotonic())
        return await self._futures.completions.read((sampler_id, client), cursor, timeout_s)

    def release(self, sampler_id: str, client: int, request_ids: Sequence[str]) -> None:
        """Their results were fetched."""
        for request_id in request_ids:
            self._futures.release(request_id, (sampler_id, client))

    def cancel(self, request_id: str) -> None:
        """Stop drawing. A finished or unknown request is left alone; training requests cannot be cancelled."""
        sample = self._open.get(request_id)
        if request_id in self._requests_held or (sample is not None and sample.ticket is None):
            self._requests_held.pop(request_id, None)
            self._finish(request_id, UserError("the sample was cancelled"))
        elif sample is not None and sample.ticket is not None:
            sample.slot.tell(CancelSample(ticket=sample.ticket))

    def cancel_all_of(self, session_id: str) -> None:
        """Nobody waits for its samples."""
        held = [r for r, request in self._requests_held.items() if _is_of(request, session_id)]
        for request_id in [*held, *(r for r, sample in self._open.items() if sample.session_id == session_id)]:
            self.cancel(request_id)

    def cancel_abandoned(self, timeout_s: float) -> None:
        """Samples of sessions that sent and polled nothing for so long: a poll is never held as long as that."""
        limit = self._clock.monotonic() - timeout_s
        for session_id in {sample.session_id for sample in self._open.values()}:
            session = self._sessions.find(session_id)
            if session is None or session.last_asked <= limit:
                logger.info("samples of session %s are cancelled: nobody asked for them in %g s", session_id, timeout_s)
                self.cancel_all_of(session_id)

    def engine_died(self, slot: EngineSlot, error: EngineDied) -> None:
        for request_id in [r for r, sample in self._open.items() if sample.slot is slot]:
            self._finish(request_id, error)

    def forget(self, sampler_ids: list[str]) -> None:
        self._samplers.forget(sampler_ids)
        self._futures.completions.forget(sampler_ids)
        self._sampling_sessions.forget(sampler_ids)

    async def close(self) -> None:
        for task in tuple(self._loads):
            task.cancel()
        await asyncio.gather(*self._loads, return_exceptions=True)


def _gone(sampler: Sampler) -> SamplerGone:
    row = sampler.checkpoint
    if row is None:
        return SamplerGone(f"the weights of sampler {sampler.sampler_id!r} are gone; create a new one")
    return SamplerGone(f"checkpoint {row.path!r} version {row.version} was deleted; create a new sampler")


def client_group(sampler_id: str, seq_id: int) -> Group:
    """Who waits for a sample: every client of a sampler numbers its requests in a block of its own."""
    return sampler_id, seq_id // CLIENT_BLOCK


def _is_of(request: SampleRequest, session_id: str) -> bool:
    return request.sampling_session_id.startswith(f"{session_id}:")


def _num_drawn(response: SampleResponse) -> int:
    return sum(0 if s.tokens_np is None else len(s.tokens_np) for s in response.sequences)


def receipt_of_sample(request_id: str, request: SampleRequest) -> Submission:
    count = max(0, min(request.num_samples, MAX_SAMPLES))
    return Submission(request_id=request_id, sample_sequence_ids=tuple(f"{request_id}:{i}" for i in range(count)))


def _complete(response: SampleResponse, request_id: str) -> SampleResponse:
    """Name the sequences."""
    for index, sequence in enumerate(response.sequences):
        sequence.sequence_id = f"{request_id}:{index}"
    return response
