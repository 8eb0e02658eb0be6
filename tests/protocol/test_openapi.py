"""The OpenAPI document tells the truth about every dialect. `make fuzz` sends more requests than these."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from scripts.fuzz_api import fuzz, logged_errors, make_key, num_cases
from tests.protocol.conftest import running_server


@pytest.mark.timeout(600)
def test_no_fault_and_no_undocumented_answer_in_two_thousand_generated_requests(tmp_path: Path) -> None:
    """Every operation, with values at the edges of its schema and beyond, wrong methods and wrong media types."""
    key = make_key(tmp_path / "data")
    with running_server(tmp_path, "--dtype", "float32") as server:
        done = fuzz(server.url, "--phases", "examples,coverage", "--seed", "1", folder=tmp_path, key=key)
        assert done.returncode == 0, done.stdout[-8000:]
        assert num_cases(done.stdout) > 2000
        assert logged_errors(server.log.read_text()) == []
        assert httpx2.get(f"{server.url}/readyz").json() == {"status": "ready"}


@pytest.mark.timeout(600)
def test_no_fault_in_random_requests_and_in_sequences_of_them(tmp_path: Path) -> None:
    key = make_key(tmp_path / "data")
    with running_server(tmp_path, "--dtype", "float32") as server:
        bounds = ("--max-examples", "2", "--max-time", "20", "--seed", "1")
        done = fuzz(server.url, "--phases", "fuzzing,stateful", *bounds, folder=tmp_path, key=key)
        assert done.returncode == 0, done.stdout[-8000:]
        assert logged_errors(server.log.read_text()) == []
