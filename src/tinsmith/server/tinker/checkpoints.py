"""Training runs and checkpoints. A checkpoint id holds a slash, `<kind>/<name>`, and so is two segments of a path."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.control.copies import CopyOrder
from tinsmith.control.exports import MergeOrder
from tinsmith.server.service import ServiceDep
from tinsmith.server.tinker.schemas import CopyWeightsBody, MergedBody, TtlBody, WeightsInfoBody
from tinsmith.server.tinker.sessions import AccessScope, Limit, Offset
from tinsmith.types.checkpoint import PATH_KINDS, Checkpoint
from tinsmith.types.rest import (
    CheckpointsListResponse,
    Cursor,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from tinsmith.types.rest_admin import CopyWeightsResponse

router = APIRouter(tags=["checkpoints"])

_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


def _kinds_known_to(request: Request) -> Collection[str]:
    """Kinds of checkpoints that the caller may be told of: the official SDK before 0.28 refuses a whole list for one
    external checkpoint in it."""
    version = request.headers.get("x-stainless-package-version", "")
    number = re.match(r"(\d+)\.(\d+)\.", version)
    if number is not None and (int(number[1]), int(number[2])) < (0, 28):
        return [kind for kind in PATH_KINDS if kind != "external_weights"]
    return PATH_KINDS


KnownKinds = Annotated[Collection[str], Depends(_kinds_known_to)]


@router.get("/training_runs", response_model_exclude_none=True)
async def list_training_runs(
    service: ServiceDep,
    limit: Limit = 20,
    offset: Offset = 0,
    project_id: Annotated[str | None, Query()] = None,
    access_scope: AccessScope = "owned",
) -> TrainingRunsResponse:
    """The caller's own; an admin's `accessible` ones are everyone's."""
    everything = access_scope == "accessible"
    runs, total = await service.control.library.list_training_runs(limit, offset, project_id, everything=everything)
    return TrainingRunsResponse(training_runs=runs, cursor=Cursor(offset=offset, limit=limit, total_count=total))


@router.get("/training_runs/{run_id}", response_model_exclude_none=True)
async def get_training_run(run_id: str, service: ServiceDep) -> TrainingRun:
    return await service.control.library.get_training_run(run_id)


@router.get("/training_runs/{run_id}/checkpoints", response_model_exclude_none=True)
async def list_checkpoints(run_id: str, service: ServiceDep, kinds: KnownKinds) -> CheckpointsListResponse:
    return CheckpointsListResponse(checkpoints=await service.control.library.list_checkpoints(run_id, kinds))


@router.get("/checkpoints", response_model_exclude_none=True)
async def list_user_checkpoints(
    service: ServiceDep, kinds: KnownKinds, limit: Limit = 100, offset: Offset = 0
) -> CheckpointsListResponse:
    """Newest first."""
    checkpoints, total = await service.control.library.list_user_checkpoints(limit, offset, kinds)
    return CheckpointsListResponse(
        checkpoints=checkpoints, cursor=Cursor(offset=offset, limit=limit, total_count=total)
    )


@router.post("/weights_info", response_model_exclude_none=True)
async def weights_info(body: WeightsInfoBody, service: ServiceDep) -> WeightsInfoResponse:
    return await service.control.library.weights_info(body.tinker_path)


@router.post("/copy_weights")
async def copy_weights(
    body: CopyWeightsBody, service: ServiceDep, x_idempotency_key: Annotated[str | None, Header()] = None
) -> CopyWeightsResponse:
    """The same request under the same key again is the same copy."""
    order = CopyOrder(
        source_path=body.source_path,
        project_id=body.destination_project_id,
        session_id=body.session_id,
        model_seq_id=body.model_seq_id,
        ttl_seconds=body.ttl_seconds,
    )
    return CopyWeightsResponse(tinker_path=await service.control.library.copy_weights(order, x_idempotency_key))


@router.get(_CHECKPOINT, response_model_exclude_none=True)
async def get_checkpoint(run_id: str, kind: str, name: str, service: ServiceDep) -> Checkpoint:
    """What an address means now: a name, `name~version`, `~latest`, `~best(metric)`."""
    return await service.control.library.get_checkpoint(run_id, f"{kind}/{name}")


_STILL_MERGING: dict[int | str, dict[str, Any]] = {202: {"description": "It is not ready yet: ask again"}}


@router.post(f"{_CHECKPOINT}/merged", response_model_exclude_none=True, responses=_STILL_MERGING)
async def export_merged(
    run_id: str, kind: str, name: str, body: MergedBody, service: ServiceDep, response: Response
) -> Checkpoint | None:
    """Full weights, the adapter merged into the base model, as an external checkpoint of the same run. Asked again, it
    is the same export."""
    order = MergeOrder(
        run_id=run_id,
        checkpoint_id=f"{kind}/{name}",
        name=body.name,
        dtype=body.dtype,
        ttl_seconds=body.ttl_seconds,
    )
    made = await service.control.library.export_merged(order)
    if made is None:
        response.status_code = 202
    return made


@router.delete(_CHECKPOINT, status_code=204)
async def delete_checkpoint(run_id: str, kind: str, name: str, service: ServiceDep) -> Response:
    await service.control.library.delete_checkpoint(run_id, f"{kind}/{name}")
    return Response(status_code=204)


@router.put(f"{_CHECKPOINT}/ttl", status_code=204)
async def set_checkpoint_ttl(run_id: str, kind: str, name: str, body: TtlBody, service: ServiceDep) -> Response:
    await service.control.library.set_checkpoint_ttl(run_id, f"{kind}/{name}", body.ttl_seconds)
    return Response(status_code=204)


@router.post(f"{_CHECKPOINT}/publish", status_code=204)
async def publish_checkpoint(run_id: str, kind: str, name: str, service: ServiceDep) -> Response:
    """Publishing twice is no error: the SDK would send a 409 again for minutes."""
    await service.control.library.set_published(run_id, f"{kind}/{name}", True)
    return Response(status_code=204)


@router.post(f"{_CHECKPOINT}/pin", status_code=204)
async def pin_checkpoint(run_id: str, kind: str, name: str, service: ServiceDep) -> Response:
    """No rule removes it: neither how many its run keeps, nor what others need room for."""
    await service.control.library.set_pinned(run_id, f"{kind}/{name}", True)
    return Response(status_code=204)


@router.delete(f"{_CHECKPOINT}/pin", status_code=204)
async def unpin_checkpoint(run_id: str, kind: str, name: str, service: ServiceDep) -> Response:
    await service.control.library.set_pinned(run_id, f"{kind}/{name}", False)
    return Response(status_code=204)


@router.delete(f"{_CHECKPOINT}/publish", status_code=204)
async def unpublish_checkpoint(run_id: str, kind: str, name: str, service: ServiceDep) -> Response:
    await service.control.library.set_published(run_id, f"{kind}/{name}", False)
    return Response(status_code=204)
