"""Checkpoints in a bucket: S3, or what speaks like it.

A file of a folder is an object `<prefix>/<key>/<name>` with its SHA-256 beside it. Objects appear whole or not at all,
a folder does not: it counts when it is registered, which happens after all of it is there. Names are never used again,
so that nothing is overwritten and a file once fetched stays right.

Engines read and write files: folders in use are kept on this machine, and after use as long as there is room.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from tinsmith.control.folder_cache import FolderCache
from tinsmith.control.folder_store import CHECKPOINTS, KEY_PARTS, StoredFile, stored_files
from tinsmith.types.crash_points import crash_point
from tinsmith.types.errors import CheckpointDamaged, InvalidInput, NotFound, StorageError, UserError

if TYPE_CHECKING:
    from obstore.store import S3Store

logger = logging.getLogger(__name__)

RECORD = "checkpoint.json"
"""Written last: a folder that has it was written to its end."""
DIGEST = "sha256"
OPTIONS = (
    "endpoint",
    "region",
    "access_key_id",
    "secret_access_key",
    "session_token",
    "virtual_hosted_style_request",
    "checksum_algorithm",
)
"""Of a URL's query; what is not given comes from the environment (`AWS_ACCESS_KEY_ID`, …) or the machine's role."""
_CHUNK_BYTES = 16 * 1024 * 1024
"""Fetched by one request, which has its time limit."""
_CONNECT_TIMEOUT = "5s"
_REQUEST_TIMEOUT = "120s"
_RETRY_TIMEOUT = timedelta(seconds=20)


class ObjectFolders:
    def __init__(self, url: str, cache_folder: Path, *, cache_bytes: int) -> None:
        """`s3://bucket/prefix?option=value`. Raises `InvalidInput`, or `UserError` without the extra."""
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.hostname:
            raise InvalidInput("checkpoints: give a folder or s3://BUCKET/PREFIX")
        self._prefix = parts.path.strip("/")
        self.label = f"'s3://{'/'.join(filter(None, (parts.netloc.rpartition('@')[2], self._prefix)))}'"
        self._store = _store(parts.netloc.rpartition("@")[2], dict(parse_qsl(parts.query)))
        self._cache = FolderCache(cache_folder, max_bytes=cache_bytes)
        self._locks: dict[str, asyncio.Lock] = {}

    # ---- life ----

    async def open(self) -> None:
        """Write, read and delete a small object: a wrong key or bucket shows now."""
        await asyncio.to_thread(self._cache.open)
        path = self._path(f"probe-{uuid.uuid4().hex}")
        content = path.encode()
        with self._errors("be used"):
            await self._put(path, content, hashlib.sha256(content).hexdigest())
            found = await self._get(path)
            await self._delete([path])
        if found != content:
            raise StorageError(f"the checkpoint store {self.label} does not give back what was written to it")

    async def close(self) -> None:
        pass

    # ---- FolderStore ----

    def draft(self, key: str) -> Path:
        return self._cache.path(key)

    async def put(self, key: str) -> None:
        folder = self.draft(key)
        files = await asyncio.to_thread(stored_files, folder)
        if not files:
            raise StorageError(f"nothing was written to {str(folder)!r}")
        with self._cache.held(key), self._errors(f"take {key!r}"):
            for file in sorted(files, key=lambda file: file.name == RECORD):
                digest = await asyncio.to_thread(_sha256, folder / file.name)
                await self._put(self._path(key, file.name), folder / file.name, digest)
                crash_point("store.file")
            stored = await self.files(key)
        if stored != files:
            raise StorageError(f"the checkpoint store {self.label} holds other files of {key!r} than were written")
        self._cache.keep(key)
        await self._cache.make_room()

    @asynccontextmanager
    async def local(self, key: str) -> AsyncIterator[Path]:
        with self._cache.held(key):
            async with self._locks.setdefault(key, asyncio.Lock()):
                if not await asyncio.to_thread(self._cache.path(key).exists):
                    await self._fetch(key)
            self._locks.pop(key, None)
            yield self._cache.path(key)

    async def exists(self, key: str) -> bool:
        return self._cache.path(key).exists() or bool(await self.files(key))

    async def files(self, key: str) -> list[StoredFile]:
        prefix = self._path(key)
        found = [
            StoredFile(name=path.removeprefix(f"{prefix}/"), size=size) async for path, size in self._objects(prefix)
        ]
        return sorted(found, key=lambda file: file.name)

    async def copy(self, source: str, target: str, changed: Mapping[str, bytes]) -> None:
        names = [file.name for file in await self.files(source)]
        try:
            with self._errors(f"copy {source!r}"):
                for name in sorted({*names, *changed}, key=lambda name: name == RECORD):
                    if name in changed:
                        digest = hashlib.sha256(changed[name]).hexdigest()
                        await self._put(self._path(target, name), changed[name], digest)
                    else:
                        await self._copy(self._path(source, name), self._path(target, name))
        except BaseException:
            with contextlib.suppress(StorageError):  # it is left over, and swept
                await self.delete(target)
            raise

    async def delete(self, key: str) -> None:
        await self._cache.remove(key)
        paths = [self._path(key, file.name) for file in await self.files(key)]
        with self._errors(f"delete {key!r}"):
            if paths:
                await self._delete(paths)

    async def keys(self) -> list[str]:
        start = len(self._prefix) + 1 if self._prefix else 0
        found = {
            "/".join(parts[:KEY_PARTS])
            async for path, _ in self._objects(self._path(CHECKPOINTS))
            if len(parts := path[start:].split("/")) > KEY_PARTS
        }
        return sorted(found | set(await asyncio.to_thread(self._cache.keys)))

    async def tidy(self) -> None:
        await asyncio.to_thread(self._cache.tidy)

    # ---- objects ----

    def _path(self, *parts: str) -> str:
        return "/".join(filter(None, (self._prefix, *parts)))

    async def _objects(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        """Path and size."""
        import obstore

        with self._errors("be listed"):
            async for batch in obstore.list(self._store, prefix=prefix):
                for entry in batch:
                    yield entry["path"], entry["size"]

    async def _put(self, path: str, content: bytes | Path, digest: str) -> None:
        import obstore

        attributes = {DIGEST: digest, "Content-Type": "application/octet-stream"}
        await obstore.put_async(self._store, path, content, attributes=attributes)

    async def _get(self, path: str) -> bytes:
        import obstore

        return bytes(await (await obstore.get_async(self._store, path)).bytes_async())

    async def _copy(self, source: str, target: str) -> None:
        import obstore

        await obstore.copy_async(self._store, source, target)

    async def _delete(self, paths: list[str]) -> None:
        import obstore

        await obstore.delete_async(self._store, paths)

    async def _fetch(self, key: str) -> None:
        """Into the cache, whole or not at all. Raises `NotFound`, `CheckpointDamaged`, `StorageError`."""
        files = await self.files(key)
        if not files:
            raise NotFound(f"no folder {key!r} in the checkpoint store {self.label}; it was deleted")
        await self._cache.make_room(sum(file.size for file in files))
        with self._cache.arriving(key) as folder:
            for file in files:
                with self._errors(f"give {file.name!r} of {key!r}"):
                    await self._download(self._path(key, file.name), folder / file.name, file.size)

    async def _download(self, path: str, target: Path, size: int) -> None:
        """Verified by the digest that was stored with it; an object without one was brought by somebody else, and is
        verified by whoever loads it, as all are."""
        import obstore

        target.parent.mkdir(parents=True, exist_ok=True)
        expected, hashed = None, hashlib.sha256()
        with target.open("wb") as file:
            for start in range(0, size, _CHUNK_BYTES):
                span = (start, min(start + _CHUNK_BYTES, size))
                answer = await obstore.get_async(self._store, path, options={"range": span})
                expected = answer.attributes.get(DIGEST)
                await asyncio.to_thread(_take, file, hashed, await answer.bytes_async())
        if expected is not None and hashed.hexdigest() != expected:
            raise CheckpointDamaged(f"{path!r} in the checkpoint store {self.label} does not match its SHA-256")

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Errors of the store and of this machine's disk, as ours."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError) as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise StorageError(f"the checkpoint store {self.label} cannot {what}: {reason}") from error


def _store(bucket: str, options: dict[str, str]) -> S3Store:
    for name in options:
        if name not in OPTIONS:
            raise InvalidInput(f"checkpoints: option {name!r} is not known; known are {', '.join(OPTIONS)}")
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise UserError("checkpoints in S3 need an extra: pip install 'tinsmith[s3]'") from error
    config: dict[str, Any] = {"checksum_algorithm": "SHA256", **options}  # the store checks what arrives
    return S3Store(
        bucket,
        client_options={"allow_http": True, "connect_timeout": _CONNECT_TIMEOUT, "timeout": _REQUEST_TIMEOUT},
        retry_config={"max_retries": 4, "retry_timeout": _RETRY_TIMEOUT},
        **config,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take(file: Any, hashed: Any, chunk: Any) -> None:
    file.write(chunk)
    hashed.update(chunk)
