"""A disk that remembers every write and every sync, and what is on it if the power goes at any instant."""

from __future__ import annotations

import itertools
import random
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import apsw

from tinsmith.control.ledger import Ledger

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Write:
    file: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    file: str
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    file: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Directories are synced where SQLite deletes."""

    file: str


@dataclass(frozen=True, slots=True)
class Told:
    """Somebody was told that this entry is on disk."""

    name: str


Event: TypeAlias = Write | Truncate | Sync | Delete | Told


class LoggedDisk(apsw.VFS):
    """Does what the usual file system does, and keeps the record."""

    def __init__(self) -> None:
        self.name = f"logged-{next(_numbers)}"
        self.events: list[Event] = []
        self.lock = threading.Lock()
        super().__init__(self.name, base="")

    def note(self, event: Event) -> None:
        with self.lock:
            self.events.append(event)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self.note(Delete(Path(filename).name))

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _LoggedFile(self, name, flags)


class _LoggedFile(apsw.VFSFile):
    def __init__(self, disk: LoggedDisk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._file = Path(path or "temporary").name
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._disk.note(Write(self._file, offset, bytes(data)))

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        self._disk.note(Truncate(self._file, size))

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self._disk.note(Sync(self._file))


class _Connection(apsw.Connection):
    """As much of `sqlite3.Connection` as the ledger uses."""

    def executescript(self, script: str) -> None:
        self.execute(script)


class LoggedLedger(Ledger):
    """The ledger, on a logged disk."""

    def __init__(self, path: Path, disk: LoggedDisk, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> None:
        super().__init__(path)
        self._disk = disk
        self._synchronous = synchronous

    def _connect(self) -> sqlite3.Connection:
        connection = _Connection(str(self.path), vfs=self._disk.name)
        connection.set_busy_timeout(30_000)
        connection.execute("PRAGMA journal_mode=WAL").fetchall()
        connection.execute(f"PRAGMA synchronous={self._synchronous}").fetchall()
        return connection  # type: ignore[return-value]


def after_power_loss(events: Sequence[Event], instant: int, chance: random.Random) -> dict[str, bytes]:
    """Files as they may be: all that was synced before `instant`, and any part of what was written since."""
    files: dict[str, bytearray] = {}
    for file in {event.file for event in events[:instant] if not isinstance(event, Told)}:
        of_file = [event for event in events[:instant] if not isinstance(event, Told) and event.file == file]
        deleted = max((i + 1 for i, event in enumerate(of_file) if isinstance(event, Delete)), default=0)
        of_file = of_file[deleted:]
        if not of_file:
            continue
        synced = max((i + 1 for i, event in enumerate(of_file) if isinstance(event, Sync)), default=0)
        content = files.setdefault(file, bytearray())
        for event in of_file[:synced]:
            _apply(event, content)
        survivors = chance.random()
        for event in of_file[synced:]:
            for part in _parts(event):
                if chance.random() < survivors:
                    _apply(part, content)
    return {file: bytes(content) for file, content in files.items() if not file.endswith("-shm")}


def _parts(event: Event) -> Iterator[Event]:
    """The sectors of a write, which reach the disk one by one in any order."""
    if not isinstance(event, Write):
        yield event
        return
    start = 0
    while start < len(event.data):
        end = min(len(event.data), start + SECTOR - (event.offset + start) % SECTOR)
        yield Write(event.file, event.offset + start, event.data[start:end])
        start = end


def _apply(event: Event, content: bytearray) -> None:
    if isinstance(event, Write):
        content.extend(bytes(max(0, event.offset + len(event.data) - len(content))))
        content[event.offset : event.offset + len(event.data)] = event.data
    elif isinstance(event, Truncate):
        del content[event.size :]
