"""A new server opens every older database, and the revisions make the schema that the code has."""

from __future__ import annotations

import itertools
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from tests.fixtures.data_folders import HERE, NAMES, restore
from tests.fixtures.postgres import PostgresServer
from tests.unit.control.conftest import CountedIds
from tests.unit.control.harness import Harness, forward_backward, optim
from tests.unit.control.test_replay import Server, running
from tinsmith.control import migrations, records
from tinsmith.control.database import PostgresDatabase, database_at
from tinsmith.control.ledger import Ledger
from tinsmith.control.records import SessionRow
from tinsmith.control.registry import METADATA, SESSIONS, Registry
from tinsmith.control.requests import CreateModelFromCheckpoint
from tinsmith.types.errors import UserError

pytestmark = pytest.mark.anyio
NEWEST = migrations.newest_version()


@pytest.fixture(autouse=True)
def names_unlike_those_in_the_fixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedIds, "_processes", itertools.count(1000))


def differences(connection: sa.Connection) -> list[Any]:
    def ours(item: object, name: str | None, kind: str, reflected: bool, compared: object) -> bool:
        return not (kind == "table" and name == "alembic_version")

    options = {"compare_type": True, "compare_server_default": True, "include_object": ours}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), METADATA))


def schema(database: Path) -> dict[str, set[str]]:
    """Columns of every table, and its indexes."""
    connection = sqlite3.connect(database)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {}
    for table in tables:
        columns = connection.execute(f"SELECT name, type, \"notnull\", pk FROM pragma_table_info('{table}')")
        indexes = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'index' AND tbl_name = ?", (table,))
        found[table] = {repr(row) for row in columns} | {" ".join(str(sql).split()) for (sql,) in indexes}
    connection.close()
    return found


def test_revisions_are_one_chain_numbered_from_one() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    chain = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert chain == [f"{number:04d}" for number in range(NEWEST, 0, -1)]


def test_the_revisions_make_the_schema_that_the_code_has(tmp_path: Path) -> None:
    new = Registry(tmp_path / "new.sqlite3")
    new.open()
    new.close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'migrated.sqlite3'}")
    with engine.begin() as connection:
        migrations.upgrade(connection)
        assert differences(connection) == []
    engine.dispose()
    assert schema(tmp_path / "migrated.sqlite3") == schema(tmp_path / "new.sqlite3")


