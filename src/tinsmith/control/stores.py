"""Which stores the settings mean."""

from __future__ import annotations

from pathlib import Path

from tinsmith.control.folder_store import FolderStore, LocalFolders
from tinsmith.control.settings import ControlSettings

CACHE_FOLDER = "checkpoint-cache"


def registry_location(settings: ControlSettings) -> Path | str:
    """As `Registry` takes it."""
    if settings.database is not None:
        return settings.database.get_secret_value()
    return settings.data_dir / "registry.sqlite3"


def folder_store(settings: ControlSettings) -> FolderStore:
    """Raises `InvalidInput`, or `UserError` if a package is missing."""
    if settings.checkpoints is None:
        return LocalFolders(settings.data_dir)
    place = settings.checkpoints.get_secret_value()
    if "://" not in place:
        return LocalFolders(Path(place).expanduser())
    from tinsmith.control.object_folders import ObjectFolders

    return ObjectFolders(place, settings.data_dir / CACHE_FOLDER, cache_bytes=settings.checkpoint_cache_bytes)
