"""Adapters that arrive as archives: taken apart without trusting them."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from tinsmith.types.errors import InvalidInput

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Others in an archive, a README or a tokenizer, are left where they are."""
_REFUSED = ("adapter_model.bin", "adapter_model.pt")
_COPY_BYTES = 1 << 20


def unpack_adapter(archive: Path, target: Path, *, max_bytes: int) -> None:
    """The files of an adapter from a tar archive, compressed or not, in which they lie in one folder.

    Raises `InvalidInput` for what is no archive, holds no adapter or more than one, or more than `max_bytes`.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            members = _members(tar)
            folder = _folder(members)
            for name in ADAPTER_FILES:
                _extract(tar, members, folder / name, target / name, max_bytes=max_bytes)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InvalidInput(f"the archive cannot be read: {error}; send a tar archive, plain or compressed") from error


def _members(tar: tarfile.TarFile) -> dict[PurePosixPath, tarfile.TarInfo]:
    return {PurePosixPath(*PurePosixPath(member.name).parts): member for member in tar if member.isreg()}


def _folder(members: dict[PurePosixPath, tarfile.TarInfo]) -> PurePosixPath:
    folders = [path.parent for path in members if path.name == ADAPTER_FILES[0]]
    if len(folders) != 1:
        there = f"{len(folders)} of them" if folders else "none"
        raise InvalidInput(f"the archive must hold one {ADAPTER_FILES[0]}; it has {there}")
    for name in _REFUSED:
        if folders[0] / name in members and folders[0] / ADAPTER_FILES[1] not in members:
            raise InvalidInput(
                f"{name} is a pickle, which can run code as it is read; save the adapter as {ADAPTER_FILES[1]}"
            )
    return folders[0]


def _extract(
    tar: tarfile.TarFile,
    members: dict[PurePosixPath, tarfile.TarInfo],
    path: PurePosixPath,
    target: Path,
    *,
    max_bytes: int,
) -> None:
    member = members.get(path)
    source = None if member is None else tar.extractfile(member)
    if member is None or source is None:
        raise InvalidInput(f"the archive has no {path}")
    if member.size > max_bytes:
        raise InvalidInput(f"{path} in the archive has {member.size} bytes; this server takes at most {max_bytes}")
    with source, target.open("wb") as file:
        while chunk := source.read(_COPY_BYTES):
            file.write(chunk)
