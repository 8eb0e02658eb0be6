"""What survives a restart: sessions, runs, checkpoints, samplers, in one database.

One thread writes. It commits everything that waits for it in one transaction, so that many writers share one fsync;
a write is durable once its awaitable has returned. Reads run beside it on their own connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import sqlalchemy as sa

from tinsmith.control import migrations
from tinsmith.control.database import DatabaseInUse, database_at
from tinsmith.control.errors import Unsettled
from tinsmith.types.errors import InvalidInput, StorageError, TinsmithError, UserError

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")

_MAX_GROUP = 256
"""Writes committed together at most."""
_RESTART_S = 5.0
"""For how long writes wait for a database that has just gone."""
_RETRY_S = 0.1

# Whoever changes a table adds a revision to `migrations/versions`.
METADATA = sa.MetaData()
BigInteger = sa.Integer().with_variant(sa.BigInteger(), "postgresql")
"""64 bits; SQLite's integers are that wide by any name."""

META = sa.Table("meta", METADATA, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))

SESSIONS = sa.Table(
    "sessions",
    METADATA,
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Column("end_reason", sa.Text),
    sa.Column("end_detail", sa.Text),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("sdk_version", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text),
    sa.Column("display_name", sa.Text),
)

RUNS = sa.Table(
    "runs",
    METADATA,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, nullable=False, index=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("lora", sa.JSON, nullable=False),
    sa.Column("parent", sa.Text),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("last_request_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Column("corrupted", sa.Boolean, nullable=False),
)

CHECKPOINTS = sa.Table(
    "checkpoints",
    METADATA,
    sa.Column("checkpoint_id", sa.Text, primary_key=True),
    sa.Column("run_id", sa.Text, nullable=False, index=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("tokenizer", sa.Text, nullable=False),
    sa.Column("lora", sa.JSON, nullable=False),
    sa.Column("has_optimizer", sa.Boolean, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("size_bytes", BigInteger, nullable=False),
    sa.Column("parent", sa.Text),
    sa.Column("user_metadata", sa.JSON),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("expires_at", sa.Float, index=True),
    sa.Column("superseded_at", sa.Float),
    sa.Column("deleted_at", sa.Float),
    sa.UniqueConstraint("run_id", "kind", "name", "version"),
    sa.Index(
        "one_current_version",
        "run_id",
        "kind",
        "name",
        unique=True,
        sqlite_where=sa.text("superseded_at IS NULL AND deleted_at IS NULL"),
        postgresql_where=sa.text("superseded_at IS NULL AND deleted_at IS NULL"),
    ),
)

SAMPLERS = sa.Table(
    "samplers",
    METADATA,
    sa.Column("sampler_id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, nullable=False, index=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("model_path", sa.Text),
    sa.Column("digest", sa.Text),
    sa.Column("created_at", sa.Float, nullable=False),
)

AUDIT = sa.Table(
    "audit",
    METADATA,
    sa.Column("entry_id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False, index=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
)

USAGE = sa.Table(
    "usage",
    METADATA,
    sa.Column("hour", BigInteger, primary_key=True, autoincrement=False),
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("base_model", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("tokens", BigInteger, nullable=False),
)

COUNTED_REQUESTS = sa.Table(
    "counted_requests",
    METADATA,
    sa.Column("request_id", sa.Text, primary_key=True),
)
"""Requests that are in `usage` and in the ledger: a replay does them again, and they are not counted again."""

USERS = sa.Table(
    "users",
    METADATA,
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("email", sa.Text),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("disabled_at", sa.Float),
)

PROJECTS = sa.Table(
    "projects",
    METADATA,
    sa.Column("project_id", sa.Text, primary_key=True),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

MEMBERSHIPS = sa.Table(
    "memberships",
    METADATA,
    sa.Column("project_id", sa.Text, sa.ForeignKey("projects.project_id"), primary_key=True),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.user_id"), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
)

KEYS = sa.Table(
    "keys",
    METADATA,
    sa.Column("key_id", sa.Integer, primary_key=True),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.user_id"), nullable=False, index=True),
    sa.Column("prefix", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("project_id", sa.Text, sa.ForeignKey("projects.project_id")),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
)

QUOTAS = sa.Table(
    "quotas",
    METADATA,
    sa.Column("subject", sa.Text, primary_key=True),
    sa.Column("subject_id", sa.Text, primary_key=True),
    sa.Column("tokens_per_minute", BigInteger),
    sa.Column("live_models", sa.Integer),
    sa.Column("concurrent_samples", sa.Integer),
    sa.Column("disk_bytes", BigInteger),
)


class Registry:
    """Raises `StorageError` from every call if the database refuses; `fault` then says why until a write succeeds.

    A database that goes is waited for, a few seconds, then tried again by every write and by `probe`; reads meanwhile
    fail at once.
    """

    def __init__(self, location: Path | str) -> None:
        """A path is a SQLite file, a string the URL of a PostgreSQL database."""
        self._database = database_at(location)
        self.fault: str | None = None
        self._gone_at: float | None = None
        """When it was first not reached, by the monotonic clock; `None` while it is."""
        self._is_beside = self._is_shared = False
        self._reading = self._database.make_engine(pooled=True)
        self._writing = self._database.make_engine(pooled=False)
        self._connection: sa.Connection | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_loop, name="registry-writer", daemon=True)
        self._readers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="registry-reader")
        self._closed = False

    # ---- life ----

    def open(self, *, beside: bool = False) -> bytes:
        """Create the schema, or upgrade an older one, and start writing; the secret kept with this database. Blocks.

        A command that works `beside` a server takes the database as it is if a server has it.
        Raises `UserError` if a newer version of this software wrote the database, or another server has it.
        """
        self._is_beside = beside
        try:
            connection = self._connect(wait=True)
            self._prepare(connection)
            with connection.begin():
                secret = _secret(connection)
                if not beside:
                    self._database.mark(connection)
        except sa.exc.SQLAlchemyError as error:
            self._disconnect()
            raise StorageError(f"cannot open the registry {self._database.label}: {_reason(error)}") from error
        except BaseException:
            self._disconnect()
            raise
        self._writer.start()
        return bytes.fromhex(secret)

    def _prepare(self, connection: sa.Connection) -> None:
        newest = migrations.newest_version()
        with connection.begin():
            version = migrations.stored_version(connection)
            if version is None and not self._is_shared:
                migrations.create(connection, METADATA)
        if version is None or version == newest:
            return
        if self._is_shared:
            raise UserError(
                f"the registry {self._database.label} has schema version {version} and is in use by a server; this "
                f"version of Tinsmith has {newest}. Use the server's version"
            )
        if version > newest:
            raise UserError(
                f"the registry {self._database.label} has schema version {version}; this version of Tinsmith "
                f"knows up to {newest}. Upgrade Tinsmith, or give another data directory"
            )
        copy = self._database.back_up(version)
        logger.warning("the registry is brought from schema version %d to %d; %s", version, newest, copy)
        with self._database.upgrading(connection):
            migrations.upgrade(connection)

    def close(self) -> None:
        """Write what waits, then close. Blocks; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        if self._writer.is_alive():
            self._writer.join()
        self._readers.shutdown()
        self._disconnect()
        self._reading.dispose()
        self._writing.dispose()

    def _connect(self, *, wait: bool = False) -> sa.Connection:
        """The connection that writes. Raises `DatabaseInUse`, or what SQLAlchemy raises."""
        if self._connection is None:
            connection = self._writing.connect()
            try:
                self._claim(connection, wait=wait and not self._is_beside)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _claim(self, connection: sa.Connection, *, wait: bool) -> None:
        try:
            self._database.claim(connection, wait=wait)
        except DatabaseInUse:
            if not self._is_beside:
                raise
            self._is_shared = True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sa.exc.SQLAlchemyError):  # it may be broken
                connection.close()

    # ---- writing ----

    async def write(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        """Run `work` in a transaction; when this returns, its effects are on disk.

        Raises `Unsettled` if the connection was lost at the very end: they may be there or not.
        """
        return await asyncio.shield(asyncio.wrap_future(self._enqueue(work)))

    def post(self, work: Callable[[sa.Connection], Any]) -> None:
        """As `write`, for callers that need not wait; a failure is logged. Writes happen in the order asked for."""
        self._enqueue(work).add_done_callback(_log_failure)

    def _enqueue(self, work: Callable[[sa.Connection], ResultT]) -> Future[ResultT]:
        job = _Job(work)
        if self._closed:
            job.done.set_exception(StorageError("the registry is closed"))
        else:
            self._jobs.put(job)
        return job.done

    async def flush(self) -> None:
        """Returns when everything posted before is on disk."""
        await self.write(lambda connection: None)

    def probe(self) -> None:
        """If the last write failed, try a small one, so that `fault` ends when the database is well again."""
        if self.fault is not None:
            touch = sa.update(META).where(META.c.key == "schema_version").values(value=META.c.value)
            self._enqueue(lambda connection: connection.execute(touch))

    def _write_loop(self) -> None:
        running = True
        while running:
            group = [self._jobs.get()]
            while len(group) < _MAX_GROUP and not self._jobs.empty():
                group.append(self._jobs.get())
            running = None not in group
            if jobs := [job for job in group if job is not None]:
                self._commit(jobs)

    def _commit(self, jobs: list[_Job]) -> None:
        try:
            answers = self._transact(jobs)
        except (_DatabaseFailed, DatabaseInUse, sa.exc.SQLAlchemyError) as error:
            failure = self._note_failure(error)
            for job in jobs:
                job.done.set_exception(failure)
            return
        if self.fault is not None:
            logger.warning("the registry can be written again")
        self.fault, self._gone_at = None, None
        for job, result, failed in answers:
            job.done.set_exception(failed) if failed is not None else job.done.set_result(result)

    def _transact(self, jobs: list[_Job]) -> list[_Answer]:
        """Over new connections if the old one turns out to be lost before anything was committed: a database that is
        started again is back in a moment.
        """
        was_connected = self._connection is not None
        num_failed = 0
        while True:
            try:
                return _transact(self._connect(), jobs)
            except (_DatabaseFailed, sa.exc.SQLAlchemyError) as error:
                in_commit = isinstance(error, _DatabaseFailed) and error.in_commit
                if in_commit or not was_connected or not self._database.is_lost(_cause(error)):
                    raise
                if num_failed and self._is_gone_for_long():
                    raise
            self._disconnect()
            time.sleep(_RETRY_S if num_failed else 0)
            num_failed += 1

    def _is_gone_for_long(self) -> bool:
        """Called when the database was not reached."""
        self._gone_at = self._gone_at or time.monotonic()
        return self._closed or time.monotonic() > self._gone_at + _RESTART_S

    def _note_failure(self, error: Exception) -> StorageError:
        cause = _cause(error)
        is_lost = isinstance(cause, DatabaseInUse) or self._database.is_lost(cause)
        reason = f"cannot write the registry {self._database.label}: {_reason(cause)}"
        if self.fault is None:
            logger.error("%s", reason)
        self.fault = reason
        if is_lost:
            self._gone_at = self._gone_at or time.monotonic()
            self._disconnect()
        if is_lost and isinstance(error, _DatabaseFailed) and error.in_commit:
            return Unsettled(f"{reason}; whether the last write was done is not known")
        return StorageError(reason)

    # ---- reading ----

    async def read(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        """Run `work` on what has been committed."""
        if self._closed:
            raise StorageError("the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def read_now(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        """As `read`, in the caller's thread: for single rows by primary key. Waits for no database."""
        return self._read(work, patient=False)

    def _read(self, work: Callable[[sa.Connection], ResultT], *, patient: bool = True) -> ResultT:
        while True:
            if self._gone_at is not None and (self.fault is not None or not patient):
                raise StorageError(self.fault or f"the registry {self._database.label} cannot be reached")
            try:
                with self._reading.connect() as connection:
                    result = work(connection)
            except sa.exc.SQLAlchemyError as error:
                reason = f"cannot read the registry {self._database.label}: {_reason(error)}"
                if not self._database.is_lost(error):
                    raise StorageError(reason) from error
                if self._is_gone_for_long():
                    self.fault = reason
                if not patient or self.fault is not None:
                    raise StorageError(reason) from error
                time.sleep(_RETRY_S)
            else:
                if self.fault is None:
                    self._gone_at = None
                return result


class _Job:
    def __init__(self, work: Callable[[sa.Connection], Any]) -> None:
        self.work = work
        self.done: Future[Any] = Future()


def _log_failure(done: Future[Any]) -> None:
    if (error := done.exception()) is not None:
        logger.error("a record was not written: %s", error)


class _DatabaseFailed(Exception):
    """Not the fault of one job: the disk is full, or the database cannot be read, written or reached."""

    def __init__(self, error: sa.exc.SQLAlchemyError, *, in_commit: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.in_commit = in_commit


def _cause(error: Exception) -> Exception:
    return error.error if isinstance(error, _DatabaseFailed) else error


_Answer: TypeAlias = tuple[_Job, Any, BaseException | None]


def _transact(connection: sa.Connection, jobs: list[_Job]) -> list[_Answer]:
    """All jobs in one transaction. Raises `_DatabaseFailed` or an error of SQLAlchemy; then nothing was done."""
    transaction = connection.begin()
    try:
        answers = [(job, *_attempt(connection, job)) for job in jobs]
    except BaseException:
        with contextlib.suppress(sa.exc.SQLAlchemyError):  # the first error says what is wrong
            transaction.rollback()
        raise
    try:
        transaction.commit()
    except sa.exc.SQLAlchemyError as error:
        with contextlib.suppress(sa.exc.SQLAlchemyError):
            transaction.rollback()
        raise _DatabaseFailed(error, in_commit=True) from error
    return answers


def _attempt(connection: sa.Connection, job: _Job) -> tuple[Any, BaseException | None]:
    """One job in its own savepoint: its error is its own. Raises `_DatabaseFailed` if the transaction is lost."""
    savepoint = connection.begin_nested()
    try:
        result = job.work(connection)
    except sa.exc.OperationalError as error:
        raise _DatabaseFailed(error) from error  # SQLite may have ended the transaction: no savepoint is left
    except sa.exc.SQLAlchemyError as error:
        savepoint.rollback()
        return None, _error_of_a_job(error)
    except Exception as error:  # noqa: BLE001 - the boundary of a job: whatever it raised goes to its caller
        savepoint.rollback()
        return None, error
    savepoint.commit()
    return result, None


_VALUES_REFUSED = (None, "22003", "22021", "22P05")
"""Of PostgreSQL: not sent by its client, a number too large, characters it does not have."""


def _error_of_a_job(error: sa.exc.SQLAlchemyError) -> TinsmithError:
    cause = getattr(error, "orig", None)
    if isinstance(cause, TinsmithError):
        return cause
    if isinstance(error, sa.exc.DataError) and getattr(cause, "sqlstate", "") in _VALUES_REFUSED:
        return InvalidInput(f"the registry cannot hold a value: {_reason(error)}")
    return StorageError(f"cannot write the registry: {error}")


def _reason(error: BaseException) -> str:
    """What the database said, in one line."""
    lines = str(getattr(error, "orig", error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _secret(connection: sa.Connection) -> str:
    found = connection.execute(sa.select(META.c.value).where(META.c.key == "secret")).scalar()
    if found is None:
        found = secrets.token_hex(32)
        connection.execute(sa.insert(META).values(key="secret", value=found))
    return str(found)
