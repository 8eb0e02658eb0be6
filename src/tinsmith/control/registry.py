"""What survives a restart: sessions, runs, checkpoints, samplers, in one SQLite database.

One thread writes. It commits everything that waits for it in one transaction, so that many writers share one fsync;
a write is durable once its awaitable has returned. Reads run beside it on their own connections.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import secrets
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from tinsmith.control import migrations
from tinsmith.types.errors import StorageError, UserError

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")

_MAX_GROUP = 256
"""Writes committed together at most."""

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
    """Raises `StorageError` from every call if the disk refuses; `fault` then says why until a write succeeds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: str | None = None
        self._engine = sa.create_engine(
            f"sqlite:///{path}",
            connect_args={"check_same_thread": False, "timeout": 30},
            hide_parameters=True,  # what users wrote stays out of errors
        )
        sa.event.listen(self._engine, "connect", _configure_connection)
        sa.event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_loop, name="registry-writer", daemon=True)
        self._readers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="registry-reader")
        self._closed = False

    def open(self) -> bytes:
        """Create the schema, or upgrade an older one, and start writing; the secret kept with this database. Blocks.

        Raises `UserError` if a newer version of this software wrote the database.
        """
        try:
            with self._engine.connect() as connection:
                self._prepare(connection)
                with connection.begin():
                    secret = _secret(connection)
        except (sa.exc.SQLAlchemyError, OSError, sqlite3.Error) as error:
            raise StorageError(f"cannot open the registry {str(self.path)!r}: {error}") from error
        self._writer.start()
        return bytes.fromhex(secret)

    def _prepare(self, connection: sa.Connection) -> None:
        newest = migrations.newest_version()
        with connection.begin():
            version = migrations.stored_version(connection)
            if version is None:
                migrations.create(connection, METADATA)
        if version is None or version == newest:
            return
        if version > newest:
            raise UserError(
                f"the registry {str(self.path)!r} has schema version {version}; this version of Tinsmith "
                f"knows up to {newest}. Upgrade Tinsmith, or give another data directory"
            )
        copy = _back_up(self.path, version)
        logger.warning("the registry is brought from schema version %d to %d; a copy is at %s", version, newest, copy)
        pragma = connection.connection.cursor().execute  # outside of a transaction, where it has an effect
        pragma("PRAGMA foreign_keys=OFF")  # tables are copied and dropped
        with connection.begin():
            migrations.upgrade(connection)
            if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall():
                raise StorageError(f"the upgrade of the registry leaves references without an end: {broken[:3]}")
        pragma("PRAGMA foreign_keys=ON")

    async def write(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        """Run `work` in a transaction; when this returns, its effects are on disk."""
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
        """If the last write failed, try a small one, so that `fault` ends when the disk is well again."""
        if self.fault is not None:
            touch = sa.update(META).where(META.c.key == "schema_version").values(value=META.c.value)
            self.post(lambda connection: connection.execute(touch))

    async def read(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        """Run `work` on what has been committed."""
        if self._closed:
            raise StorageError("the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self.read_now, work)

    def read_now(self, work: Callable[[sa.Connection], ResultT]) -> ResultT:
        """As `read`, in the caller's thread: for single rows by primary key."""
        try:
            with self._engine.connect() as connection:
                return work(connection)
        except sa.exc.SQLAlchemyError as error:
            raise StorageError(f"cannot read the registry: {error}") from error

    def close(self) -> None:
        """Write what waits, then close. Blocks; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        if self._writer.is_alive():
            self._writer.join()
        self._readers.shutdown()
        self._engine.dispose()

    def _write_loop(self) -> None:
        with self._engine.connect() as connection:
            running = True
            while running:
                group = [self._jobs.get()]
                while len(group) < _MAX_GROUP and not self._jobs.empty():
                    group.append(self._jobs.get())
                running = None not in group
                self._commit(connection, [job for job in group if job is not None])

    def _commit(self, connection: sa.Connection, jobs: list[_Job]) -> None:
        answers: list[tuple[_Job, Any, BaseException | None]] = []
        try:
            with connection.begin():
                for job in jobs:
                    answers.append((job, *_attempt(connection, job)))
        except (_DatabaseFailed, sa.exc.SQLAlchemyError) as error:
            self.fault = f"cannot write the registry: {getattr(error, 'orig', error)}"
            for job in jobs:
                job.done.set_exception(StorageError(self.fault))
            return
        if jobs:
            self.fault = None
        for job, result, failure in answers:
            job.done.set_exception(failure) if failure is not None else job.done.set_result(result)


class _Job:
    def __init__(self, work: Callable[[sa.Connection], Any]) -> None:
        self.work = work
        self.done: Future[Any] = Future()


def _log_failure(done: Future[Any]) -> None:
    if (error := done.exception()) is not None:
        logger.error("a record was not written: %s", error)


class _DatabaseFailed(Exception):
    """Not the fault of one job: the disk is full, or cannot be read or written."""


def _attempt(connection: sa.Connection, job: _Job) -> tuple[Any, BaseException | None]:
    """One job in its own savepoint: its error is its own. Raises `_DatabaseFailed` if the transaction is lost."""
    savepoint = connection.begin_nested()
    try:
        result = job.work(connection)
    except sa.exc.OperationalError as error:
        raise _DatabaseFailed(str(error.orig)) from error  # SQLite may have ended the transaction: no savepoint is left
    except sa.exc.SQLAlchemyError as error:
        savepoint.rollback()
        return None, StorageError(f"cannot write the registry: {error}")
    except Exception as error:  # noqa: BLE001 - the boundary of a job: whatever it raised goes to its caller
        savepoint.rollback()
        return None, error
    savepoint.commit()
    return result, None


def _secret(connection: sa.Connection) -> str:
    found = connection.execute(sa.select(META.c.value).where(META.c.key == "secret")).scalar()
    if found is None:
        found = secrets.token_hex(32)
        connection.execute(sa.insert(META).values(key="secret", value=found))
    return str(found)


def _back_up(path: Path, version: int) -> Path:
    """A copy of the database beside it, on disk when this returns. Raises `sqlite3.Error` or `OSError`."""
    copy = path.with_name(f"{path.stem}.schema-{version}{path.suffix}")
    temporary = copy.with_name(f".{copy.name}.partial")
    temporary.unlink(missing_ok=True)
    source, target = sqlite3.connect(path), sqlite3.connect(temporary)
    try:
        source.backup(target)
    finally:
        target.close()
        source.close()
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    return temporary.replace(copy)


def _configure_connection(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says, savepoints included
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
