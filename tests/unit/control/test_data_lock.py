"""One server per data folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinsmith.control.data_lock import DataDirInUse, DataLock


def test_what_is_released_is_free_although_a_forked_child_has_the_file_open_too(tmp_path: Path) -> None:
    lock, next_lock = DataLock(tmp_path), DataLock(tmp_path)
    lock.acquire()
    with pytest.raises(DataDirInUse, match="in use by another server"):
        next_lock.acquire()
    assert lock._descriptor is not None
    of_child = os.dup(lock._descriptor)  # shares the lock as a child's copy does
    lock.release()
    next_lock.acquire()
    next_lock.release()
    os.close(of_child)
