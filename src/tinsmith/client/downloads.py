"""Checkpoints as files on this machine.

A training checkpoint is exported first: loaded into a new model, saved in PEFT layout for an hour, fetched, deleted.
Files arrive under the name `….part`, with a mark of the checkpoint in it: a download that was cut off goes on where it
stopped, and never with another checkpoint's bytes. All get their names at the end, in place of what had them before.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias

from tinsmith.client.errors import APIConnectionError, APIStatusError, TinkerError
from tinsmith.client.futures import APIFuture
from tinsmith.client.rest import RestClient
from tinsmith.types.checkpoint import InvalidTinkerPath, ParsedCheckpointTinkerPath
from tinsmith.types.replies import ExternalWeightsUrlsResponse

if TYPE_CHECKING:
    from tinsmith.client.http import Http
    from tinsmith.client.service import ServiceClient

logger = logging.getLogger("tinsmith.client")

EXPORT_NAME = "download"
EXPORT_TTL_S = 3600
_SIGN_AGAIN_BEFORE_S = 300.0
_ATTEMPTS = 5
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a download is. Sizes in bytes; `total` is known once the file's answer has begun."""

    file: str
    received: int
    total: int | None


OnProgress: TypeAlias = Callable[[Progress], None]


def download_checkpoint(
    service: ServiceClient, path: str, folder: Path | str, *, on_progress: OnProgress | None = None
) -> APIFuture[list[Path]]:
    """Fetch the files of a training or external checkpoint into `folder`; the paths of all of them.

    `on_progress` is called on the client's thread. Fails with `ValueError` for a sampler's checkpoint (export the
    training checkpoint it came from), and if the server names a file outside `folder`.
    """
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
    if parsed.checkpoint_type == "sampler":
        raise InvalidTinkerPath(
            f"{path!r} is a sampler's checkpoint and cannot be downloaded; use the training checkpoint"
        )
    target = Path(folder)

    async def run() -> list[Path]:
        rest = RestClient(service.holder)
        mark = await _mark_of(rest, path)
        fetch = _Fetch(service.holder.link.http, rest, target, mark, on_progress or (lambda _: None))
        if parsed.checkpoint_type == "external":
            return await fetch.all(path)
        client = await service.create_training_client_from_state(path, user_metadata={"created_by": "download"})
        exported = (await client.save_weights_external(EXPORT_NAME, ttl_seconds=EXPORT_TTL_S)).path
        try:
            return await fetch.all(exported)
        finally:
            await _delete_quietly(rest, exported)

    return service.holder.begin(run)


async def _mark_of(rest: RestClient, path: str) -> str:
    """Another for each version, at servers that know versions."""
    try:
        found = await rest.get_checkpoint_by_tinker_path(path)
        text = f"{found.tinker_path} {found.time.isoformat()}"
    except APIStatusError:
        text = path
    return hashlib.sha256(text.encode()).hexdigest()[:8]


async def _delete_quietly(rest: RestClient, path: str) -> None:
    try:
        await rest.delete_checkpoint_from_tinker_path(path)
    except TinkerError as error:
        logger.warning("the export %s stays until it expires: %s", path, error)


class _Fetch:
    def __init__(self, http: Http, rest: RestClient, folder: Path, mark: str, on_progress: OnProgress) -> None:
        self._http = http
        self._rest = rest
        self._folder = folder
        self._mark = mark
        self._on_progress = on_progress

    async def all(self, path: str) -> list[Path]:
        links = await self._links(path)
        targets = {name: _inside(self._folder, name) for name in links.urls}
        parts = {name: target.with_name(f"{target.name}.{self._mark}.part") for name, target in targets.items()}
        for name, part in parts.items():
            if links.expires.timestamp() - time.time() < _SIGN_AGAIN_BEFORE_S:
                links = await self._links(path)
            await self._file(name, links.urls[name], part)
        for name, target in targets.items():
            parts[name].replace(target)
        return list(targets.values())

    async def _links(self, path: str) -> ExternalWeightsUrlsResponse:
        return await self._rest.get_external_weights_urls(path)

    async def _file(self, name: str, url: str, part: Path) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_ATTEMPTS):
            try:
                await self._rest_of(name, url, part)
                break
            except (APIConnectionError, APIStatusError) as error:
                if attempt + 1 == _ATTEMPTS or not error.retryable:
                    raise
                logger.info("the download of %s goes on after: %s", name, error)
                await asyncio.sleep(min(2.0**attempt, 30.0) * self._http.pace)

    async def _rest_of(self, name: str, url: str, part: Path) -> None:
        """Append what is missing. A server that cannot start in the middle sends everything again."""
        have = _size_of(part)
        async with self._http.stream(url, start=have) as answer:
            resumed = answer.status_code == 206
            have = have if resumed else 0
            length = answer.headers.get("content-length")
            total = None if length is None else have + int(length)
            with part.open("ab" if resumed else "wb") as file:
                async for chunk in answer.aiter_bytes(_CHUNK_BYTES):
                    await asyncio.to_thread(file.write, chunk)
                    have += len(chunk)
                    self._on_progress(Progress(file=name, received=have, total=total))


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _inside(folder: Path, name: str) -> Path:
    """Raises `ValueError` if a server's file name leads out of `folder`."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
        raise ValueError(f"the server names a file outside the folder: {name!r}")
    return folder.joinpath(*parts)
