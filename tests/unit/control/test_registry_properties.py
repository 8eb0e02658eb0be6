"""Whatever is saved, deleted, failed and restarted in whatever order: the registry says what a small model says."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.fixtures.postgres import PostgresServer
from tests.generated import examples
from tinsmith.control import records
from tinsmith.control.records import CheckpointRow
from tinsmith.control.registry import Registry
from tinsmith.types.errors import AlreadyExists, StorageError

NAMES = st.sampled_from(["a", "b", "ä~"])
RUN = "s:train:0"
FOR_EVER = 1e12


@dataclass
class Model:
    """Versions of every name, oldest first: current, superseded or deleted."""

    current: dict[str, int] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)
    superseded: dict[str, list[int]] = field(default_factory=dict)

    def folders(self) -> set[str]:
        kept = {(name, version) for name, version in self.current.items()}
        kept |= {(name, version) for name, versions in self.superseded.items() for version in versions}
        return {folder(name, version) for name, version in kept}


def folder(name: str, version: int) -> str:
    return f"checkpoints/run/weights/{name}/v{version}"


def row(name: str, version: int) -> CheckpointRow:
    return CheckpointRow(
        checkpoint_id=f"{name}-{version}",
        run_id=RUN,
        kind="weights",
        name=name,
        version=version,
        folder=folder(name, version),
        base_model="m",
        tokenizer="t",
        lora={"rank": 4},
        has_optimizer=True,
        step=version,
        metrics={"loss": 0.5},
        digest="d",
        size_bytes=2**40,
        created_at=float(version),
    )


class RegistryMachine(RuleBasedStateMachine):
    new_location: Callable[[], Path | str]

    def __init__(self) -> None:
        super().__init__()
        self.location = type(self).new_location()
        self.registry = Registry(self.location)
        self.registry.open()
        self.model = Model()

    def write(self, work: Callable[[sa.Connection], Any]) -> Any:
        return asyncio.run(self.registry.write(work))

    @rule(name=NAMES, keep=st.integers(0, 2))
    def save(self, name: str, keep: int) -> None:
        version = self.model.newest.get(name, 0) + 1
        saved = row(name, version)

        def work(connection: sa.Connection) -> list[str]:
            records.register_checkpoint(connection, saved, overwrite=True)
            return records.delete_superseded(connection, saved, FOR_EVER, keep=keep)

        doomed = self.write(work)
        older = self.model.superseded.setdefault(name, [])
        if name in self.model.current:
            older.append(self.model.current[name])
        self.model.current[name] = self.model.newest[name] = version
        gone = older[: len(older) - keep]
        assert sorted(doomed) == sorted(folder(name, number) for number in gone)
        del older[: len(gone)]

    @precondition(lambda self: self.model.current)
    @rule(data=st.data())
    def save_a_second_current_version(self, data: st.DataObject) -> None:
        """The schema itself refuses it."""
        name = data.draw(st.sampled_from(sorted(self.model.current)))
        second = row(name, self.model.newest[name] + 1)
        with pytest.raises((StorageError, AlreadyExists)):
            self.write(lambda c: records.register_checkpoint(c, second, overwrite=False))

    @precondition(lambda self: self.model.current)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.current)))
        doomed = self.write(lambda c: records.delete_versions(c, row(name, self.model.current[name]), FOR_EVER))
        versions = [*self.model.superseded.pop(name, []), self.model.current.pop(name)]
        assert sorted(doomed) == sorted(folder(name, version) for version in versions)

    @rule(name=NAMES)
    def fail_after_writing(self, name: str) -> None:
        class Failed(Exception):
            pass

        def work(connection: sa.Connection) -> None:
            records.register_checkpoint(connection, row(name, 1000), overwrite=True)
            raise Failed

        with pytest.raises(Failed):
            self.write(work)

    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.registry = Registry(self.location)
        self.registry.open()

    @invariant()
    def says_what_the_model_says(self) -> None:
        def work(connection: sa.Connection) -> tuple[Any, set[str]]:
            listed = records.checkpoints(connection, 0.0, run_id=RUN, kinds=["weights"])
            return listed, records.checkpoint_folders(connection)

        (rows, total), folders = self.registry.read_now(work)
        assert {found.name: found.version for found in rows} == self.model.current
        assert total == len(rows)
        assert folders == self.model.folders()

    def teardown(self) -> None:
        self.registry.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_registry_says_what_a_small_model_says(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "sqlite":
        machine = type("OnSqlite", (RegistryMachine,), {"new_location": staticmethod(lambda: _new_file(tmp_path))})
        budget = settings(examples(25), stateful_step_count=25)
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        machine = type("OnPostgres", (RegistryMachine,), {"new_location": staticmethod(server.new_database)})
        budget = settings(examples(6), stateful_step_count=25)
    run_state_machine_as_test(machine, settings=budget)


def _new_file(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder)) / "r.sqlite3"
