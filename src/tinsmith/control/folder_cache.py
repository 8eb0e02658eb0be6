"""Folders of a remote store that are on this machine: those in use, and those last used, up to a size."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinsmith.control.folder_store import CHECKPOINTS, folders_under, remove_empty
from tinsmith.types.errors import StorageError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"


class FolderCache:
    """Keys are paths under `root`. What is held, or not `kept` yet, is never removed to make room: the size may be
    exceeded by it."""

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._kept: dict[str, float] = {}
        """When a folder that the store has too was last used."""

    def open(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot keep checkpoints in use in {str(self._root)!r}: {error}") from error

    def path(self, key: str) -> Path:
        return self._root / key

    @contextmanager
    def held(self, key: str) -> Iterator[None]:
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
            if key in self._kept:
                self.keep(key)

    def keep(self, key: str) -> None:
        """The store has it: it may go when room is needed."""
        self._kept[key] = time.monotonic()

    @contextmanager
    def arriving(self, key: str) -> Iterator[Path]:
        """A folder to fill; it becomes that of the key at the end, or is removed after an error."""
        target = self.path(key)
        folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        try:
            folder.mkdir(parents=True)
            yield folder
            folder.rename(target)
            self.keep(key)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise StorageError(f"cannot keep {key!r} on this machine: {error}") from error
            raise

    async def make_room(self, num_bytes: int = 0) -> None:
        """For so much more: the least recently used folders that nobody holds go."""
        sizes = await asyncio.to_thread(self._sizes)
        total = sum(sizes.values()) + num_bytes
        for key in sorted(self._kept, key=self._kept.__getitem__):
            if total <= self._max_bytes:
                return
            if not self._held[key]:
                total -= sizes.get(key, 0)
                await self.remove(key)

    async def remove(self, key: str) -> None:
        """Idempotent. Under its name it is gone at once: nobody finds half of it."""
        self._kept.pop(key, None)
        folder = self.path(key)
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        try:
            folder.rename(aside)
            await asyncio.to_thread(shutil.rmtree, aside)
        except FileNotFoundError:
            pass  # removed before
        except OSError as error:
            logger.warning("%s cannot be removed: %s", folder, error)

    def keys(self) -> list[str]:
        return [key for key in folders_under(self._root) if not key.endswith(PARTIAL)]

    def tidy(self) -> None:
        """Remove what was arriving when the last server ended, and empty folders; what is left the store has too."""
        for key in folders_under(self._root):
            if key.endswith(PARTIAL):
                shutil.rmtree(self.path(key), ignore_errors=True)
            else:
                self.keep(key)
        remove_empty(self._root / CHECKPOINTS)

    def _sizes(self) -> dict[str, int]:
        return {key: _size(self.path(key)) for key in self.keys()}


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
