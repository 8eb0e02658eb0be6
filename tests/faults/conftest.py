from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.faults.killing import Ended, daemon, run_script

ROOT = Path(__file__).parents[2]

at_length = pytest.mark.at_length
"""For tests that take minutes: left out but for `make faults`."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "FAULTS" in os.environ:
        return
    left_out = [item for item in items if item.get_closest_marker("at_length")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def tinker_python() -> str:
    """The interpreter that has the official SDK."""
    python = ROOT / ".venv-tinker" / "bin" / "python"
    if not python.exists():
        pytest.skip("the official SDK's environment is missing; `make test` makes it")
    return str(python)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Ended]:
    """What a run of so many steps leaves if nothing is killed."""
    with daemon(tmp_path_factory.mktemp("undisturbed")) as server:
        return {steps: run_script(server, sys.executable, "tinsmith", steps) for steps in (6, 20)}
