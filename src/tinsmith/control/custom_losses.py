"""Losses that users upload: kept for the life of their session, and found again by the requests that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tinsmith.control.futures import FutureStore
from tinsmith.control.identity import Clock
from tinsmith.control.requests import CreateCustomLoss, ForwardBackward, ModelRequest, Rejected, Submission
from tinsmith.control.sessions import SessionBook
from tinsmith.types.custom_loss import CustomLoss
from tinsmith.types.errors import InvalidInput, NotFound, TinsmithError

CUSTOM = "custom"
"""The `loss_fn` of requests that name an uploaded loss by `loss_id` in their `loss_fn_config`."""


class CustomLosses:
    def __init__(self, *, sessions: SessionBook, futures: FutureStore, clock: Clock, max_per_session: int) -> None:
        self._sessions = sessions
        self._futures = futures
        self._clock = clock
        self._max_per_session = max_per_session

    def create(self, request: CreateCustomLoss, fingerprint: bytes) -> Submission:
        """Idempotent on (session, custom_loss_seq_id). The future's result is the loss's id."""
        session_id, seq_id = request.session_id, request.custom_loss_seq_id
        key = ("custom loss", session_id, seq_id)
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
            return Submission(request_id=self._futures.failed("CreateCustomLoss", error))
        loss_id = f"{session_id}:loss:{seq_id}"
        session.custom_losses[loss_id] = request.loss
        self._sessions.touch(session_id, self._clock.monotonic())
        request_id = self._futures.open(
            "CreateCustomLoss", key=key, fingerprint=fingerprint, session_id=session_id, subject=loss_id
        )
        self._futures.resolve(request_id, loss_id)
        return Submission(request_id=request_id)

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
        found = self._sessions.get_live(session_id).custom_losses.get(loss_id)
        if found is None:
            raise NotFound(
                f"session {session_id!r} has no custom loss {loss_id!r}; create it with create_custom_loss. "
                "A loss belongs to the session that created it"
            )
        return found
