"""What the ledger is told of models: how they came to be, what was asked of them, and which answers outlive them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial

from tinsmith.control.futures import FutureStore, RequestType
from tinsmith.control.identity import Clock
from tinsmith.control.journal import FETCHED_GRACE_S, Journal, ModelRecord, RequestRecord, result_entry
from tinsmith.control.ledger import Change, Entry, mark_failed, put
from tinsmith.control.models import REQUEST_TYPES, Model, Work
from tinsmith.control.queues import Gap
from tinsmith.control.requests import Deferred, ModelRequest
from tinsmith.types.errors import StorageError, TinsmithError


class ModelEntries:
    def __init__(self, journal: Journal, futures: FutureStore, clock: Clock, *, wake: Callable[[Model], None]) -> None:
        """`wake` is told of every model a request of which may be ready now."""
        self._journal = journal
        self._futures = futures
        self._clock = clock
        self._wake = wake
        self._ended: list[Model] = []
        """They are still in the ledger."""

    def put_model(
        self, model: Model, work: Work, request_type: RequestType, fingerprint: bytes, *, undo: Callable[[], None]
    ) -> None:
        """It is not made before it is on disk. `undo` is called if it cannot be written."""
        creation = model.creation
        if creation is None or model.slot is None:
            raise AssertionError(f"model {model.model_id!r} has nothing to be made of")
        record = ModelRecord(
            base_model=model.slot.card.name,
            request_id=work.request_id,
            request_type=request_type,
            fingerprint=fingerprint,
            lora=creation.lora,
            checkpoint_id=None if creation.checkpoint is None else creation.checkpoint.checkpoint_id,
            optimizer=creation.optimizer,
            user_metadata=dict(model.user_metadata),
            context=self._futures.context_of(work.request_id),
        )

        def written(error: StorageError | None) -> None:
            self._futures.commit(work.request_id, error)
            if error is not None:
                undo()
                return
            work.is_durable = True
            self._wake(model)

        entry = Entry(
            kind="model",
            name=model.model_id,
            session_id=model.session_id,
            model_id=model.model_id,
            value=record,
        )
        model.journaled[0] = work.request_id
        self._journal.post([put(entry)], written)

    def put_failure(self, request_id: str) -> None:
        """Of a model that could not be made."""
        ended = self._futures.ended(request_id)
        if self._journal.is_on and ended is not None:
            written = partial(self._futures.commit, request_id)
            self._journal.keep_result(request_id, ended, written, self._clock.time())

    def put_request(
        self,
        model: Model,
        seq: int,
        work: Work,
        asked: ModelRequest | Deferred,
        fingerprint: bytes,
        *,
        undo: Callable[[], None],
        taken: Callable[[], None] = lambda: None,
    ) -> None:
        """Its turn does not come before it is on disk, and `taken` is called. One that cannot be written was never
        taken: `undo` is called."""
        if not self._journal.is_on:
            taken()
            return

        def written(error: StorageError | None) -> None:
            self._futures.commit(work.request_id, error)
            if error is not None:
                undo()
            elif not model.has_ended:
                work.is_durable = True
                taken()
                self._wake(model)

        work.is_durable = False
        model.journaled[seq] = work.request_id
        self._journal.post([self._request(model, seq, work, asked, fingerprint)], written)

    def note_completed(self, model: Model, seq: int, work: Work, request: ModelRequest) -> None:
        """What came of a recipe takes its place, so that it need not be done again."""
        self._journal.note([self._request(model, seq, work, request, b"")])

    def _request(
        self, model: Model, seq: int, work: Work, asked: ModelRequest | Deferred, fingerprint: bytes
    ) -> Change:
        model.replayed_tokens += work.num_tokens
        record = RequestRecord(
            request_type=REQUEST_TYPES[type(asked)],
            fingerprint=fingerprint,
            request=asked,
            context=self._futures.context_of(work.request_id),
        )
        entry = Entry(
            kind="request",
            name=work.request_id,
            session_id=model.session_id,
            model_id=model.model_id,
            seq=seq,
            value=record,
        )
        return put(entry)

    def note_gap(self, model: Model, gap: Gap[Work], error: TinsmithError) -> None:
        """A replay gives the same numbers up."""
        record = RequestRecord(
            request_type="ForwardBackward", fingerprint=b"", request=None, last_seq=model.queue.next_seq - 1
        )
        entry = Entry(
            kind="request",
            name=f"gap:{model.model_id}:{gap.missing}",
            session_id=model.session_id,
            model_id=model.model_id,
            seq=gap.missing,
            value=record,
            failure=error,
        )
        self._journal.note([put(entry), *(mark_failed("request", work.request_id, error) for work in gap.items)])

    def note_ended(self, model: Model) -> None:
        if self._journal.is_on:
            self._ended.append(model)

    def retire(self) -> None:
        """Let the ledger forget models that have ended; what they answered stays fetchable."""
        for model in self._ended:
            self._journal.end_model(model.model_id, model.session_id, self.results_of(model, None))
        self._ended.clear()

    def results_of(self, model: Model, before_seq: int | None) -> list[Entry]:
        """Ends of requests before a number, of all if that is `None`, that somebody may still ask for."""
        due = sorted(seq for seq in model.journaled if before_seq is None or seq < before_seq)
        at, entries = self._clock.time(), []
        for seq in due:
            request_id = model.journaled[seq]
            ended = self._futures.ended(request_id)
            if ended is not None and not self._futures.is_spent(request_id, FETCHED_GRACE_S):
                entries.append(result_entry(request_id, ended, at))
        return entries

    async def replayable(self, models: Iterable[Model]) -> set[str]:
        """Requests, samples among them, that a replay would do again; whatever has left the ledger is not among them,
        and will not be there after a crash either."""
        found = {request_id for model in models for request_id in model.journaled.values()}
        found |= self._journal.lone
        with contextlib.suppress(StorageError):  # then nothing leaves the ledger any more
            await self._journal.write(())
        return found
