"""`tinsmith admin` on a data folder: what it prints, what it refuses, and what a server then knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinsmith.cli.app import app


class Office:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str, code: int = 0, answer: str | None = None) -> str:
        result = CliRunner().invoke(app, ["admin", *words, "--data-dir", str(self.folder)], input=answer)
        assert result.exit_code == code, (result.output, result.exception)
        return result.stdout if code == 0 else result.output

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "data")


def test_a_key_is_printed_once_and_listed_by_its_beginning(office: Office) -> None:
    assert "no users" in office("users", "list")
    office("users", "create", "anna", "--role", "admin", "--email", "anna@example.org")
    secret = office("keys", "create", "anna", "--expires-in", "30d", "--note", "laptop").strip()
    assert secret.startswith("tml-")
    (listed,) = office.json("keys", "list")
    assert secret.startswith(listed["prefix"])
    assert len(listed["prefix"]) < 16
    assert listed["status"] == "active"
    assert listed["note"] == "laptop"
    assert listed["expires_at"] - listed["created_at"] == pytest.approx(30 * 86_400, abs=1)
    assert secret not in office("keys", "list", "--user", "anna")
    made = office.json("keys", "create", "anna", "--scope", "sample")
    assert made["scopes"] == ["sample"]
    assert made["secret"].startswith(made["prefix"])


def test_revoking_asks_first(office: Office) -> None:
    office("users", "create", "anna")
    office("keys", "create", "anna")
    office("keys", "revoke", "1", code=1, answer="n\n")
    assert office.json("keys", "list")[0]["status"] == "active"
    assert "revoked" in office("keys", "revoke", "1", "--yes")
    assert office.json("keys", "list")[0]["status"] == "revoked"
    office("users", "disable", "anna", "--yes")
    assert office.json("users", "list")[0]["status"] == "disabled"
    office("users", "enable", "anna")
    office("users", "role", "anna", "viewer")
    (anna,) = office.json("users", "list")
    assert (anna["status"], anna["role"]) == ("active", "viewer")


def test_projects_and_quotas(office: Office) -> None:
    office("users", "create", "anna")
    office("projects", "create", "evals", "--weight", "3")
    office("projects", "add-member", "evals", "anna")
    office("projects", "weight", "evals", "0.5")
    (evals,) = office.json("projects", "list")
    assert (evals["weight"], evals["member_ids"]) == (0.5, ["anna"])
    office("projects", "remove-member", "evals", "anna")
    office("quotas", "set", "user", "anna", "--tokens-per-minute", "20k", "--disk-bytes", "10G")
    office("quotas", "set", "user", "anna", "--live-models", "4", "--disk-bytes", "none")
    (quota,) = office.json("quotas", "list")
    assert quota == {
        "subject": "user",
        "subject_id": "anna",
        "tokens_per_minute": 20_000,
        "live_models": 4,
        "concurrent_samples": None,
        "disk_bytes": None,
    }
    assert office.json("usage") == []


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["keys", "create", "ben"], 1, "no user 'ben'"),
        (["users", "create", "anna"], 1, "exists"),
        (["users", "create", "Anna"], 1, "must be"),
        (["users", "create", "carl", "--role", "root"], 1, "'root'"),
        (["keys", "create", "anna", "--scope", "write"], 1, "'write'"),
        (["keys", "create", "anna", "--expires-in", "soon"], 2, "'soon'"),
        (["keys", "create", "anna", "--expires-in", "²d"], 2, "'²d'"),
        (["keys", "create", "anna", "--expires-in", "999999999d"], 1, "expires in"),
        (["keys", "revoke", "7", "--yes"], 1, "no key 7"),
        (["keys", "revoke", str(2**70), "--yes"], 2, "less than or equal to 2147483647"),
        (["projects", "create", "x", "--weight", "0"], 1, "weight"),
        (["quotas", "set", "user", "anna"], 2, "at least one"),
        (["quotas", "set", "team", "anna", "--live-models", "1"], 2, "'team'"),
        (["quotas", "set", "user", "anna", "--live-models", "many"], 2, "'many'"),
    ],
)
def test_what_cannot_be_done_ends_with_a_sentence(office: Office, words: list[str], code: int, told: str) -> None:
    office("users", "create", "anna")
    result = CliRunner().invoke(app, ["admin", *words, "--data-dir", str(office.folder)])
    assert result.exit_code == code
    assert told in " ".join(result.output.replace("│", " ").split())


def test_a_note_in_brackets_is_shown_as_it_was_written(office: Office) -> None:
    office("users", "create", "anna")
    office("keys", "create", "anna", "--note", "[ci] deploys [/x]")
    assert "[ci] deploys [/x]" in office("keys", "list")


def test_a_data_folder_is_left_alone_where_the_registry_is_in_postgresql(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINSMITH_DATABASE", "postgresql://tinsmith:hidden@db.example/tinsmith")
    told = office("users", "create", "anna", code=1)
    assert "--base-url" in told
    assert "hidden" not in told
    assert not office.folder.exists()


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:1", "127.0.0.1:8000"])
def test_an_address_where_no_server_is_is_no_bug(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    result = CliRunner().invoke(app, ["admin", "users", "list", "--base-url", base_url])
    assert result.exit_code == 1
    assert "no Tinsmith server answers" in result.output
    assert "internal error" not in result.output
