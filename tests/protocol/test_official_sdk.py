"""The official Tinker SDK, unmodified, against `tinsmith serve`. The checks are in the folder `official_sdk`."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.conftest import Server

SCRIPT = Path(__file__).with_name("official_sdk")
SOURCE = "".join((SCRIPT / f"{name}.py").read_text() for name in ("training", "sampling", "records", "bad_input"))
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


@pytest.mark.timeout(TIMEOUT_S + 120)
@pytest.mark.parametrize("name", CHECKS)
def test_official_sdk(name: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports.get(name)
    assert report is not None, reports[""]["detail"]
    assert report["ok"], report["detail"]


def test_every_check_of_the_script_is_a_test() -> None:
    assert len(CHECKS) == len(set(CHECKS)) == SOURCE.count("\n@check\n") > 50
