"""The ledger: what was asked and not yet done away with, in one SQLite database that survives a power failure.

One thread writes. It commits everything that waits for it in one transaction and one fsync; whoever asked is told, in
the event loop, once that is on disk. The writes of one `Ledger` are done in the order they were asked for.

A full disk loses nothing that was told to be on disk: the writes of that moment fail, and later ones are tried again.
Any other error of the disk is for good (`fatal`): what a failed fsync left behind is not known.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tinsmith.control import ledger_codec
from tinsmith.control.disk_room import is_out_of_room
from tinsmith.control.errors import NotTaken
from tinsmith.types.crash_points import crash_point
from tinsmith.types.errors import StorageError, TinsmithError, UserError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_MAX_GROUP = 512
_PREALLOCATED_BYTES = 4 * 1024 * 1024
"""Of the write-ahead log: a sync is about twice as fast where the file need not grow."""
_TIDY_BYTES = _PREALLOCATED_BYTES // 2
"""Written since the log was last moved into the database, before it is moved again."""
_PAGE_BYTES = 4096
_PROBE_BYTES = 256 * 1024

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    position INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    session_id TEXT,
    model_id TEXT,
    seq INTEGER,
    payload BLOB NOT NULL,
    failure BLOB,
    UNIQUE (kind, name)
);
CREATE INDEX IF NOT EXISTS entries_by_model ON entries (model_id, seq) WHERE model_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_by_session ON entries (session_id) WHERE session_id IS NOT NULL;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that must be known again after a crash."""

    kind: str
    name: str
    """Unique among its kind. Writing an entry again replaces it."""
    session_id: str | None = None
    model_id: str | None = None
    seq: int | None = None
    value: Any = None
    """What `ledger_codec` can write."""
    failure: TinsmithError | None = None
    """Why the request was given up before its turn, or failed in it without effect: it is not to be done again."""


Change: TypeAlias = Callable[[sqlite3.Connection], int]
"""Does something to the database; about how many bytes it wrote."""
OnWritten: TypeAlias = Callable[[StorageError | None], None]


@dataclass(frozen=True, slots=True)
class _Write:
    changes: Sequence[Change]
    on_written: OnWritten
    posted_at: float


