"""Adapters from elsewhere, sent as archives."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from anyio import open_file
from fastapi import APIRouter, Header, Query
from starlette.requests import Request

from tinsmith.control.imports import ImportOrder
from tinsmith.server.service import ServiceDep
from tinsmith.types.checkpoint import Checkpoint
from tinsmith.types.errors import StorageError

router = APIRouter(tags=["checkpoints"])

IMPORT_PATH = "/checkpoints/import"
_BODY = {"required": True, "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}


@router.post(IMPORT_PATH, response_model_exclude_none=True, openapi_extra={"requestBody": _BODY})
async def import_adapter(
    request: Request,
    service: ServiceDep,
    name: Annotated[str, Query()],
    base_model: Annotated[str | None, Query()] = None,
    project_id: Annotated[str | None, Query(min_length=1)] = None,
    ttl_seconds: Annotated[int | None, Query()] = None,
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> Checkpoint:
    """Make a checkpoint of an adapter in PEFT's layout: the body is a tar archive of its folder.

    `base_model` says for which model, if not the one that the adapter names. The same request under the same key again
    is the same import.
    """
    library = service.control.library
    async with library.upload_place() as place:
        archive = place / "archive"
        digest = await _receive(request, archive)
        order = ImportOrder(
            name=name, base_model=base_model, project_id=project_id, ttl_seconds=ttl_seconds, fingerprint=digest
        )
        return await library.import_adapter(archive, order, x_idempotency_key)


async def _receive(request: Request, archive: Path) -> bytes:
    """The body on disk; its SHA-256. Raises `StorageError` if the disk refuses."""
    digest = hashlib.sha256()
    try:
        async with await open_file(archive, "wb") as file:
            async for chunk in request.stream():
                digest.update(chunk)
                await file.write(chunk)
    except OSError as error:
        raise StorageError(f"the archive could not be kept: {error}") from error
    return digest.digest()
