"""The official Tinker SDK, unmodified, against `tinsmith serve`. The checks are in the folder `official_sdk`."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.conftest import Server

MODULES = ("training", "sampling", "records", "recipes", "traps", "bad_input")
SCRIPT = Path(__file__).with_name("official_sdk")
SOURCE = "".join((SCRIPT / f"{name}.py").read_text() for name in MODULES)
CHECKS = re.findall(r"^@check\ndef (\w+)\(", SOURCE, flags=re.MULTILINE)
TIMEOUT_S = 240


@pytest.fixture(scope="session")
def reports(server: Server, tinker_python: Path) -> dict[str, dict[str, Any]]:
    """What each check reported, by name. One run serves all tests."""
    try:
        run = subprocess.run(
            [str(tinker_python), str(SCRIPT)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=server.environment,
            check=False,
        )
        output, errors = run.stdout, run.stderr
    except subprocess.TimeoutExpired as error:
        output, errors = ((part or b"").decode() for part in (error.stdout, error.stderr))  # type: ignore[union-attr]
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"check"')]
    found = {line["check"]: line for line in lines}
    found[""] = {"detail": f"the run ended early; its last words:\n{errors[-3000:]}"}
    return found


def _test_of(name: str) -> Callable[[dict[str, dict[str, Any]]], None]:
    @pytest.mark.timeout(TIMEOUT_S + 120)
    def test(reports: dict[str, dict[str, Any]]) -> None:
        report = reports.get(name)
        assert report is not None, reports[""]["detail"]
        assert report["ok"], report["detail"]

    return test


globals().update({f"test_{name}": _test_of(name) for name in CHECKS})


def test_every_check_of_the_script_is_a_test() -> None:
    assert len(CHECKS) == len(set(CHECKS)) == SOURCE.count("\n@check\n") > 100


def test_every_recipe_row_and_trap_has_a_test() -> None:
    """Traps and rows that are no matter of this script are tested over HTTP alone, or on a server of their own."""
    elsewhere = Path(__file__).with_name("test_other_settings.py").read_text()
    elsewhere += (Path(__file__).parents[1] / "unit" / "server" / "test_traps.py").read_text()
    names = " ".join(CHECKS) + elsewhere
    for prefix in [f"t{number:02d}_" for number in range(1, 27)] + [f"r{number:02d}_" for number in range(1, 15)]:
        assert prefix in names, prefix
