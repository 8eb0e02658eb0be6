"""For all tiers: no network, threads that do not fight over two cores, and no test that fails for being slow."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.fixtures.postgres import PostgresServer, binaries
from tests.fixtures.s3 import S3Server
from tests.generated import EXPLORE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile(
    "tinsmith",
    deadline=None,
    print_blob=True,
    derandomize=EXPLORE == 1,
    max_examples=100 * EXPLORE,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tinsmith")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module with `ON_BOTH_DATABASES = True` has its tests of control run over SQLite and over PostgreSQL, but for
    those that name a database themselves."""
    named = any("database" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "database" in metafunc.fixturenames and getattr(metafunc.module, "ON_BOTH_DATABASES", False) and not named:
        metafunc.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One for all tests; each takes databases of its own. Whoever stops it starts it again."""
    folder = binaries()
    if folder is None:
        if "REQUIRE_POSTGRES" in os.environ:
            raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    server = PostgresServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str | None:
    """The URL of a database for the registry, or `None` for the file in the data folder."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return None
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One for all tests; each takes buckets of its own."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "log")
    try:
        server.start()
        yield server
    finally:
        server.stop()