class Ledger:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: str | None = None
        """Why the last write failed; a later one may succeed."""
        self.fatal: str | None = None
        """Why no write will ever succeed again."""
        self.on_fatal: Callable[[], None] = lambda: None
        self.max_pages: int | None = None
        """A bound on the database, as a full disk would be; for tests."""
        self._jobs: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_loop, name="ledger-writer", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = False
        self._oldest_at: float | None = None
        """When the oldest change that is being written was posted, monotonic."""
        self.on_commit: Callable[[int, float], None] = lambda num_writes, seconds: None
        """Told, in the thread that writes, of every transaction: how many writes it had, how long it took."""
        self._untidy_bytes = 0
        self.num_opened = 0
        """How often this file was opened, now included."""

    # ---- life ----

    def open(self) -> None:
        """Create or check the schema. Blocks.

        Raises `StorageError`, or `UserError` if a newer version of this software wrote the file.
        """
        try:
            connection = self._connect()
            version = _stored_version(connection)
            if version > SCHEMA_VERSION:
                connection.close()
                raise UserError(
                    f"the ledger {str(self.path)!r} has schema version {version}; this version of Tinsmith knows up "
                    f"to {SCHEMA_VERSION}. Upgrade Tinsmith, or give another data directory"
                )
            with connection:
                connection.executescript(_SCHEMA)
                insert = "INSERT OR IGNORE INTO meta VALUES ('schema_version', ?)"
                connection.execute(insert, (str(SCHEMA_VERSION),))
            self.num_opened = _count_opening(connection)
            _preallocate(connection)
            connection.close()
        except sqlite3.Error as error:
            raise StorageError(f"cannot open the ledger {str(self.path)!r}: {error}") from error

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to write; callbacks run in `loop`."""
        self._loop = loop
        self._is_open = True
        self._thread.start()

    def close(self) -> None:
        """Write what waits, then close. Blocks; idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        self._jobs.put(None)
        self._thread.join()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=30, check_same_thread=False, isolation_level=None)
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":  # SQLite says nothing of an error of the disk here, and goes on with less
            connection.close()
            raise sqlite3.OperationalError(f"no write-ahead log could be made; the journal mode stays {mode!r}")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    # ---- writing ----

    def post(self, changes: Sequence[Change], on_written: OnWritten) -> None:
        """Do all changes in one transaction; `on_written` is told in the event loop. Never blocks."""
        if not self._is_open:
            on_written(NotTaken("the ledger is closed"))
        elif self.fatal is not None:
            on_written(NotTaken(self.fatal))
        else:
            self._jobs.put(_Write(changes, on_written, time.monotonic()))

    async def write(self, changes: Sequence[Change]) -> None:
        """As `post`; on disk when it returns. Raises `StorageError`."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle(error: StorageError | None) -> None:
            if written.done():
                return
            if error is None:
                written.set_result(None)
            else:
                written.set_exception(error)

        self.post(changes, settle)
        await written

    @property
    def lag_s(self) -> float:
        """How long the oldest change that is not on disk has waited."""
        oldest = self._oldest_at
        return 0.0 if oldest is None else time.monotonic() - oldest

    @property
    def num_bytes(self) -> int:
        """Of the database and its log. Touches the disk."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    async def flush(self) -> None:
        """Returns when everything posted before is on disk, or has failed."""
        await self.write(())

    def probe(self) -> None:
        """If the last write failed, try one, so that `fault` ends when the disk is well again."""
        if self.fault is not None and self.fatal is None:
            self.post([self._take_room], lambda error: None)

    def _take_room(self, connection: sqlite3.Connection) -> int:
        """Raises `sqlite3.OperationalError` if an entry of usual size finds none; a tiny one may still find it."""
        if is_out_of_room(self.path):
            full = sqlite3.OperationalError("database or disk is full")
            full.sqlite_errorname = "SQLITE_FULL"
            raise full
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('room', zeroblob(?))", (_PROBE_BYTES,))
        connection.execute("DELETE FROM meta WHERE key = 'room'")
        return _PROBE_BYTES

    def _write_loop(self) -> None:
        try:
            connection = self._connect()
        except sqlite3.Error as failure:
            self._note_failure(failure)
            connection = sqlite3.connect(":memory:")  # nothing is written there: every write is refused
        connection.execute("PRAGMA wal_autocheckpoint=0")  # which would keep those who wait, and hide its errors
        if self.max_pages is not None:
            connection.execute(f"PRAGMA max_page_count={self.max_pages}")
        running = True
        while running:
            group = [self._jobs.get()]
            while len(group) < _MAX_GROUP and not self._jobs.empty():
                group.append(self._jobs.get())
            running = None not in group
            writes = [job for job in group if job is not None]
            self._oldest_at = writes[0].posted_at if writes else None
            self._commit(connection, writes)
            self._oldest_at = None
            if self._untidy_bytes >= _TIDY_BYTES and self.fatal is None:
                self._tidy(connection)
        connection.close()

    def _commit(self, connection: sqlite3.Connection, writes: list[_Write]) -> None:
        error: StorageError | None = None
        if self.fatal is not None:
            error = NotTaken(self.fatal)
        elif any(write.changes for write in writes):
            try:
                self._transact(connection, writes)
            except sqlite3.Error as failure:
                error = self._note_failure(failure)
            except Exception as failure:
                # the boundary of a write: whatever is wrong with an entry, the thread that writes all others goes on
                logger.exception("an entry could not be written to the ledger")
                error = NotTaken(f"an entry could not be written to the ledger: {failure}")
            else:
                self.fault = None
        if error is not None and len(writes) > 1 and self.fatal is None and self.fault is None:
            for write in writes:  # one of them was at fault: the others shall not fail with it
                self._commit(connection, [write])
            return
        self._tell(writes, error)

    def _tidy(self, connection: sqlite3.Connection) -> None:
        """Move the log into the database; whoever waited has been told before."""
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as failure:
            self._note_failure(failure)
        else:
            self._untidy_bytes = 0

    def _transact(self, connection: sqlite3.Connection, writes: list[_Write]) -> None:
        began = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                for change in write.changes:
                    self._untidy_bytes += change(connection)
            crash_point("ledger.before_commit")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        crash_point("ledger.after_commit")
        self.on_commit(len(writes), time.perf_counter() - began)

    def _note_failure(self, failure: sqlite3.Error) -> StorageError:
        reason = f"cannot write the ledger {str(self.path)!r}: {failure}"
        self.fault = reason
        if not self._is_passing(failure):
            self.fatal = reason
            logger.critical("%s; nothing more is taken", reason)
            self._call(self.on_fatal)
        return NotTaken(reason)

    def _is_passing(self, failure: sqlite3.Error) -> bool:
        """SQLite tells a full disk from a broken one, but not a quota or a limit of the size of files."""
        name = getattr(failure, "sqlite_errorname", "")
        return name == "SQLITE_FULL" or (name == "SQLITE_IOERR_WRITE" and is_out_of_room(self.path))

    def _tell(self, writes: list[_Write], error: StorageError | None) -> None:
        for write in writes:  # each by itself: one that fails in being told must not keep it from the others
            has_failed = bool(write.changes) or self.fatal is not None
            self._call(partial(write.on_written, error if has_failed else None))

    def _call(self, function: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    # ---- reading ----

    def read(self, condition: str = "1", *arguments: object) -> list[Entry]:
        """Of what is on disk, in the order it was written first. Blocks. Raises `StorageError`."""
        columns = "kind, name, session_id, model_id, seq, payload, failure"
        try:
            connection = self._connect()
            try:
                rows = connection.execute(
                    f"SELECT {columns} FROM entries WHERE {condition} ORDER BY position", arguments
                ).fetchall()
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise StorageError(f"cannot read the ledger {str(self.path)!r}: {error}") from error
        return [
            Entry(
                kind=kind,
                name=name,
                session_id=session_id,
                model_id=model_id,
                seq=seq,
                value=ledger_codec.decode(payload),
                failure=None if failure is None else ledger_codec.decode(failure),
            )
            for kind, name, session_id, model_id, seq, payload, failure in rows
        ]


def put(entry: Entry) -> Change:
    """Write an entry, or replace the one of its kind and name."""

    def change(connection: sqlite3.Connection) -> int:
        payload = ledger_codec.encode(entry.value)
        connection.execute(
            "INSERT INTO entries (kind, name, session_id, model_id, seq, payload, failure) VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (kind, name) DO UPDATE SET payload = excluded.payload, failure = excluded.failure,"
            " seq = excluded.seq",
            (
                entry.kind,
                entry.name,
                entry.session_id,
                entry.model_id,
                entry.seq,
                payload,
                None if entry.failure is None else ledger_codec.encode(entry.failure),
            ),
        )
        return len(payload) + _PAGE_BYTES

    return change


def mark_failed(kind: str, name: str, failure: TinsmithError) -> Change:
    encoded = ledger_codec.encode(failure)
    return _execute("UPDATE entries SET failure = ? WHERE kind = ? AND name = ?", encoded, kind, name)


def remove(condition: str, *arguments: object) -> Change:
    return _execute(f"DELETE FROM entries WHERE {condition}", *arguments)


def _execute(statement: str, *arguments: object) -> Change:
    def change(connection: sqlite3.Connection) -> int:
        connection.execute(statement, arguments)
        return _PAGE_BYTES

    return change


def _stored_version(connection: sqlite3.Connection) -> int:
    """0 for a file that holds nothing yet."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        return 0
    row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    return 0 if row is None else int(row[0])


def _count_opening(connection: sqlite3.Connection) -> int:
    (count,) = connection.execute(
        "INSERT INTO meta VALUES ('opened', '1') ON CONFLICT (key) DO UPDATE SET value = value + 1 RETURNING value"
    ).fetchone()
    return int(count)


def _preallocate(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN")
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('room', zeroblob(?))", (_PREALLOCATED_BYTES,))
    connection.execute("COMMIT")
    connection.execute("DELETE FROM meta WHERE key = 'room'")
    connection.execute("PRAGMA wal_checkpoint(RESTART)")
