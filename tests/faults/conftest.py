from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.faults.killing import Ended, daemon, run_script

ROOT = Path(__file__).parents[2]

at_length = pytest.mark.skipif("FAULTS" not in os.environ, reason="takes long; run by `make faults`")


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
