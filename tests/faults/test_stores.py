"""The same promise over PostgreSQL and a bucket: whatever is killed, the run ends with the bits it would have had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.conftest import at_length
from tests.faults.killing import Daemon, Ended, daemon, run_script
from tests.faults.test_kills import Killer
from tests.fixtures.postgres import PostgresServer
from tests.fixtures.s3 import S3Server


class Stores:
    def __init__(self, postgres: PostgresServer, s3: S3Server) -> None:
        self.postgres = postgres
        self._s3 = s3
        self._bucket = s3.new_bucket()
        self.options = ("--database", postgres.new_database(), "--checkpoints", s3.url(self._bucket))

    def checkpoint_files(self) -> list[str]:
        return self._s3.objects(self._bucket)


@pytest.fixture
def stores(postgres: PostgresServer, s3: S3Server) -> Stores:
    return Stores(postgres, s3)


@pytest.mark.timeout(600)
def test_a_run_over_postgresql_and_a_bucket_survives_bitwise(
    undisturbed: dict[int, Ended], tmp_path: Path, stores: Stores
) -> None:
    with daemon(tmp_path, more=stores.options) as server:
        killer = Killer(server, {"step 2": "server", "save 4": "server"})
        assert run_script(server, sys.executable, "tinsmith", 6, killer) == undisturbed[6]
        assert killer.is_done
        assert server.num_starts == 3
    assert not (tmp_path / "data" / "registry.sqlite3").exists()
    assert any(path.endswith("optimizer.safetensors") for path in stores.checkpoint_files())


@at_length
@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", ["save.begun:1", "store.file:1", "store.file:3", "save.written:1"])
def test_a_crash_while_a_checkpoint_goes_to_the_bucket(
    point: str, undisturbed: dict[int, Ended], tmp_path: Path, stores: Stores
) -> None:
    with daemon(tmp_path, more=stores.options, crash_at=point) as server:
        assert run_script(server, sys.executable, "tinsmith", 6) == undisturbed[6]
        assert (tmp_path / "crashed").exists()


@at_length
@pytest.mark.timeout(600)
def test_a_restart_of_the_database_is_no_more_than_a_pause(
    undisturbed: dict[int, Ended], tmp_path: Path, stores: Stores
) -> None:
    def restart(line: str) -> None:
        if line == "save 4":
            stores.postgres.stop()
            stores.postgres.start()

    with daemon(tmp_path, more=stores.options) as server:
        assert isinstance(server, Daemon)
        assert run_script(server, sys.executable, "tinsmith", 6, restart) == undisturbed[6]
        assert server.num_starts == 1
