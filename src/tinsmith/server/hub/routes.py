"""The hub's paths as `huggingface_hub` asks for them; a miss is told by its `X-Error-Code`."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from fastapi import APIRouter, Query
from starlette.responses import FileResponse, Response

from tinsmith.server.errors import json_response
from tinsmith.server.hub.repositories import Repository
from tinsmith.server.service import Service, ServiceDep
from tinsmith.types.errors import NotFound

router = APIRouter(tags=["hub"], responses={"4XX": {"description": "What is missing, named in X-Error-Code"}})
PREFIX = "/hf"

Miss: TypeAlias = Literal["RepoNotFound", "RevisionNotFound", "EntryNotFound"]
MAIN = "main"


@router.head("/{name:path}/resolve/{revision}/{path:path}", response_class=Response)
@router.get("/{name:path}/resolve/{revision}/{path:path}", response_class=Response)
async def resolve(name: str, revision: str, path: str, service: ServiceDep) -> Response:
    """One file, whole or a range of it."""
    found = await _find(name, revision, service)
    if isinstance(found, Response):
        return found
    file = found.files.get(path)
    if file is None:
        return _miss("EntryNotFound", f"{path!r} is not among the tokenizer and config files of {name!r}", found)
    headers = {"etag": f'"{file.oid}"', "x-repo-commit": found.commit}
    return FileResponse(file.location, headers=headers, media_type="application/octet-stream")


@router.get("/api/models/{name:path}/tree/{revision}", response_class=Response)
@router.get("/api/models/{name:path}/tree/{revision}/{folder:path}", response_class=Response)
async def tree(
    name: str, revision: str, service: ServiceDep, folder: str = "", recursive: bool = Query(default=False)
) -> Response:
    """Files and folders directly in `folder`, or all below it."""
    found = await _find(name, revision, service)
    if isinstance(found, Response):
        return found
    entries = _entries(found, folder, recursive=recursive)
    if folder and not entries:
        return _miss("EntryNotFound", f"there is no folder {folder!r} in {name!r}", found)
    return json_response(entries, headers={"x-repo-commit": found.commit})


@router.get("/api/models/{name:path}/revision/{revision}", response_class=Response)
async def model_at_revision(name: str, revision: str, service: ServiceDep) -> Response:
    found = await _find(name, revision, service)
    return found if isinstance(found, Response) else json_response(_model(found))


@router.get("/api/models/{name:path}", response_class=Response)
async def model(name: str, service: ServiceDep) -> Response:
    found = await _find(name, MAIN, service)
    return found if isinstance(found, Response) else json_response(_model(found))


async def _find(name: str, revision: str, service: Service) -> Repository | Response:
    """The repository, or the answer that says what is missing."""
    for card in service.control.base_models():
        if card.name == name:
            break
    else:
        return _miss("RepoNotFound", f"{name!r} is not served here")
    try:
        repository = await service.codecs.offload(lambda: service.repositories.open(card))
    except NotFound as error:
        return _miss("RepoNotFound", error.message)
    if revision not in (MAIN, repository.commit):
        return _miss("RevisionNotFound", f"{name!r} has no revision {revision!r}", repository)
    return repository


def _miss(code: Miss, message: str, repository: Repository | None = None) -> Response:
    headers = {"x-error-code": code, "x-error-message": message.encode("ascii", "replace").decode()}
    if repository is not None:
        headers["x-repo-commit"] = repository.commit
    return json_response({"error": message}, 404, headers)


def _entries(repository: Repository, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder.strip('/')}/" if folder else ""
    inside = {path: file for path, file in repository.files.items() if path.startswith(prefix)}
    folders = {path[: path.rfind("/")] for path in inside if "/" in path[len(prefix) :]}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "oid": repository.commit, "path": path, "size": 0} for path in sorted(folders)
    ]
    return entries + [
        {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        for path, file in inside.items()
        if recursive or "/" not in path[len(prefix) :]
    ]


def _model(repository: Repository) -> dict[str, Any]:
    return {
        "id": repository.name,
        "modelId": repository.name,
        "sha": repository.commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in repository.files],
    }
