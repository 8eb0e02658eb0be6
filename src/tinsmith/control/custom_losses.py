"""Losses that users upload: kept while their session, or a model of it, lives, for the requests that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tinsmith.control.futures import FutureStore
from tinsmith.control.identity import Clock
from tinsmith.control.journal import Journal, LossRecord
from tinsmith.control.ledger import Entry, put
from tinsmith.control.requests import CreateCustomLoss, ForwardBackward, ModelRequest, Rejected, Submission
from tinsmith.control.sessions import Session, SessionBook
from tinsmith.types.custom_loss import CustomLoss
from tinsmith.types.errors import InvalidInput, NotFound, StorageError, TinsmithError

CUSTOM = "custom"
"""The `loss_fn` of requests that name an uploaded loss by `loss_id` in their `loss_fn_config`."""


class CustomLosses:
    def __init__(
        self, *, sessions: SessionBook, futures: FutureStore, clock: Clock, max_per_session: int, journal: Journal
    ) -> None:
        self._journal = journal
        self._sessions = sessions
        self._futures = futures
        self._clock = clock
        self._max_per_session = max_per_session

    def create(self, request: CreateCustomLoss, fingerprint: bytes) -> Submission:
        """Idempotent on (session, custom_loss_seq_id). The future's result is the loss's id."""
        session_id, seq_id = request.session_id, request.custom_loss_seq_id
        key, loss_id = ("custom loss", session_id, seq_id), f"{session_id}:loss:{seq_id}"
        try:
            known = self._futures.claim(key, fingerprint, f"custom_loss_seq_id {seq_id} of session {session_id!r}")
            if known is not None:
                return Submission(request_id=known)
            session = self._sessions.get_live(session_id)
            if len(session.custom_losses) >= self._max_per_session:
                raise InvalidInput(
                    f"session {session_id!r} has {self._max_per_session} custom losses, the most this server keeps"
                )
        except TinsmithError as error:
            return Submission(request_id=self._futures.failed("CreateCustomLoss", error, subject=loss_id))
        session.custom_losses[loss_id] = request.loss
        self._sessions.touch(session_id, self._clock.monotonic())
        request_id = self._futures.open(
            "CreateCustomLoss",
            key=key,
            fingerprint=fingerprint,
            session_id=session_id,
            subject=loss_id,
            is_durable=not self._journal.is_on,
        )

        def written(error: StorageError | None) -> None:
            self._futures.commit(request_id, error)
            if error is None:
                self._futures.resolve(request_id, loss_id)
            else:
                session.custom_losses.pop(loss_id, None)

        record = LossRecord(request_id=request_id, fingerprint=fingerprint, seq_id=seq_id, loss=request.loss)
        self._journal.post([put(Entry(kind="loss", name=loss_id, session_id=session_id, value=record))], written)
        return Submission(request_id=request_id)

    def restore(self, session: Session, loss_id: str, record: LossRecord) -> None:
        """A loss that an earlier process was given."""
        session.custom_losses[loss_id] = record.loss
        self._futures.open(
            "CreateCustomLoss",
            key=("custom loss", session.session_id, record.seq_id),
            fingerprint=record.fingerprint,
            session_id=session.session_id,
            request_id=record.request_id,
        )
        self._futures.resolve(record.request_id, loss_id)

    def attach(self, request: ModelRequest, session_id: str) -> ModelRequest:
        """A training request that names an uploaded loss, with that loss; `Rejected` if it cannot be found."""
        if not isinstance(request, ForwardBackward) or request.loss_fn != CUSTOM or request.custom_loss is not None:
            return request
        try:
            return replace(request, custom_loss=self._find(session_id, request.loss_fn_config))
        except TinsmithError as error:
            return Rejected(model_id=request.model_id, seq_id=request.seq_id, error=error)

    def _find(self, session_id: str, config: Mapping[str, float | str]) -> CustomLoss:
        for name in config:
            if name != "loss_id":
                raise InvalidInput(f"loss_fn_config[{name!r}] is unknown for {CUSTOM!r}, which takes loss_id")
        loss_id = config.get("loss_id")
        if not isinstance(loss_id, str):
            raise InvalidInput(
                f"loss_fn_config['loss_id'] must be the id that create_custom_loss gave, not {loss_id!r}"
            )
        session = self._sessions.find(session_id)  # a finished one too: what waits in it is still done
        found = None if session is None else session.custom_losses.get(loss_id)
        if found is None:
            raise NotFound(
                f"session {session_id!r} has no custom loss {loss_id!r}; create it with create_custom_loss. "
                "A loss belongs to the session that created it"
            )
        return found
