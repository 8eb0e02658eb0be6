"""Our package has the official one's names, parameters and defaults, but for what `parity.toml` lists with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.official_sdk.surface import surface

HERE = Path(__file__).parent
OFFICIAL = Path(os.environ.get("TINKER_VENV", HERE.parents[1] / ".venv-tinker")) / "bin" / "python"
LISTED: dict[str, str] = tomllib.loads((HERE / "parity.toml").read_text())["differences"]


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """What of theirs is missing or other here, by its dotted name. What ours has beyond theirs is no difference."""
    found: dict[str, str] = {}
    for module, names in theirs.items():
        for name, thing in names.items():
            found |= _of_thing(f"{module}.{name}", thing, ours.get(module, {}).get(name))
    return found


def _of_thing(where: str, theirs: dict[str, Any], ours: dict[str, Any] | None) -> dict[str, str]:
    if ours is None:
        return {where: "missing"}
    if theirs["kind"] == "function" and theirs != ours:
        return {where: f"{ours} instead of {theirs}"}
    if theirs["kind"] != "class" or ours["kind"] != "class":
        return {}
    found = {}
    missing = [base for base in theirs.get("bases", []) if base not in ours.get("bases", [])]
    if missing:
        found[where] = f"does not derive from {', '.join(missing)}"
    for name, default in theirs.get("fields", {}).items():
        if ours.get("fields", {}).get(name) != default:
            found[f"{where}.{name}"] = f"default {ours.get('fields', {}).get(name)} instead of {default}"
    for name, member in theirs["members"].items():
        told = ours["members"].get(name)
        if told is None:
            found[f"{where}.{name}"] = "missing"
        elif isinstance(member, list) and isinstance(told, list) and not _accepts(told, member):
            found[f"{where}.{name}"] = f"{told} instead of {member}"
    return found


def _accepts(ours: list[list[str]], theirs: list[list[str]]) -> bool:
    """The same parameters; ours may have more, by keyword and with a default."""
    more = [one for one in ours if one not in theirs]
    return [one for one in ours if one in theirs] == theirs and all(
        kind == "KEYWORD_ONLY" and default != "required" for _, kind, default in more
    )


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    if not OFFICIAL.exists():
        pytest.skip(f"the official package is not installed at {OFFICIAL}")
    printed = subprocess.run(
        [OFFICIAL, HERE / "official_sdk" / "surface.py", "tinker"],
        capture_output=True,
        text=True,
        check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    return differences(json.loads(printed.stdout), surface("tinsmith"))


def test_every_difference_from_the_official_package_is_listed(found: dict[str, str]) -> None:
    unlisted = {where: what for where, what in found.items() if not any(fnmatchcase(where, line) for line in LISTED)}
    assert unlisted == {}


def test_every_listed_difference_still_exists_and_has_a_reason(found: dict[str, str]) -> None:
    assert [line for line in LISTED if not any(fnmatchcase(where, line) for where in found)] == []
    assert all(len(reason) > 20 for reason in LISTED.values())


def test_the_comparison_notices_each_kind_of_difference() -> None:
    theirs = {
        "kind": "class",
        "fields": {"a": "1.0"},
        "members": {"f": [["x", "POSITIONAL_OR_KEYWORD", "None"]], "g": []},
    }
    ours = {"kind": "class", "fields": {"a": "2.0"}, "members": {"f": [["y", "POSITIONAL_OR_KEYWORD", "None"]]}}
    assert set(_of_thing("t", theirs, ours)) == {"t.a", "t.f", "t.g"}
    more = {**theirs, "members": {**theirs["members"], "f": [*theirs["members"]["f"], ["z", "KEYWORD_ONLY", "3"]]}}
    assert _of_thing("t", theirs, more) == {}
