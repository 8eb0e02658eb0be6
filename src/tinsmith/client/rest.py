"""`RestClient`: what is stored on a server. Runs, checkpoints, sessions, samplers."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import Coroutine, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from tinsmith.client.admin import AdminClient, AuditEventType
from tinsmith.client.credentials import claims, is_jwt
from tinsmith.client.errors import TinkerError
from tinsmith.client.exchanges import RestExchanges
from tinsmith.client.futures import APIFuture, value_twin, warn_deprecated
from tinsmith.client.http import Call, escaped, get, json_bytes, parse, post
from tinsmith.client.models import TraceExport
from tinsmith.client.uploads import pack_adapter
from tinsmith.types.checkpoint import Checkpoint, ParsedCheckpointTinkerPath
from tinsmith.types.replies import CopyWeightsResponse, ExternalWeightsUrlsResponse, WhoamiResponse
from tinsmith.types.rest import (
    CheckpointsListResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from tinsmith.types.sessions import SessionSearchRequest, SessionSearchResponse
from tinsmith.types.usage import AuditLogResponse, BillingUsageResponse, CurrentCheckpointStorageUsageResponse

AccessScope: TypeAlias = Literal["owned", "accessible"]

_TRACE_POLL_S = 5.0
_IMPORT_TIMEOUT_S = 1800.0
_TRACE_GIVE_UP_S = 1800.0


class ExperimentalWarning(FutureWarning):
    """The method may change or go without notice."""


class _OrgDetails(BaseModel):
    name: str


class _UserDetails(BaseModel):
    email: str


class _KeyDetails(BaseModel):
    org_details: _OrgDetails
    user_details: _UserDetails


class _KeyRecord(BaseModel):
    details: _KeyDetails


class RestClient(RestExchanges):
    """Reads and manages what a server keeps. Opens no session.

    `base_url` and `api_key` are found as for `ServiceClient`. Every method returns an `APIFuture`; what the server
    refuses fails it with an `APIStatusError`.
    """

    # ---- server ----

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        return self._read(get("get_server_capabilities"), GetServerCapabilitiesResponse)

    def whoami(self) -> APIFuture[WhoamiResponse]:
        """Whom the credential belongs to: what the server's token says, or the server's record of the key."""
        return self._connection.begin(self._whoami)

    # ---- training runs ----

    def get_training_run(self, training_run_id: str, access_scope: AccessScope = "owned") -> APIFuture[TrainingRun]:
        return self._read(get(f"training_runs/{escaped(training_run_id)}", access_scope=access_scope), TrainingRun)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[TrainingRun]:
        return self._at_path(
            tinker_path,
            lambda run, _: self._fetch(get(f"training_runs/{run}", access_scope=access_scope), TrainingRun),
        )

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> APIFuture[TrainingRunsResponse]:
        call = get("training_runs", limit=limit, offset=offset, access_scope=access_scope, project_id=project_id)
        return self._read(call, TrainingRunsResponse)

    # ---- checkpoints ----

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        return self._read(get(f"training_runs/{escaped(training_run_id)}/checkpoints"), CheckpointsListResponse)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        return self._read(get("checkpoints", limit=limit, offset=offset), CheckpointsListResponse)

    def get_checkpoint_by_tinker_path(self, tinker_path: str) -> APIFuture[Checkpoint]:
        """What an address means now: a path, `path~version`, `…/~latest`, `…/~best(metric)`. Tinsmith servers only."""
        return self._at_path(
            tinker_path,
            lambda run, checkpoint: self._fetch(get(f"training_runs/{run}/checkpoints/{checkpoint}"), Checkpoint),
        )

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        return self._at_path(
            tinker_path,
            lambda run, checkpoint: self._fetch(
                post("weights_info", {"tinker_path": tinker_path}), WeightsInfoResponse
            ),
        )

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[ExternalWeightsUrlsResponse]:
        return self._at_path(
            tinker_path,
            lambda run, checkpoint: self._fetch(
                get(f"training_runs/{run}/checkpoints/{checkpoint}/external_weights_urls"), ExternalWeightsUrlsResponse
            ),
        )

    def import_adapter(
        self,
        path: Path | str,
        name: str | None = None,
        *,
        base_model: str | None = None,
        ttl_seconds: int | None = None,
    ) -> APIFuture[Checkpoint]:
        """Make a checkpoint of an adapter on this machine, a folder in PEFT's layout or a tar archive of one.

        `name` is that of the folder unless given. `base_model` says for which model, if not the one that the adapter
        names. Fails with `ValueError` if there is no adapter. Tinsmith servers only.
        """
        source = Path(path)
        params = {"name": name or source.resolve().stem, "base_model": base_model, "ttl_seconds": ttl_seconds}

        async def send() -> Checkpoint:
            body = await asyncio.to_thread(pack_adapter, source)
            call = Call(
                method="POST",
                path="checkpoints/import",
                body=body,
                content_type="application/x-tar",
                params=params,
                timeout=_IMPORT_TIMEOUT_S,
            )
            return await self._fetch(call, Checkpoint)

        return self._connection.begin(send)

    def export_merged(
        self,
        tinker_path: str,
        name: str | None = None,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        ttl_seconds: int | None = None,
    ) -> APIFuture[Checkpoint]:
        """Full weights, the adapter merged into the base model: an external checkpoint, to be downloaded.

        `dtype` is that of every weight; by default each keeps the base model's. Takes minutes for a large model.
        Tinsmith servers only.
        """
        body = {"name": name, "dtype": dtype, "ttl_seconds": ttl_seconds}
        return self._at_path(
            tinker_path,
            lambda run, checkpoint: self._export(post(f"training_runs/{run}/checkpoints/{checkpoint}/merged", body)),
        )

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        run, checkpoint = escaped(training_run_id), escaped(checkpoint_id, safe=":/")
        return self._connection.begin(
            lambda: self._command(Call(method="DELETE", path=f"training_runs/{run}/checkpoints/{checkpoint}"))
        )

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return self._command_at_path("DELETE", tinker_path, "")

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return self._command_at_path("POST", tinker_path, "/publish")

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return self._command_at_path("DELETE", tinker_path, "/publish")

    def pin_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """No rule of the server's removes it then. Tinsmith servers only."""
        return self._command_at_path("POST", tinker_path, "/pin")

    def unpin_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Tinsmith servers only."""
        return self._command_at_path("DELETE", tinker_path, "/pin")

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """`None` lets the checkpoint live for ever."""
        return self._command_at_path("PUT", tinker_path, "/ttl", {"ttl_seconds": ttl_seconds})

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """The path of the copy, in a project: `destination_project_id`, or TINKER_PROJECT_ID.

        Raises `ValueError` if neither names one.
        """
        project = destination_project_id or os.environ.get("TINKER_PROJECT_ID")
        if not project:
            raise ValueError("copy_weights needs destination_project_id, or TINKER_PROJECT_ID in the environment")
        destination = {"destination_project_id": project}
        return self._at_path(
            path, lambda run, checkpoint: self.copy_to(path, destination, ttl_seconds, weights_access_token)
        )

    async def copy_to(
        self, path: str, destination: Mapping[str, Any], ttl_seconds: int | None, token: str | None
    ) -> str:
        """On the client's event loop: copy a checkpoint to a project, or to a new model of a session."""
        body = {"source_path": path, **destination}
        if ttl_seconds is not None:
            body["ttl_seconds"] = ttl_seconds
        headers = {} if token is None else {"X-Tinker-Weights-Access-Token": token}
        return (await self._fetch(post("copy_weights", body, headers=headers), CopyWeightsResponse)).tinker_path

    # ---- sessions and samplers ----

    def get_session(self, session_id: str, access_scope: AccessScope = "owned") -> APIFuture[GetSessionResponse]:
        return self._read(get(f"sessions/{escaped(session_id)}", access_scope=access_scope), GetSessionResponse)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        call = get("sessions", limit=limit, offset=offset, access_scope=access_scope)
        return self._read(call, ListSessionsResponse)

    def search_sessions(self, request: SessionSearchRequest) -> APIFuture[SessionSearchResponse]:
        """Experimental in the protocol."""
        warnings.warn("search_sessions() is experimental", ExperimentalWarning, stacklevel=2)
        body = request.model_dump(mode="json", exclude_none=True)
        return self._read(post("sessions/search", body), SessionSearchResponse)

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        call = Call(
            method="PUT",
            path=f"sessions/{escaped(session_id)}/project",
            body=json_bytes({"project_id": project_id}),
        )
        return self._connection.begin(lambda: self._command(call))

    def export_session_trace(self, session_id: str) -> APIFuture[str]:
        """The address of the trace, once the server has written it."""
        return self._connection.begin(lambda: self._export_trace(session_id))

    def fetch_address(self, url: str) -> APIFuture[bytes]:
        """What a signed address holds. No credential is shown to it."""

        async def fetch() -> bytes:
            link = self._connection.link
            await link.configure()
            async with link.http.stream(url) as answer:
                return await answer.aread()

        return self._connection.begin(fetch)

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        return self._read(get(f"samplers/{escaped(sampler_id)}"), GetSamplerResponse)

    # ---- administration ----

    def get_audit_log(
        self, event_type: AuditEventType = "all", day: date | str | None = None
    ) -> APIFuture[AuditLogResponse]:
        """Deprecated: use `AdminClient`."""
        warn_deprecated("get_audit_log() is deprecated: use AdminClient().get_audit_log()")
        return AdminClient(self._connection).get_audit_log(event_type, day)

    def get_billing_usage(
        self, starting_on: datetime | str, ending_before: datetime | str
    ) -> APIFuture[BillingUsageResponse]:
        """Deprecated: use `AdminClient`."""
        warn_deprecated("get_billing_usage() is deprecated: use AdminClient().get_billing_usage()")
        return AdminClient(self._connection).get_billing_usage(starting_on, ending_before)

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[CurrentCheckpointStorageUsageResponse]:
        """Deprecated: use `AdminClient`."""
        warn_deprecated("get_current_checkpoint_storage_usage() is deprecated: use AdminClient()")
        return AdminClient(self._connection).get_current_checkpoint_storage_usage(project_id)

    get_training_run_async = value_twin(get_training_run)
    get_training_run_by_tinker_path_async = value_twin(get_training_run_by_tinker_path)
    list_training_runs_async = value_twin(list_training_runs)
    list_checkpoints_async = value_twin(list_checkpoints)
    list_user_checkpoints_async = value_twin(list_user_checkpoints)
    get_external_weights_urls_async = value_twin(get_external_weights_urls)
    delete_checkpoint_async = value_twin(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = value_twin(delete_checkpoint_from_tinker_path)
    publish_checkpoint_from_tinker_path_async = value_twin(publish_checkpoint_from_tinker_path)
    unpublish_checkpoint_from_tinker_path_async = value_twin(unpublish_checkpoint_from_tinker_path)
    set_checkpoint_ttl_from_tinker_path_async = value_twin(set_checkpoint_ttl_from_tinker_path)
    copy_weights_async = value_twin(copy_weights)
    get_session_async = value_twin(get_session)
    list_sessions_async = value_twin(list_sessions)
    assign_session_project_async = value_twin(assign_session_project)
    export_session_trace_async = value_twin(export_session_trace)
    get_sampler_async = value_twin(get_sampler)
    get_audit_log_async = value_twin(get_audit_log)
    get_billing_usage_async = value_twin(get_billing_usage)
    get_current_checkpoint_storage_usage_async = value_twin(get_current_checkpoint_storage_usage)

    # ---- exchanges ----

    async def _whoami(self) -> WhoamiResponse:
        link = self._connection.link
        await link.configure()
        shown = await link.http.credential.value()
        if is_jwt(shown):
            return _owner_of(claims(shown))
        key = await link.http.send_for(get("auth/apikey/me"), _KeyRecord, link.submit_retry)
        email = key.details.user_details.email
        return WhoamiResponse(user_urn=email, org_urn=key.details.org_details.name, email=email)

    def _at_path(self, tinker_path: str, fetch: Any) -> APIFuture[Any]:
        """`fetch(run, checkpoint)` with both parts of a path escaped. A bad path fails the future."""

        def prepare() -> Coroutine[Any, Any, Any]:
            parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
            work: Coroutine[Any, Any, Any] = fetch(
                escaped(parsed.training_run_id), escaped(parsed.checkpoint_id, safe=":/")
            )
            return work

        return self._connection.begin(prepare)

    def _command_at_path(
        self, method: str, tinker_path: str, suffix: str, body: Mapping[str, Any] | None = None
    ) -> APIFuture[None]:
        return self._at_path(
            tinker_path,
            lambda run, checkpoint: self._command(
                Call(
                    method=method,
                    path=f"training_runs/{run}/checkpoints/{checkpoint}{suffix}",
                    body=None if body is None else json_bytes(body),
                )
            ),
        )

    async def _export(self, call: Call) -> Checkpoint:
        link = self._connection.link
        await link.configure()
        while True:  # the server holds each request for a while, and ends an export that failed
            answer = await link.http.send(call, link.submit_retry)
            if answer.status_code != 202:
                return parse(answer, Checkpoint)

    async def _export_trace(self, session_id: str) -> str:
        call = get(f"sessions/{escaped(session_id)}/trace_export")
        give_up = time.monotonic() + _TRACE_GIVE_UP_S
        while time.monotonic() < give_up:
            export = await self._fetch(call, TraceExport)
            if export.status == "failed":
                raise TinkerError(f"the trace of session {session_id!r} could not be exported: {export.error}")
            if export.status == "ready" and export.url is not None:
                return export.url
            await asyncio.sleep(_TRACE_POLL_S)
        raise TinkerError(f"the trace of session {session_id!r} was not ready within {_TRACE_GIVE_UP_S:.0f} s")


def _owner_of(told: Mapping[str, Any]) -> WhoamiResponse:
    """Raises `TinkerError` if a token does not say whom it belongs to."""
    try:
        organization = f"tml:organization:{told['org_id']}"
        return WhoamiResponse(user_urn=str(told["sub"]), org_urn=organization, email=told.get("email") or None)
    except KeyError as error:
        raise TinkerError(f"the token in use does not say whom it belongs to: it has no {error.args[0]!r}") from error
