"""`tinsmith doctor`: what it finds, in words and in an exit status."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.fixtures.postgres import PostgresServer
from tinsmith.cli.app import app
from tinsmith.cli.checks import folder, machine
from tinsmith.cli.checks.finding import Finding, Verdict, run
from tinsmith.cli.checks.model import AGREEMENT, Agreement, judge
from tinsmith.control.data_lock import DataLock
from tinsmith.control.ledger import Ledger
from tinsmith.control.registry import Registry


def doctor(*options: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *options])


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    return finding


def used_folder(path: Path) -> Path:
    """As a server leaves it."""
    lock = DataLock(path)
    lock.acquire()
    lock.release()
    registry = Registry(path / "registry.sqlite3")
    registry.open()
    registry.close()
    Ledger(path / "ledger.sqlite3").open()
    return path


def test_everything_is_looked_at_and_the_model_agrees_with_itself(tmp_path: Path) -> None:
    place = used_folder(tmp_path / "data")
    done = doctor("--data-dir", str(place), "--port", "0", "--dtype", "float32", "--json")
    assert done.exit_code == 0, done.output
    found = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    assert list(found) == [
        "versions", "processor", "memory", "gpu", "clock", "port", "data folder", "lock", "disk space", "disk sync",
        "registry", "ledger", "model", "dtype", "agreement",
    ]  # fmt: skip
    assert found["agreement"]["verdict"] == "ok"
    assert "over 96 tokens (limit 0.001)" in found["agreement"]["found"]
    assert "0 sessions, 0 runs, 0 checkpoints" in found["registry"]["found"]
    assert "float32 on cpu, as asked" in found["dtype"]["found"]


def test_a_damaged_ledger_fails_the_command_and_says_what_to_do(tmp_path: Path) -> None:
    place = used_folder(tmp_path / "data")
    with sqlite3.connect(place / "ledger.sqlite3") as connection:
        connection.execute("INSERT INTO entries (kind, name, payload) VALUES ('sample', 'r-1', x'00')")
    connection.close()
    done = doctor("--data-dir", str(place), "--port", "0", "--skip-model")
    assert done.exit_code == 1
    assert "entry 'r-1' cannot be read" in done.stdout
    assert "→ stop the server and move" in done.stdout
    assert "not fit to serve" in done.stdout
    assert "\n✗ ledger " in done.stdout


def test_a_registry_with_a_torn_page_is_damaged(tmp_path: Path) -> None:
    place = used_folder(tmp_path / "data")
    path = place / "registry.sqlite3"
    content = bytearray(path.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    path.write_bytes(content)
    assert only(folder.registry(place)).verdict is Verdict.FAIL


def test_a_folder_that_no_server_has_used_is_well(tmp_path: Path) -> None:
    place = tmp_path / "not" / "yet"
    for check in (folder.permissions, folder.in_use, folder.registry, folder.ledger):
        assert only(check(place)).verdict is Verdict.OK
    assert [finding.check for finding in folder.disk(place)] == ["disk space", "disk sync"]
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"


def test_a_server_on_the_folder_is_told(tmp_path: Path) -> None:
    lock = DataLock(tmp_path)
    lock.acquire()
    try:
        finding = only(folder.in_use(tmp_path))
    finally:
        lock.release()
    assert (finding.verdict, finding.found) == (Verdict.WARN, "a server runs on this folder")
    assert only(folder.in_use(tmp_path)).found == "free"


def test_a_data_folder_is_made_for_its_user_alone_and_one_for_all_is_told(tmp_path: Path) -> None:
    place = used_folder(tmp_path / "data")
    assert only(folder.permissions(place)).verdict is Verdict.OK
    place.chmod(0o755)
    assert "chmod 750" in str(only(folder.permissions(place)).advice)
    place.chmod(0o777)
    assert "chmod o-w" in str(only(folder.permissions(place)).advice)


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the user who runs tests may be allowed everything
    assert only(folder.permissions(tmp_path / "data")).verdict is Verdict.FAIL


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert only(machine.port("127.0.0.1", port)).verdict is Verdict.WARN


@pytest.mark.parametrize(
    ("median_s", "verdict"), [(5e-3, Verdict.OK), (30e-3, Verdict.WARN), (2e-6, Verdict.WARN), (1e-4, Verdict.OK)]
)
def test_a_slow_disk_and_one_that_does_not_sync_are_told(median_s: float, verdict: Verdict) -> None:
    assert folder._judge_sync(median_s, median_s).verdict is verdict


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.5, Verdict.OK), (2.0, Verdict.WARN), (20.0, Verdict.FAIL), (float("nan"), Verdict.FAIL)],
)
def test_disagreement_beyond_rounding_is_judged_by_dtype(dtype: str, share: float, verdict: Verdict) -> None:
    apart = share * AGREEMENT[dtype]
    finding = judge(Agreement(num_tokens=10, largest=apart, mean=apart / 3), dtype)
    assert finding.verdict is verdict
    assert (finding.advice is None) == (verdict is Verdict.OK)


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise ZeroDivisionError("no")

    finding = only(run("clock", broken))
    assert (finding.check, finding.verdict) == ("clock", Verdict.FAIL)
    assert "ZeroDivisionError: no" in finding.found


def test_a_wrong_option_is_the_command_lines_fault() -> None:
    done = doctor("--dtype", "float8")
    assert done.exit_code == 1
    assert "--dtype 'float8'" in done.output


def test_a_database_that_does_not_answer_fails_without_telling_its_password() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        finding = only(folder.database(f"postgresql://anna:hidden@127.0.0.1:{port}/tinsmith"))
    assert finding.verdict is Verdict.FAIL
    assert str(port) in finding.found
    assert "hidden" not in finding.found


@pytest.mark.parametrize(
    ("version", "verdict", "words"),
    [(None, Verdict.OK, "makes its tables"), (1, Verdict.OK, "brings it to"), (10_000, Verdict.FAIL, "schema 10000")],
)
def test_schemas_of_other_versions_are_told(version: int | None, verdict: Verdict, words: str) -> None:
    finding = folder._judge_schema("whole", version)
    assert (finding.verdict, words in finding.found) == (verdict, True)


def test_a_registry_in_postgres_is_looked_at(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    assert "makes its tables" in only(folder.database(url)).found
    registry = Registry(url)
    registry.open()
    registry.close()
    finding = only(folder.database(url))
    assert finding.verdict is Verdict.OK
    assert "answers in" in finding.found
