"""Client configuration, sessions, models, samplers: the synchronous part of a training script's life."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.control.requests import NewSession
from tinsmith.server.bodies import parse_json_object
from tinsmith.server.errors import error_response, json_response
from tinsmith.server.service import ServiceDep, service_of
from tinsmith.server.tinker import decode
from tinsmith.server.tinker.identity import wants_identity_token
from tinsmith.server.tinker.schemas import (
    ClientBody,
    CreateModelBody,
    CreateSamplingSessionBody,
    CreateSessionBody,
    FinishBody,
    ModelBody,
    SamplingSessionBody,
    SessionBody,
)
from tinsmith.server.tinker.submits import receipt_response
from tinsmith.types.errors import TinsmithError
from tinsmith.types.rest import (
    Cursor,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    SupportedModel,
)

router = APIRouter(tags=["sessions"])

Limit = Annotated[int, Query(ge=0, le=10_000)]
Offset = Annotated[int, Query(ge=0)]
AccessScope = Annotated[Literal["owned", "accessible"], Query()]


@router.post("/client/config")
async def client_config(body: ClientBody, request: Request, service: ServiceDep) -> dict[str, Any]:
    settings = service.settings
    return {
        "pjwt_auth_enabled": wants_identity_token(request),
        "proto_compress_fwdbwd": True,
        "parallel_fwdbwd_chunks": True,
        "custom_loss_server_side": True,
        "sample_join_sampling_session": True,
        "sample_use_retrieve_futures": settings.sample_poller,
        "fwdbwd_max_chunk_len": settings.max_chunk_datums,
        "fwdbwd_max_chunk_bytes_count": settings.max_chunk_bytes,
        "sample_max_concurrent_requests": settings.max_concurrent_samples,
    }


@router.post("/client/dynamic_config")
async def client_dynamic_config(body: ClientBody) -> dict[str, Any]:
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


@router.get("/get_server_capabilities", response_model_exclude_none=True)
async def get_server_capabilities(service: ServiceDep) -> GetServerCapabilitiesResponse:
    models = [
        SupportedModel(model_name=card.name, max_context_length=card.max_context, trainable=True, sampleable=True)
        for card in service.control.base_models()
    ]
    return GetServerCapabilitiesResponse(supported_models=models)


@router.post("/telemetry")
async def telemetry(request: Request) -> dict[str, str]:
    """Accepted and dropped unread: the official SDK puts API keys into it."""
    async for _ in request.stream():
        pass
    return {"status": "accepted"}


@router.post("/create_session")
async def create_session(body: CreateSessionBody, service: ServiceDep) -> dict[str, str]:
    session_id = await service.control.create_session(
        NewSession(
            tags=tuple(body.tags),
            user_metadata=body.user_metadata,
            sdk_version=body.sdk_version,
            project_id=body.project_id,
            display_name=body.display_name,
        )
    )
    return {"session_id": session_id, "type": "create_session"}


async def session_heartbeat(request: Request) -> Response:
    """410 once the session has ended; the client stops then."""
    try:
        body = decode.read(SessionBody, parse_json_object(await request.body()))
        service_of(request).control.heartbeat(body.session_id)
    except TinsmithError as error:
        return error_response(error)
    return json_response({"type": "session_heartbeat"})


@router.get("/sessions", response_model_exclude_none=True)
async def list_sessions(
    service: ServiceDep, limit: Limit = 20, offset: Offset = 0, access_scope: AccessScope = "owned"
) -> ListSessionsResponse:
    """The caller's own; an admin's `accessible` ones are everyone's."""
    everything = access_scope == "accessible"
    sessions, total = await service.control.library.list_sessions(limit, offset, everything=everything)
    return ListSessionsResponse(sessions=sessions, cursor=Cursor(offset=offset, limit=limit, total_count=total))


@router.get("/sessions/{session_id}", response_model_exclude_none=True)
async def get_session(session_id: str, service: ServiceDep) -> GetSessionResponse:
    return await service.control.library.get_session(session_id)


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str, body: FinishBody, service: ServiceDep) -> dict[str, str]:
    await service.control.finish_session(session_id, body.reason.type, body.detail)
    return {}


@router.post("/create_model")
async def create_model(body: CreateModelBody, service: ServiceDep) -> Response:
    receipt = await service.control.create_model(decode.create_model(body))
    await service.control.durable(receipt)
    return receipt_response(receipt)


@router.post("/get_info", response_model_exclude_none=True)
async def get_info(body: ModelBody, service: ServiceDep) -> GetInfoResponse:
    return service.control.model_info(body.model_id)


@router.post("/create_sampling_session")
async def create_sampling_session(body: CreateSamplingSessionBody, service: ServiceDep) -> dict[str, str]:
    sampling_session_id = await service.control.create_sampling_session(
        body.session_id, body.sampling_session_seq_id, body.base_model, body.model_path
    )
    return {"sampling_session_id": sampling_session_id, "type": "create_sampling_session"}


@router.get("/samplers/{sampler_id}", response_model_exclude_none=True)
async def get_sampler(sampler_id: str, service: ServiceDep) -> GetSamplerResponse:
    return service.control.get_sampler(sampler_id)


@router.post("/join_sampling_session")
async def join_sampling_session(body: SamplingSessionBody, service: ServiceDep) -> dict[str, int]:
    """A number for one more client of a sampling session; its sequence numbers start at a billion times that."""
    service.control.own_sampler(body.sampling_session_id)
    return {"client_counter": service.next_client_number()}
