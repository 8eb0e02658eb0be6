"""Results that memory has no room for: in files, until they have expired or were fetched.

A cache and no more: after a crash the ledger has what is needed to compute or answer them again, and the files of the
last server are removed. Results are appended to segments; a segment goes when none of its results is wanted any more.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmith.control import ledger_codec
from tinsmith.control.elsewhere import Elsewhere
from tinsmith.types.errors import StorageError

FOLDER = "results"
SEGMENT_BYTES = 64 * 2**20


class _Segment:
    """One file without a name: it is gone with the last who can read it."""

    def __init__(self, folder: Path) -> None:
        """Raises `OSError`."""
        self.descriptor, name = tempfile.mkstemp(dir=folder)
        weakref.finalize(self, os.close, self.descriptor)
        os.unlink(name)
        self.size = 0

    def append(self, data: bytes) -> int:
        """The offset. Raises `OSError`; what was written of it is overwritten by the next."""
        offset = self.size
        written = 0
        while written < len(data):
            written += os.pwrite(self.descriptor, data[written:], offset + written)
        self.size += len(data)
        return offset


@dataclass(frozen=True, slots=True, eq=False)
class StoredResult(Elsewhere):
    """Where a result is."""

    segment: _Segment
    offset: int
    num_bytes: int
    checksum: int

    def load(self) -> Any:
        """Blocks. Raises `StorageError`."""
        try:
            data = os.pread(self.segment.descriptor, self.num_bytes, self.offset)
        except OSError as error:
            raise StorageError(f"a result that was put on disk cannot be read: {error}") from error
        if zlib.crc32(data) != self.checksum:
            raise StorageError("a result that was put on disk is damaged: it does not match its checksum")
        return ledger_codec.decode(data)


class ResultStore:
    """Used from one event loop; one thread writes, others read."""

    def __init__(self, data_dir: Path, *, max_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = data_dir / FOLDER
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._segment: _Segment | None = None
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="result-writer")
        self.num_bytes = 0
        """Of results that are wanted; segments hold others beside them."""
        self.num_results = 0

    def open(self) -> None:
        """Remove what an earlier server left. Raises `StorageError`."""
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot make the folder {str(self._folder)!r} for results: {error}") from error

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._segment = None
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def has_room(self) -> bool:
        return self.num_bytes < self._max_bytes

    def put(self, result: Any) -> Future[StoredResult]:
        """Never blocks. The future raises `StorageError`, or `TypeError` for a result that cannot be written."""
        return self._threads.submit(self._write, result)

    def _write(self, result: Any) -> StoredResult:
        data = ledger_codec.encode(result)
        try:
            if self._segment is None or self._segment.size >= self._segment_bytes:
                self._segment = _Segment(self._folder)
            offset = self._segment.append(data)
        except OSError as error:
            raise StorageError(f"a result cannot be put on disk: {error}") from error
        return StoredResult(self._segment, offset, len(data), zlib.crc32(data))

    def keep(self, stored: StoredResult) -> None:
        """It is wanted until `release`."""
        self.num_bytes += stored.num_bytes
        self.num_results += 1

    def release(self, stored: Elsewhere) -> None:
        assert isinstance(stored, StoredResult)
        self.num_bytes -= stored.num_bytes
        self.num_results -= 1
