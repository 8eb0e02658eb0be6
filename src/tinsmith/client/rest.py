"""`RestClient`: what is stored on a server. Runs, checkpoints, sessions, samplers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel

from tinsmith.client.config import Timing, resolve_config
from tinsmith.client.connection import Connection
from tinsmith.client.errors import TinkerError
from tinsmith.client.futures import APIFuture, value_twin
from tinsmith.client.http import Call, escaped, get, json_bytes, post
from tinsmith.client.models import (
    AnyObject,
    CopyWeightsReply,
    ExternalWeightsUrls,
    SessionSearchRequest,
    TraceExport,
)
from tinsmith.types.checkpoint import ParsedCheckpointTinkerPath
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

M = TypeVar("M", bound=BaseModel)
AccessScope: TypeAlias = Literal["owned", "accessible"]

_TRACE_POLL_S = 5.0
_TRACE_GIVE_UP_S = 1800.0


class RestClient:
    """Reads and manages what a server keeps. Opens no session.

    `base_url` and `api_key` are found as for `ServiceClient`. Every method returns an `APIFuture`; what the server
    refuses fails it with an `APIStatusError`.
    """

    def __init__(
        self, _holder: Connection | None = None, *, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        self._owns_connection = _holder is None
        self._connection = _holder or Connection(resolve_config(base_url=base_url, api_key=api_key, timing=Timing()))

    def __repr__(self) -> str:
        return f"<RestClient of {self._connection.config.base_url}>"

    def close(self) -> APIFuture[None]:
        """Close the connections, unless a `ServiceClient` shares them."""
        if self._owns_connection:
            return self._connection.close("success", None)

        async def nothing() -> None:
            return None

        return self._connection.begin(nothing)

    # ---- server ----

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        return self._read(get("get_server_capabilities"), GetServerCapabilitiesResponse)

    def whoami(self) -> APIFuture[dict[str, Any]]:
        """Who the key belongs to: the server's record of the key in use."""
        return self._read_dict(get("auth/apikey/me"))

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

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        return self._at_path(
            tinker_path,
            lambda run, checkpoint: self._fetch(
                post("weights_info", {"tinker_path": tinker_path}), WeightsInfoResponse
            ),
        )

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[ExternalWeightsUrls]:
        return self._at_path(
            tinker_path,
            lambda run, checkpoint: self._fetch(
                get(f"training_runs/{run}/checkpoints/{checkpoint}/external_weights_urls"), ExternalWeightsUrls
            ),
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
        """The path of the copy."""
        destination = {} if destination_project_id is None else {"destination_project_id": destination_project_id}
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
        return (await self._fetch(post("copy_weights", body, headers=headers), CopyWeightsReply)).tinker_path

    # ---- sessions and samplers ----

    def get_session(self, session_id: str, access_scope: AccessScope = "owned") -> APIFuture[GetSessionResponse]:
        return self._read(get(f"sessions/{escaped(session_id)}", access_scope=access_scope), GetSessionResponse)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        call = get("sessions", limit=limit, offset=offset, access_scope=access_scope)
        return self._read(call, ListSessionsResponse)

    def search_sessions(self, request: SessionSearchRequest) -> APIFuture[dict[str, Any]]:
        """Experimental in the protocol; the answer is passed on as it is."""
        return self._read_dict(post("sessions/search", request.model_dump(exclude_none=True)))

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

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        return self._read(get(f"samplers/{escaped(sampler_id)}"), GetSamplerResponse)

    # ---- administration ----

    def get_audit_log(self, event_type: str = "all", day: str | None = None) -> APIFuture[dict[str, Any]]:
        return self._read_dict(get("audit", event_type=event_type, day=day))

    def get_billing_usage(self, starting_on: str, ending_before: str) -> APIFuture[dict[str, Any]]:
        """Both times in RFC 3339."""
        return self._read_dict(get("billing/usage/events", starting_on=starting_on, ending_before=ending_before))

    def get_current_checkpoint_storage_usage(self, project_id: str | None = None) -> APIFuture[dict[str, Any]]:
        return self._read_dict(get("billing/usage/checkpoints/current", project_id=project_id))

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

    def _read(self, call: Call, model: type[M]) -> APIFuture[M]:
        return self._connection.begin(lambda: self._fetch(call, model))

    def _read_dict(self, call: Call) -> APIFuture[dict[str, Any]]:
        async def fetch() -> dict[str, Any]:
            return (await self._fetch(call, AnyObject)).as_dict()

        return self._connection.begin(fetch)

    async def _fetch(self, call: Call, model: type[M]) -> M:
        link = self._connection.link
        await link.configure()
        return await link.http.send_for(call, model, link.submit_retry)

    async def _command(self, call: Call) -> None:
        link = self._connection.link
        await link.configure()
        await link.http.send(call, link.submit_retry)

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
