"""Where checkpoints are kept: folders of files that never change, each under a key.

A key is a relative path with `/`, of `KEY_PARTS` parts: `checkpoints/<run>/<kind>/<name>/v<version>`. What a store
holds and what is a checkpoint is not the same: a folder counts once its row is in the registry. A folder is whole in
its store before it is registered, and unregistered before it is deleted; one without a row is left over, and swept.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tinsmith.types.errors import NotFound, StorageError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
KEY_PARTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    name: str
    """Relative to its folder, with `/`."""
    size: int


class FolderStore(Protocol):
    """Every method raises `StorageError` if the store refuses or cannot be reached."""

    async def open(self) -> None:
        """Find out that the store can be used. Called once, before everything else."""
        ...

    async def close(self) -> None: ...

    def draft(self, key: str) -> Path:
        """Where on this machine the files of a new folder are to be written, whole or not at all, before `put`."""
        ...

    async def put(self, key: str) -> None:
        """Keep what is at `draft(key)`. When this returns it is whole and survives a power failure; when it raises,
        the folder may be there in parts, and `delete` removes them."""
        ...

    def local(self, key: str) -> AbstractAsyncContextManager[Path]:
        """The folder on this machine, there as long as the context lasts; never write to it. Leaving the context does
        not wait. Raises `NotFound` if there is no such folder."""
        ...

    async def exists(self, key: str) -> bool:
        """Whether anything is under this key, whole or not."""
        ...

    async def files(self, key: str) -> list[StoredFile]:
        """Sorted by name; none if there is no such folder."""
        ...

    async def copy(self, source: str, target: str, changed: Mapping[str, bytes]) -> None:
        """A new folder with the files of `source`, those in `changed` with other content. Otherwise as `put`."""
        ...

    async def delete(self, key: str) -> None:
        """Idempotent."""
        ...

    async def keys(self) -> list[str]:
        """Of all folders, those included that are there in parts."""
        ...

    async def tidy(self) -> None:
        """Remove what deleted folders leave on this machine. Only while nothing is written."""
        ...


class LocalFolders:
    """Keys are paths under `root`. Whoever writes to a draft does so durably, and under another name until it is whole:
    `put` has nothing to add."""

    def __init__(self, root: Path) -> None:
        self.root = root

    async def open(self) -> None:
        try:
            await asyncio.to_thread((self.root / CHECKPOINTS).mkdir, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot keep checkpoints in {str(self.root)!r}: {error}") from error

    async def close(self) -> None:
        pass

    def draft(self, key: str) -> Path:
        return self.root / key

    async def put(self, key: str) -> None:
        if not await self.exists(key):
            raise StorageError(f"nothing was written to {str(self.draft(key))!r}")

    @asynccontextmanager
    async def local(self, key: str) -> AsyncIterator[Path]:
        if not await self.exists(key):
            raise NotFound(f"no folder {key!r} among the checkpoints; it was deleted")
        yield self.root / key

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread((self.root / key).exists)

    async def files(self, key: str) -> list[StoredFile]:
        return await asyncio.to_thread(stored_files, self.root / key)

    async def copy(self, source: str, target: str, changed: Mapping[str, bytes]) -> None:
        try:
            await asyncio.to_thread(_copy_folder, self.root / source, self.root / target, changed)
        except OSError as error:
            raise StorageError(f"checkpoint folder {source!r} could not be copied: {error}") from error

    async def delete(self, key: str) -> None:
        try:
            await asyncio.to_thread(shutil.rmtree, self.root / key)
        except FileNotFoundError:
            pass  # deleted before
        except OSError as error:
            raise StorageError(f"checkpoint folder {key!r} could not be removed: {error}") from error

    async def keys(self) -> list[str]:
        return await asyncio.to_thread(folders_under, self.root)

    async def tidy(self) -> None:
        await asyncio.to_thread(remove_empty, self.root / CHECKPOINTS)


def stored_files(folder: Path) -> list[StoredFile]:
    """Sorted by name. Raises `StorageError`."""
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        return [StoredFile(name=path.relative_to(folder).as_posix(), size=path.stat().st_size) for path in paths]
    except OSError as error:
        raise StorageError(f"checkpoint folder {folder.name!r} cannot be read: {error}") from error


def remove_empty(root: Path) -> None:
    """Folders of names, kinds and runs that hold nothing any more."""
    for depth in range(KEY_PARTS - 2, 0, -1):
        for folder in root.glob("/".join("*" * depth)):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def folders_under(root: Path) -> list[str]:
    """Keys of all folders, those included that are being written."""
    pattern = "/".join([CHECKPOINTS, *"*" * (KEY_PARTS - 1)])
    return [path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_dir()]


def _copy_folder(source: Path, target: Path, changed: Mapping[str, bytes]) -> None:
    """Hard links where the file system has them: files of checkpoints never change. Whole or not at all."""
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        if target.exists():
            raise FileExistsError(f"{target} exists")
        shutil.copytree(source, temporary, copy_function=_link_or_copy, ignore=shutil.ignore_patterns(*changed))
        for name, data in changed.items():
            _write_durably(temporary / name, data)
        temporary.rename(target)
        _sync_folder(target.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
