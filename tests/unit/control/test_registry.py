"""The registry over a SQLite file and over PostgreSQL: durable, grouped, alone at fault, and back after an outage."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from tests.fixtures.postgres import PASSWORD, PostgresServer
from tests.unit.control.harness import Harness
from tinsmith.control import records
from tinsmith.control.database import DatabaseInUse, database_at
from tinsmith.control.errors import Unsettled
from tinsmith.control.registry import SESSIONS, USAGE, Registry
from tinsmith.control.usage import Meter
from tinsmith.types.errors import AlreadyExists, InvalidInput, StorageError, UserError

pytestmark = pytest.mark.anyio
ON_BOTH_DATABASES = True


@pytest.fixture
def location(tmp_path: Path, database: str | None) -> Path | str:
    return database or tmp_path / "r.sqlite3"


@pytest.fixture
def registry(location: Path | str) -> Iterator[Registry]:
    made = Registry(location)
    made.open()
    yield made
    made.close()


def insert(session_id: str) -> Callable[[sa.Connection], None]:
    session = records.SessionRow(session_id=session_id, created_at=1.0)
    return lambda connection: records.insert(connection, SESSIONS, session)


def session_ids(location: Path | str) -> list[str]:
    """As another program finds them."""
    if isinstance(location, Path):
        with sqlite3.connect(location) as file:
            found = file.execute("SELECT session_id FROM sessions ORDER BY 1").fetchall()
        file.close()
    else:
        with psycopg.connect(location) as connection:
            found = connection.execute("SELECT session_id FROM sessions ORDER BY 1").fetchall()
    return [session_id for (session_id,) in found]


async def test_writes_are_durable_grouped_and_fail_alone(registry: Registry, location: Path | str) -> None:
    def clash(connection: sa.Connection) -> None:
        insert("clash")(connection)
        raise AlreadyExists("rolled back")

    results = await asyncio.gather(
        *(registry.write(insert(f"s{n}")) for n in range(50)),
        registry.write(clash),
        registry.write(insert("s7")),
        registry.write(lambda connection: records.sessions(connection, 1, 0)[1]),
        return_exceptions=True,
    )
    assert isinstance(results[50], AlreadyExists)
    assert isinstance(results[51], StorageError)
    assert results[52] == 50
    assert len(session_ids(location)) == 50
    assert registry.fault is None
    registry.close()
    with pytest.raises(StorageError, match="closed"):
        await registry.write(clash)


async def test_the_secret_is_made_once(location: Path | str) -> None:
    secrets = []
    for _ in range(2):
        registry = Registry(location)
        secrets.append(registry.open())
        registry.close()
    assert secrets[0] == secrets[1]
    assert len(secrets[0]) == 32


async def test_what_is_counted_twice_adds_up(registry: Registry) -> None:
    class Clock:
        def time(self) -> float:
            return 7200.0

        def monotonic(self) -> float:
            return 7200.0

    meter = Meter(registry, Clock())
    for _ in range(2):
        meter.count("training", "s", "m", 3_000_000_000)
        await meter.flush()
    rows = await registry.read(lambda c: c.execute(sa.select(USAGE.c.tokens)).scalars().all())
    assert rows == [6_000_000_000]


async def test_a_sqlite_file_syncs_every_commit(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r.sqlite3")
    registry.open()
    pragmas = await registry.write(
        lambda c: [c.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    )
    assert pragmas == ["wal", 2]
    registry.close()


# ---- PostgreSQL alone ----


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.fixture
def remote(url: str) -> Iterator[Registry]:
    made = Registry(url)
    made.open()
    yield made
    made.close()


async def eventually(is_so: Callable[[], bool]) -> None:
    for _ in range(1200):
        if is_so():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not happen within a minute")


async def test_one_server_per_database(remote: Registry, url: str) -> None:
    second = Registry(url)
    with pytest.raises(DatabaseInUse, match="is in use by another server") as refused:
        await asyncio.to_thread(second.open)
    assert PASSWORD not in str(refused.value)
    second.close()
    remote.close()
    third = Registry(url)
    await asyncio.to_thread(third.open)
    third.close()


async def test_a_command_beside_a_server_writes_what_the_server_sees(registry: Registry, location: Path | str) -> None:
    command = Registry(location)
    await asyncio.to_thread(command.open, beside=True)
    await command.write(insert("of-the-command"))
    await registry.write(insert("of-the-server"))
    assert await registry.read(lambda c: records.sessions(c, 9, 0)[1]) == 2
    command.close()
    assert registry.fault is None


async def test_a_commit_is_on_disk_whatever_the_database_says(postgres: PostgresServer, url: str) -> None:
    name = url.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    registry = Registry(url)
    registry.open()
    setting = await registry.write(lambda c: c.scalar(sa.text("SHOW synchronous_commit")))
    assert setting == "on"
    registry.close()


async def test_an_outage_is_an_error_and_passes(
    remote: Registry, postgres: PostgresServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await remote.write(insert("before"))
    postgres.stop()
    try:
        with pytest.raises(StorageError, match="cannot write the registry 'postgresql://tinsmith@"):
            await remote.write(insert("lost"))
        with pytest.raises(StorageError, match="registry"):
            await remote.read(lambda c: records.sessions(c, 9, 0))
        assert remote.fault is not None
        remote.probe()
        with pytest.raises(StorageError):
            await remote.flush()
    finally:
        postgres.start()
    remote.probe()
    await eventually(lambda: remote.fault is None)
    await remote.write(insert("after"))
    assert await remote.read(lambda c: sorted(records.sessions(c, 9, 0)[0])) == ["after", "before"]
    assert session_ids(url) == ["after", "before"]
    assert PASSWORD not in caplog.text


async def test_a_restart_of_the_database_between_two_writes_is_not_noticed(
    remote: Registry, postgres: PostgresServer, url: str
) -> None:
    await remote.write(insert("before"))
    postgres.stop()
    postgres.start()
    await remote.write(insert("after"))
    assert session_ids(url) == ["after", "before"]
    assert remote.fault is None


async def test_a_write_waits_for_a_database_that_is_being_started_again(
    remote: Registry, postgres: PostgresServer, url: str
) -> None:
    await remote.write(insert("before"))
    postgres.stop()
    writes = [asyncio.create_task(remote.write(insert(name))) for name in ("meanwhile", "too")]
    await asyncio.sleep(0.3)
    found = asyncio.create_task(remote.read(lambda c: sorted(records.sessions(c, 9, 0)[0])))
    await asyncio.sleep(0.3)
    assert not found.done()
    assert not any(write.done() for write in writes)
    await asyncio.to_thread(postgres.start)
    await asyncio.gather(*writes)
    assert "before" in await found
    assert session_ids(url) == ["before", "meanwhile", "too"]
    assert remote.fault is None


async def test_reads_that_find_the_database_gone_turn_readiness_off(remote: Registry, postgres: PostgresServer) -> None:
    assert await remote.read(lambda c: records.sessions(c, 9, 0)) == ([], 0)
    postgres.stop()
    try:
        with pytest.raises(StorageError, match="cannot read the registry"):
            await remote.read(lambda c: records.sessions(c, 9, 0))
        assert remote.fault is not None
    finally:
        postgres.start()
    remote.probe()
    await eventually(lambda: remote.fault is None)


async def test_a_server_that_was_displaced_writes_nothing_more(
    remote: Registry, postgres: PostgresServer, url: str
) -> None:
    cut_all(postgres, url)
    other = Registry(url)
    await asyncio.to_thread(other.open)
    with pytest.raises(StorageError, match="in use by another server"):
        await remote.write(insert("displaced"))
    assert remote.fault is not None
    other.close()
    with pytest.raises(StorageError, match="another server used the database"):
        await remote.write(insert("displaced"))
    assert session_ids(url) == []


def cut_all(postgres: PostgresServer, url: str) -> None:
    name = url.rpartition("/")[2]
    postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


async def test_a_connection_lost_in_the_commit_leaves_the_outcome_open(remote: Registry) -> None:
    """The database ends the connection in the middle of COMMIT, by a trigger that runs there."""

    def arm(connection: sa.Connection) -> None:
        connection.exec_driver_sql(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
        )
        connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON sessions DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION die()"
        )

    await remote.write(arm)
    with pytest.raises(Unsettled, match="is not known"):
        await remote.write(insert("open"))
    await remote.flush()
    assert remote.fault is None


async def test_text_that_postgresql_cannot_keep_is_refused_by_name(remote: Registry) -> None:
    for metadata in ({"k": "a\x00b"}, {"\x00": 1}, {"k": ["\ud800"]}):
        row = records.SessionRow(session_id="s", created_at=1.0, user_metadata=metadata)
        with pytest.raises(InvalidInput, match="cannot keep"):
            await remote.write(lambda c, row=row: records.insert(c, SESSIONS, row))
    with pytest.raises(InvalidInput, match="NUL"):
        await remote.write(insert("a\x00b"))
    fine = {"k": "back\\u0000slash", "ä": "\U0001f600"}
    row = records.SessionRow(session_id="fine", created_at=1.0, user_metadata=fine)
    await remote.write(lambda c: records.insert(c, SESSIONS, row))
    found = await remote.read(lambda c: records.session(c, "fine"))
    assert found is not None
    assert found.user_metadata == fine


async def test_errors_of_a_url_do_not_show_its_password(postgres: PostgresServer) -> None:
    for url, kind, words in (
        (postgres.url("none"), StorageError, 'database "none" does not exist'),
        (postgres.url(password="wrong-" + PASSWORD), StorageError, "password authentication failed"),
        (f"postgresql://u:{PASSWORD}@127.0.0.1:1/x", StorageError, "refused"),
        (f"mysql://u:{PASSWORD}@h/x", InvalidInput, "scheme 'mysql' is not known"),
        (f"postgresql://u:{PASSWORD}@127.0.0.1", InvalidInput, "names no database"),
        (f"postgresql://u:{PASSWORD}@h:port/x", InvalidInput, "cannot be read"),
    ):
        with pytest.raises(kind, match=words) as refused:
            await asyncio.to_thread(lambda url=url: Registry(url).open())
        assert PASSWORD not in str(refused.value)
    assert database_at(f"postgres://u@/x?host=/run&password={PASSWORD}").label == "'postgresql://u@/run/x'"


async def test_a_database_that_is_not_utf8_is_refused(postgres: PostgresServer) -> None:
    postgres.execute("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with pytest.raises(UserError, match="ENCODING 'UTF8'"):
        await asyncio.to_thread(Registry(postgres.url("latin")).open)


async def test_readiness_follows_the_database(open_control: Callable[..., object], postgres: PostgresServer) -> None:
    async with open_control(database=postgres.new_database()) as h:  # type: ignore[attr-defined]
        assert isinstance(h, Harness)
        model_id = await h.model()
        postgres.stop()
        try:
            with pytest.raises(StorageError):
                await h.control.library.list_checkpoints(model_id)
            assert not h.control.is_ready
            assert "registry" in str(h.control.readiness_reason)
            with pytest.raises(StorageError):
                await h.session()
        finally:
            postgres.start()
        await h.control.sweep()
        await eventually(lambda: h.control.is_ready)
        assert await h.model()
