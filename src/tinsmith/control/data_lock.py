"""One running server per data directory."""

from __future__ import annotations

import os
from pathlib import Path

from tinsmith.types.errors import StorageError, UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; there two servers on one folder are not noticed
    fcntl = None  # type: ignore[assignment]


class DataDirInUse(UserError):
    """Another server runs on the folder."""


class DataLock:
    """Held from `acquire` to `release`, or until the process ends, however it ends."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Make the folder and lock it. Raises `UserError` if another server has it, `StorageError` if it cannot be."""
        try:
            # weights, data and the secret that signs links are for this user alone
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"cannot use data directory {str(self._data_dir)!r}: {error}") from error
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise DataDirInUse(
                f"data directory {str(self._data_dir)!r} is in use by another server; stop it, or give another one"
            ) from error

    def release(self) -> None:
        if self._descriptor is not None:
            if fcntl is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a forked child has the file open too
            os.close(self._descriptor)
            self._descriptor = None
