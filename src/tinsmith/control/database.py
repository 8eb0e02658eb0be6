"""The database under the registry: a SQLite file in the data folder, or PostgreSQL by its URL.

Both have the same tables and take the same statements; what differs is here. One server writes to a database: a file is
guarded by the lock of its folder, PostgreSQL by an advisory lock that the writer's connection holds.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tinsmith.types.errors import InvalidInput, StorageError, UserError

SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
_LOCK_KEY = int.from_bytes(b"tinsmith")
_LOCK_WAIT_S = 5.0
"""How long a starting server waits for the connection of one that was just killed to be noticed."""
_CONNECT_TIMEOUT_S = 5
_STATEMENT_TIMEOUT_MS = 60_000


class DatabaseInUse(UserError):
    """Another server writes to it, or did while our connection was lost."""


class Database(Protocol):
    label: str
    """For messages: where it is, without secrets."""

    def make_engine(self, *, pooled: bool) -> sa.Engine: ...

    def claim(self, connection: sa.Connection, *, wait: bool) -> None:
        """Make this the connection that writes. Raises `DatabaseInUse`."""
        ...

    def mark(self, connection: sa.Connection) -> None:
        """Leave a sign in the caller's transaction by which a later `claim` sees that nobody else was here."""
        ...

    def back_up(self, version: int) -> str:
        """Before an upgrade; what was done, for the log. Raises `StorageError`."""
        ...

    def upgrading(self, connection: sa.Connection) -> AbstractContextManager[object]:
        """The transaction of an upgrade. Raises `StorageError` at its end if it left something broken."""
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether the connection that raised this is of no more use."""
        ...


def database_at(location: Path | str) -> Database:
    """A path is a SQLite file, a string a PostgreSQL URL. Raises `InvalidInput`, or `UserError` without the extra."""
    return SqliteFile(location) if isinstance(location, Path) else PostgresDatabase(location)


def insert_into(connection: sa.Connection, table: sa.Table) -> sqlite.Insert:
    """An INSERT that has `on_conflict_do_nothing` and `on_conflict_do_update`, alike in both databases."""
    if connection.dialect.name == "postgresql":
        return cast("sqlite.Insert", postgresql.insert(table))
    return sqlite.insert(table)


class SqliteFile:
    def __init__(self, path: Path) -> None:
        self.label = repr(str(path))
        self._path = path

    def make_engine(self, *, pooled: bool) -> sa.Engine:
        engine = sa.create_engine(
            f"sqlite:///{self._path}",
            connect_args={"check_same_thread": False, "timeout": 30},
            hide_parameters=True,  # what users wrote stays out of errors
        )
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        return engine

    def claim(self, connection: sa.Connection, *, wait: bool) -> None:
        pass  # the folder is locked

    def mark(self, connection: sa.Connection) -> None:
        pass

    def back_up(self, version: int) -> str:
        copy = self._path.with_name(f"{self._path.stem}.schema-{version}{self._path.suffix}")
        temporary = copy.with_name(f".{copy.name}.partial")
        try:
            temporary.unlink(missing_ok=True)
            _copy_database(self._path, temporary)
            temporary.replace(copy)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"cannot copy {self.label} before its upgrade: {error}") from error
        return f"a copy is at {str(copy)!r}"

    @contextmanager
    def upgrading(self, connection: sa.Connection) -> Iterator[None]:
        """Tables are copied and dropped: references are checked at the end instead."""
        pragma = connection.connection.cursor().execute  # outside of a transaction, where it has an effect
        pragma("PRAGMA foreign_keys=OFF")
        with connection.begin():
            yield
            if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall():
                raise StorageError(f"the upgrade of {self.label} leaves references without an end: {broken[:3]}")
        pragma("PRAGMA foreign_keys=ON")

    def is_lost(self, error: BaseException) -> bool:
        return False


class PostgresDatabase:
    """Through psycopg. Times out rather than wait for ever on a connection that is dead."""

    def __init__(self, url: str) -> None:
        self._url = _parse(url)
        self.label = repr(_without_secrets(self._url))
        self._tenure: str | None = None

    def make_engine(self, *, pooled: bool) -> sa.Engine:
        defaults = {
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "application_name": "tinsmith",
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "options": f"-c statement_timeout={_STATEMENT_TIMEOUT_MS}",
        }
        given = self._url.query
        engine = sa.create_engine(
            self._url,
            connect_args={key: value for key, value in defaults.items() if key not in given},
            hide_parameters=True,
            json_serializer=_json_for_postgres,
            **({"pool_pre_ping": True} if pooled else {"poolclass": sa.pool.NullPool}),
        )
        sa.event.listen(engine, "connect", _check_encoding)
        return engine

    def claim(self, connection: sa.Connection, *, wait: bool) -> None:
        give_up_at = time.monotonic() + (_LOCK_WAIT_S if wait else 0.0)
        with connection.begin():
            while not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK_KEY))):
                if time.monotonic() >= give_up_at:
                    raise DatabaseInUse(
                        f"the database {self.label} is in use by another server; stop it, or give another one"
                    )
                time.sleep(0.1)
            # a commit is on disk when it returns, whatever the database's default
            asynchronous = sa.func.current_setting("synchronous_commit") == "off"
            connection.execute(sa.select(sa.func.set_config("synchronous_commit", "on", False)).where(asynchronous))
            if self._tenure is not None and connection.scalar(sa.select(_META.c.value).where(_MINE)) != self._tenure:
                raise DatabaseInUse(
                    f"another server used the database {self.label} while the connection was lost; start this one again"
                )

    def mark(self, connection: sa.Connection) -> None:
        self._tenure = secrets.token_hex(16)
        connection.execute(sa.delete(_META).where(_MINE))
        connection.execute(sa.insert(_META).values(key="server", value=self._tenure))

    def back_up(self, version: int) -> str:
        return "no copy is made of a PostgreSQL database: that is for pg_dump"

    def upgrading(self, connection: sa.Connection) -> AbstractContextManager[object]:
        return connection.begin()

    def is_lost(self, error: BaseException) -> bool:
        return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) or (
            isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
        )


_META = sa.table("meta", sa.column("key"), sa.column("value"))
_MINE = _META.c.key == "server"


def _parse(url: str) -> sa.URL:
    """Raises `InvalidInput` without showing the URL: it may hold a password."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise InvalidInput(f"database: scheme {scheme!r} is not known; give postgresql://USER:PASSWORD@HOST/NAME")
    try:
        parsed = sa.make_url(url).set(drivername="postgresql+psycopg")
    except (sa.exc.ArgumentError, ValueError):
        parsed = None
    if parsed is None or not (parsed.database or "dbname" in parsed.query or "service" in parsed.query):
        raise InvalidInput("database: the URL cannot be read, or names no database; see postgresql://USER@HOST/NAME")
    try:
        import psycopg  # noqa: F401 - SQLAlchemy's own error does not say what to install
    except ImportError as error:
        raise UserError("PostgreSQL needs an extra: pip install 'tinsmith[postgres]'") from error
    return parsed


def _without_secrets(url: sa.URL) -> str:
    """Who, where and what; no password, and nothing of the query but the host."""
    user = f"{url.username}@" if url.username else ""
    host = url.host or url.query.get("host") or ""
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{user}{host}{port}/{url.database or url.query.get('dbname') or ''}"


_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def _json_for_postgres(value: Any) -> str:
    """Raises `InvalidInput` for text that the database would take and later fail to read."""
    text = json.dumps(value)
    if _NUL.search(text):
        raise InvalidInput("a text holds the character NUL (U+0000), which the database cannot keep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"a text holds half of a surrogate pair, which the database cannot keep: {error}") from error
    return text


def _check_encoding(connection: Any, _record: Any) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise UserError(f"the database has the encoding {encoding}; make one with ENCODING 'UTF8'")


def _copy_database(source: Path, target: Path) -> None:
    """On disk when this returns."""
    reading, writing = sqlite3.connect(source), sqlite3.connect(target)
    try:
        reading.backup(writing)
    finally:
        writing.close()
        reading.close()
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says, savepoints included
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
