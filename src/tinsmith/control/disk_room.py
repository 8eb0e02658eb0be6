"""Whether a write failed for want of room, which passes, or because the disk is broken, which does not."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

_ROOM_BYTES = 64 * 1024
_WANT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_room(path: Path) -> bool:
    """Whether files beside `path`, or `path` itself and its log, cannot grow: the disk or a quota is full, or the
    process may not have files so large."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            os.pwrite(probe.fileno(), bytes(_ROOM_BYTES), _largest(path))
    except OSError as error:
        return error.errno in _WANT_OF_ROOM
    return False


def _largest(path: Path) -> int:
    """Bytes of the larger of a database and its log."""
    return max((file.stat().st_size for file in (path, Path(f"{path}-wal")) if file.exists()), default=0)