def test_the_revisions_make_the_same_in_postgresql(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    engine = PostgresDatabase(url).make_engine(pooled=False)
    with engine.begin() as connection:
        migrations.upgrade(connection)
        assert differences(connection) == []
    registry = Registry(url)
    registry.open()
    registry.close()
    other = PostgresDatabase(postgres.new_database()).make_engine(pooled=False)
    with engine.connect() as migrated, other.begin() as created:
        migrations.create(created, METADATA)
        assert indexes(migrated) == indexes(created)


def indexes(connection: sa.Connection) -> set[str]:
    return set(connection.execute(sa.text("SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'")).scalars())


@pytest.mark.parametrize("version", range(1, NEWEST + 1))
async def test_every_older_version_is_upgraded_with_its_content(
    version: int, tmp_path: Path, postgres: PostgresServer
) -> None:
    for location in (tmp_path / "registry.sqlite3", postgres.new_database()):
        engine = database_at(location).make_engine(pooled=False)
        with engine.begin() as connection:
            migrations.upgrade(connection, version)
            connection.exec_driver_sql(
                "INSERT INTO sessions (session_id, owner, created_at, tags, user_metadata, sdk_version)"
                " VALUES ('s', 'local', 1.5, '[\"t\"]', '{\"k\": \"ä\"}', '0.1')"
            )
        engine.dispose()
        registry = Registry(location)
        registry.open()
        assert await registry.read(differences) == []
        found = await registry.read(lambda c: records.session(c, "s"))
        assert found is not None
        assert (found.created_at, found.tags, found.user_metadata) == (1.5, ["t"], {"k": "ä"})
        registry.close()


async def test_a_database_from_before_there_were_revisions_is_upgraded_and_copied(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite3"
    restore("0.1.0-first", tmp_path / "data")
    (tmp_path / "data" / "registry.sqlite3").rename(path)
    registry = Registry(path)
    secret = registry.open()
    assert await registry.read(lambda c: records.sessions(c, 9, 0)) == (["sess-100"], 1)
    await registry.write(lambda c: records.insert(c, SESSIONS, SessionRow(session_id="s", created_at=1.0)))
    assert await registry.read(differences) == []
    registry.close()
    (copy,) = tmp_path.glob("registry.schema-*")
    with sqlite3.connect(copy) as database:
        assert database.execute("SELECT session_id FROM sessions").fetchall() == [("sess-100",)]
    database.close()
    again = Registry(path)
    assert again.open() == secret
    again.close()


def test_an_upgrade_that_fails_leaves_the_database_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore("0.1.0-first", tmp_path / "data")
    path = tmp_path / "data" / "registry.sqlite3"
    before = schema(path)

    def fail(connection: sa.Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE half (a TEXT)")
        raise UserError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "upgrade", fail)
        with pytest.raises(UserError, match="half way"):
            Registry(path).open()
    assert schema(path) == before
    registry = Registry(path)
    registry.open()
    registry.close()
    assert "usage" in schema(path)


def test_a_newer_registry_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite3"
    registry = Registry(path)
    registry.open()
    registry.close()
    with sqlite3.connect(path) as database:
        database.execute(f"UPDATE meta SET value = '{NEWEST + 1}' WHERE key = 'schema_version'")
        database.execute("DROP TABLE audit")
    database.close()
    before = schema(path)
    expected = f"has schema version {NEWEST + 1}; this version of Tinsmith knows up to {NEWEST}"
    with pytest.raises(UserError, match=expected):
        Registry(path).open()
    assert schema(path) == before


def test_a_newer_ledger_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    Ledger(path).open()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = '2' WHERE key = 'schema_version'")
        database.execute("DROP TABLE entries")
    database.close()
    before = schema(path)
    with pytest.raises(UserError, match=r"the ledger .* has schema version 2; this version of Tinsmith knows up to 1"):
        Ledger(path).open()
    assert schema(path) == before


# ---- P9: whole data folders of older versions ----


def expected_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / name / "expected.json").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
async def test_a_new_server_opens_the_data_of_an_older_one(name: str, tmp_path: Path) -> None:
    restore(name, tmp_path / "data")
    expected = expected_of(name)
    async with running(Server(tmp_path / "data")) as h:
        run = await h.control.library.get_training_run(expected["model_id"])
        assert run.base_model == "tinsmith/fake"
        (checkpoint,) = await h.control.library.list_checkpoints(expected["model_id"])
        assert checkpoint.tinker_path == expected["path"]
        session_id = await h.session()
        order = CreateModelFromCheckpoint(session_id=session_id, model_seq_id=0, path=expected["path"], optimizer=True)
        assert (await h.result(await h.control.create_model_from_checkpoint(order))) is not None


@pytest.mark.parametrize("name", [name for name in NAMES if (HERE / name / "ledger.sql").exists()])
async def test_a_new_server_goes_on_where_an_older_one_was_killed(name: str, tmp_path: Path) -> None:
    restore(name, tmp_path / "data")
    expected = expected_of(name)
    async with running(Server(tmp_path / "data")) as h:
        losses = [await result_of(h, request_id) for request_id in expected["loss_requests"]]
        assert [output.metrics["loss:sum"] for output in losses] == expected["losses"]
        sample = await result_of(h, expected["sample_request"])
        assert list(sample.sequences[0].tokens) == expected["tokens"]
        assert (await result_of(h, expected["unanswered"])).metrics["tokens:sum"] == 3
        model_id = expected["model_id"]
        assert (await h.result(h.submit(optim(model_id, 9))))["step_applied"] == 1.0
        assert (await h.result(h.submit(forward_backward(model_id, 10)))).metrics["loss:sum"] > 0


async def result_of(h: Harness, request_id: str) -> Any:
    outcome = await h.control.wait_future(request_id, 5)
    assert getattr(outcome, "error", "still waits") is None
    return outcome.result
