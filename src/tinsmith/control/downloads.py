"""Files of checkpoints for those who fetch them: which there are, and where; and whole folders as tar archives."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from tinsmith.control.folder_store import StoredFile, stored_files
from tinsmith.types.errors import NotFound, StorageError

_COPY_BYTES = 1 << 20


def stored_file(folder: Path, name: str) -> Path:
    """Raises `NotFound` for anything but the name of a stored file."""
    if name not in {file.name for file in stored_files(folder)}:
        raise NotFound(f"no file {name!r} in this checkpoint")
    return folder / name


COMPLETE = StoredFile(name="checkpoint_complete", size=0)
"""Older clients look for this empty file in an archive."""


def archive_files(folder: Path) -> list[StoredFile]:
    return [*stored_files(folder), COMPLETE]


def archive_name(run_id: str, name: str) -> str:
    return f"{run_id}-{name}.tar".replace(":", "-")


def tar_size(files: list[StoredFile]) -> int:
    """Of `tar_chunks`, in bytes."""
    blocks = sum(len(_header(file)) + _padded(file.size) for file in files) + 2 * tarfile.BLOCKSIZE
    return -(-blocks // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def tar_chunks(folder: Path, files: list[StoredFile]) -> Iterator[bytes]:
    """An uncompressed tar archive, made as it is read: weights do not shrink. Blocks."""
    written = 0
    for file in files:
        for chunk in _entry(folder, file):
            written += len(chunk)
            yield chunk
    yield bytes(tar_size(files) - written)


def _entry(folder: Path, file: StoredFile) -> Iterator[bytes]:
    yield _header(file)
    if file.size == 0:
        return
    with (folder / file.name).open("rb") as source:
        left = file.size
        while left:
            chunk = source.read(min(_COPY_BYTES, left))
            if not chunk:
                raise StorageError(f"file {file.name!r} became shorter while it was read")
            left -= len(chunk)
            yield chunk
    yield bytes(_padded(file.size) - file.size)


def _header(file: StoredFile) -> bytes:
    entry = tarfile.TarInfo(file.name)
    entry.size = file.size
    entry.mode = 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
