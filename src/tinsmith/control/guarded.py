"""`GuardedControl`: control as one caller sees it. Whatever a caller does not own is, to it, not there.

Every id is looked at before it is passed on. One that belongs to another user is answered like one that was never given
out, by the same code: nobody can tell the two apart. The user of a server without keys owns everything, and is passed
on as it is. Background work (janitor, replay, supervisor) uses `Control` itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tinsmith.control.administration import Administration, OwnKey
from tinsmith.control.completions import Completion
from tinsmith.control.errors import Forbidden
from tinsmith.control.futures import Outcome, Pending, RequestType
from tinsmith.control.guarded_library import GuardedLibrary, check_project
from tinsmith.control.identities import Caller, Scope
from tinsmith.control.memos import Memo
from tinsmith.control.models import REQUEST_TYPES
from tinsmith.control.requests import (
    CreateCustomLoss,
    CreateModel,
    CreateModelFromCheckpoint,
    DrawSamples,
    ModelRequest,
    NewSession,
    Recipe,
    SampleRequest,
    Submission,
)
from tinsmith.control.sampling import receipt_of_sample
from tinsmith.control.service import Control
from tinsmith.control.sessions import FinishReason
from tinsmith.types.errors import NotFound
from tinsmith.types.operations import BaseModelCard
from tinsmith.types.rest import GetInfoResponse, GetSamplerResponse
from tinsmith.types.results import DrawnToken, SampleResponse


class GuardedControl:
    """`identify` is asked who the caller is each time: its rights may change, and its key may be revoked.

    Every method raises what it raises (`Unauthorized`), `Forbidden` if the caller's key is not for this, and what
    the same method of `Control` raises.
    """

    def __init__(self, control: Control, identify: Callable[[], Caller]) -> None:
        self._control = control
        self._identify = identify
        self.library = GuardedLibrary(control, self.permit)

    @property
    def caller(self) -> Caller:
        return self._identify()

    def permit(self, *scopes: Scope) -> Caller:
        """The caller, if its key has one of `scopes`."""
        caller = self._identify()
        if caller.scopes.isdisjoint(scopes):
            wanted = " or ".join(repr(scope) for scope in scopes)
            raise Forbidden(
                f"this needs the scope {wanted}; your key has {', '.join(sorted(caller.scopes)) or 'none'}, "
                f"as {caller.role} {caller.user_id!r}"
            )
        return caller

    def _owns(self, caller: Caller, object_id: str) -> bool:
        return caller.is_local or self._control.owners.of(object_id) == caller.user_id

    def _sees(self, caller: Caller, object_id: str) -> bool:
        return caller.sees_all or self._control.owners.of(object_id) == caller.user_id

    # ---- accounts ----

    @property
    def administration(self) -> Administration:
        """Raises `Forbidden` unless the caller is an admin."""
        return self._control.administration(self.permit("admin"))

    @property
    def own_key(self) -> OwnKey:
        """Raises `Unsupported` on a server without keys."""
        return self._control.own_key(self.caller)

    # ---- the server ----

    @property
    def is_ready(self) -> bool:
        return self._control.is_ready

    @property
    def readiness_reason(self) -> str | None:
        return self._control.readiness_reason

    def base_models(self) -> list[BaseModelCard]:
        return self._control.base_models()

    # ---- sessions ----

    async def create_session(self, request: NewSession) -> str:
        caller = self.permit("train", "sample")
        project_id = request.project_id
        if not caller.is_local:
            if project_id is None and caller.project_id in caller.project_ids:
                project_id = caller.project_id
            check_project(caller, project_id)
        return await self._control.create_session(replace(request, owner=caller.user_id, project_id=project_id))

    def heartbeat(self, session_id: str) -> None:
        caller = self.caller
        if not self._owns(caller, session_id):
            raise no_session(session_id)
        self._control.heartbeat(session_id)

    async def finish_session(self, session_id: str, reason: FinishReason, detail: str | None) -> None:
        caller = self.permit("train", "sample")
        if not self._owns(caller, session_id):
            raise no_session(session_id)
        await self._control.finish_session(session_id, reason, detail)

    # ---- models and training ----

    async def create_model(self, request: CreateModel, *, context: Any = None) -> Submission:
        caller = self.permit("train")
        if self._owns(caller, request.session_id):
            return await self._control.create_model(request, context=context)
        return self._no_session(caller, "CreateModel", request, context)

    async def create_model_from_checkpoint(self, request: CreateModelFromCheckpoint) -> Submission:
        """A checkpoint of another user is not there unless it is published."""
        caller = self.permit("train")
        if self._owns(caller, request.session_id):
            return await self._control.create_model_from_checkpoint(request)
        return self._no_session(caller, "LoadWeights", request, None)

    def _no_session(
        self,
        caller: Caller,
        request_type: RequestType,
        request: CreateModel | CreateModelFromCheckpoint,
        context: Any,
    ) -> Submission:
        error = NotFound(f"no session {request.session_id!r} in this server process")
        receipt = self._control.refuse(request_type, error, owner=caller.user_id, context=context)
        return replace(receipt, model_id=f"{request.session_id}:train:{request.model_seq_id}")

    def create_custom_loss(self, request: CreateCustomLoss, fingerprint: bytes) -> Submission:
        caller = self.permit("train")
        if self._owns(caller, request.session_id):
            return self._control.create_custom_loss(request, fingerprint)
        error = NotFound(f"no session {request.session_id!r} in this server process")
        return self._control.refuse("CreateCustomLoss", error, owner=caller.user_id)

    def submit(self, request: ModelRequest, fingerprint: bytes, *, context: Any = None) -> Submission:
        caller = self.permit("train")
        if self._owns(caller, request.model_id):
            return self._control.submit(request, fingerprint, context=context)
        return self._no_model(caller, REQUEST_TYPES[type(request)], request.model_id, context)

    def submit_deferred(self, model_id: str, recipe: Recipe, *, context: Any = None) -> Submission:
        caller = self.permit("train")
        if self._owns(caller, model_id):
            return self._control.submit_deferred(model_id, recipe, context=context)
        return self._no_model(caller, "ForwardBackward", model_id, context)

    def _no_model(self, caller: Caller, request_type: RequestType, model_id: str, context: Any) -> Submission:
        error = NotFound(f"no model {model_id!r}")
        receipt = self._control.refuse(request_type, error, owner=caller.user_id, context=context)
        return replace(receipt, model_id=model_id)

    def start_job(
        self,
        request_type: RequestType,
        recipe: Recipe,
        *,
        session_id: str,
        subject: str | None = None,
        context: Any = None,
    ) -> str:
        """In a session of the caller's."""
        caller = self.permit("train", "sample")
        if not self._owns(caller, session_id):
            raise no_session(session_id)
        return self._control.start_job(request_type, recipe, session_id=session_id, subject=subject, context=context)

    def remember(self, memo: Memo) -> asyncio.Future[None]:
        """In a session of the caller's; see `Memos.keep`."""
        if not self._owns(self.caller, memo.session_id):
            raise no_session(memo.session_id)
        return self._control.memos.keep(memo)

    def forget(self, memo: Memo) -> asyncio.Future[None]:
        if not self._owns(self.caller, memo.session_id):
            raise no_session(memo.session_id)
        return self._control.memos.drop(memo.name)

    def model_info(self, model_id: str) -> GetInfoResponse:
        if not self._sees(self.caller, model_id):
            raise NotFound(f"no model {model_id!r}")
        return self._control.model_info(model_id)

    # ---- sampling ----

    async def create_sampling_session(
        self, session_id: str, seq_id: int, base_model: str | None, model_path: str | None
    ) -> str:
        """A checkpoint of another user is not there unless it is published."""
        if not self._owns(self.permit("sample", "train"), session_id):
            raise NotFound(f"no session {session_id!r} in this server process")
        return await self._control.create_sampling_session(session_id, seq_id, base_model, model_path)

    def get_sampler(self, sampler_id: str) -> GetSamplerResponse:
        if not self._sees(self.caller, sampler_id):
            raise no_sampler(sampler_id)
        return self._control.get_sampler(sampler_id)

    def own_sampler(self, sampler_id: str) -> GetSamplerResponse:
        """As `get_sampler`, for one that shall be sampled from: seeing it is not enough."""
        if not self._owns(self.caller, sampler_id):
            raise no_sampler(sampler_id)
        return self._control.get_sampler(sampler_id)

    def sampler_digest(self, sampler_id: str) -> str | None:
        if not self._sees(self.caller, sampler_id):
            raise no_sampler(sampler_id)
        return self._control.sampler_digest(sampler_id)

    def submit_sample(self, request: SampleRequest, fingerprint: bytes) -> Submission:
        caller = self.permit("sample")
        if self._owns(caller, request.sampling_session_id):
            return self._control.submit_sample(request, fingerprint)
        error = no_sampler(request.sampling_session_id)
        return receipt_of_sample(self._control.refuse("Sample", error, owner=caller.user_id).request_id, request)

    async def draw_samples(
        self, request: DrawSamples, on_token: Callable[[DrawnToken], None] | None = None
    ) -> SampleResponse:
        if not self._owns(self.permit("sample"), request.sampling_session_id):
            raise no_sampler(request.sampling_session_id)
        return await self._control.draw_samples(request, on_token)

    def cancel(self, request_id: str) -> None:
        """Of a request that is not the caller's as of one that was never given out: nothing."""
        caller = self.permit("sample")
        if caller.is_local or self._control.owners.of_request(request_id) == caller.user_id:
            self._control.cancel(request_id)

    # ---- futures ----

    async def durable(self, receipt: Submission) -> None:
        await self._control.durable(receipt)

    async def wait_future(self, request_id: str, timeout_s: float) -> Outcome | Pending:
        caller = self.caller
        if not caller.is_local and self._control.owners.of_request(request_id) not in (None, caller.user_id):
            raise NotFound(f"no request {request_id!r}")
        return await self._control.wait_future(request_id, timeout_s)

    async def completions(
        self, sampler_id: str, client: int, cursor: int, timeout_s: float
    ) -> tuple[list[Completion], int]:
        if not self._owns(self.caller, sampler_id):
            raise no_sampler(sampler_id)
        return await self._control.completions(sampler_id, client, cursor, timeout_s)

    def release_samples(self, sampler_id: str, client: int, request_ids: Sequence[str]) -> None:
        if not self._owns(self.caller, sampler_id):
            raise no_sampler(sampler_id)
        self._control.release_samples(sampler_id, client, request_ids)


def no_session(session_id: str) -> NotFound:
    return NotFound(f"no session {session_id!r}")


def no_sampler(sampler_id: str) -> NotFound:
    return NotFound(f"no sampling session {sampler_id!r}")
