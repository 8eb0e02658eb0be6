"""Files to take away: checkpoints and traces, through links that are signed, expire, and need no key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from email.utils import format_datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tinsmith.control.downloads import archive_files, archive_name, stored_file, tar_chunks, tar_size
from tinsmith.control.records import moment
from tinsmith.control.signing import SignedLink
from tinsmith.server.errors import json_response
from tinsmith.server.service import Service, ServiceDep, service_by_link
from tinsmith.types.errors import InvalidInput, TinsmithError
from tinsmith.types.rest_admin import ExternalWeightsUrlsResponse, TraceExportResponse

router = APIRouter(tags=["downloads"])

PREFIX = "/api/v1"
_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
Expires = Annotated[int, Query(ge=0, lt=2**53)]
Signature = Annotated[str, Query()]
KeyOfLink = Annotated[int | None, Query(ge=0, lt=2**53)]


def _signed_url(request: Request, service: Service, path: str) -> tuple[str, int]:
    """An absolute URL under the host by which the caller reached us, and when it expires."""
    link = service.sign(path)
    key = "" if link.key_id is None else f"&key={link.key_id}"
    query = f"expires={link.expires}{key}&signature={link.signature}"
    return f"{request.url.scheme}://{request.url.netloc}{PREFIX}{quote(path, safe='/:@+=')}?{query}", link.expires


def _linked_service(request: Request, expires: Expires, signature: Signature, key: KeyOfLink = None) -> Service:
    """The server as whoever was given the link sees it. Raises `LinkRefused`."""
    resource = request.scope["path"].removeprefix(PREFIX)
    return service_by_link(request, resource, SignedLink(expires=expires, key_id=key, signature=signature))


LinkedDep = Annotated[Service, Depends(_linked_service)]


class HeldFile(FileResponse):
    """A file of a folder that is let go once it was sent."""

    def __init__(self, held: AsyncExitStack, path: Path, media_type: str) -> None:
        super().__init__(path, media_type=media_type)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


class HeldStream(StreamingResponse):
    """The same for what is made from it."""

    def __init__(
        self, held: AsyncExitStack, content: Iterator[bytes], headers: dict[str, str], media_type: str
    ) -> None:
        super().__init__(content, headers=headers, media_type=media_type)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


# ---- checkpoints ----


@router.get(f"{_CHECKPOINT}/external_weights_urls")
async def external_weights_urls(
    run_id: str, kind: str, name: str, request: Request, service: ServiceDep
) -> ExternalWeightsUrlsResponse:
    """One link per file of an external checkpoint."""
    row, files = await service.control.library.checkpoint_files(run_id, f"{kind}/{name}")
    if row.kind != "external_weights":
        raise InvalidInput(f"{row.path!r} is no external checkpoint; make one with save_weights_external")
    links = {file.name: _signed_url(request, service, f"/files/{run_id}/{kind}/{name}/{file.name}") for file in files}
    expires = min(expires for _, expires in links.values())
    return ExternalWeightsUrlsResponse(urls={name: url for name, (url, _) in links.items()}, expires=moment(expires))


@router.get("/files/{run_id}/{kind}/{name}/{file:path}")
async def download_file(run_id: str, kind: str, name: str, file: str, service: LinkedDep) -> Response:
    async with AsyncExitStack() as stack:
        opened = service.control.library.checkpoint_folder(f"tinker://{run_id}/{kind}/{name}", "download")
        path = await run_sync(stored_file, await stack.enter_async_context(opened), file)
        return HeldFile(stack.pop_all(), path, media_type="application/octet-stream")


@router.get(f"{_CHECKPOINT}/archive", status_code=302)
async def archive_url(run_id: str, kind: str, name: str, request: Request, service: ServiceDep) -> Response:
    """For SDKs up to 0.25: they read the link from the redirection and do not follow it."""
    await service.control.library.checkpoint_files(run_id, f"{kind}/{name}")
    url, expires = _signed_url(request, service, f"/archives/{run_id}/{kind}/{name}")
    when = moment(expires)
    headers = {"location": url, "expires": format_datetime(when, usegmt=True)}
    return json_response({"url": url, "expires": when.isoformat()}, 302, headers)


@router.get("/archives/{run_id}/{kind}/{name}")
async def download_archive(run_id: str, kind: str, name: str, service: LinkedDep) -> Response:
    """A tar archive, made while it is sent."""
    async with AsyncExitStack() as stack:
        opened = service.control.library.checkpoint_folder(f"tinker://{run_id}/{kind}/{name}", "archive")
        folder = await stack.enter_async_context(opened)
        files = await run_sync(archive_files, folder)
        headers = {
            "content-length": str(tar_size(files)),
            "content-disposition": f'attachment; filename="{archive_name(run_id, name)}"',
        }
        return HeldStream(stack.pop_all(), tar_chunks(folder, files), headers=headers, media_type="application/x-tar")


# ---- traces ----


@router.get("/sessions/{session_id}/trace_export", response_model_exclude_none=True)
async def export_trace(session_id: str, request: Request, service: ServiceDep) -> TraceExportResponse:
    """A link to a trace of the session's requests, as Perfetto and Chrome open it."""
    try:
        await service.control.library.trace(session_id)
    except TinsmithError as error:
        return TraceExportResponse(status="failed", error=error.message)
    return TraceExportResponse(status="ready", url=_signed_url(request, service, f"/traces/{session_id}")[0])


@router.get("/traces/{session_id}")
async def download_trace(session_id: str, service: LinkedDep) -> Response:
    trace = await service.control.library.trace(session_id)
    headers = {"content-disposition": f'attachment; filename="{session_id}.json"'}
    return await run_sync(json_response, trace, 200, headers)
