"""Adapters on this machine, packed for a server."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def pack_adapter(path: Path) -> bytes:
    """A tar archive of an adapter's folder in PEFT's layout; of an archive, its content as it is.

    Raises `ValueError` if there is no such folder or file, or it holds no adapter.
    """
    if path.is_file():
        return path.read_bytes()
    if not path.is_dir():
        raise ValueError(f"there is no folder or archive {str(path)!r}")
    for name in ADAPTER_FILES:
        if not (path / name).is_file():
            raise ValueError(f"{str(path)!r} holds no adapter in PEFT's layout: it has no {name}")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in ADAPTER_FILES:
            tar.add(path / name, arcname=name)
    return packed.getvalue()
