"""Whatever is killed while adapters come and go: every model ends with the bits that it has alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import at_length
from tests.faults.killing import ROOT, Daemon, daemon

SCRIPT = ROOT / "tests" / "protocol" / "many_models.py"
NUMBER = 5
ROOM = ("--adapter-memory", "2400kB")
"""For two."""
LONG = ("engine.snapshot:6", "snapshot.written:5", "snapshot.committed:5", "replay.loaded:4", "paging.written:1")
POINTS = ("paging.written:4", *(pytest.param(point, marks=at_length) for point in LONG))


def run(server: Daemon, manner: str) -> list[dict[str, Any]]:
    address = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "tinsmith", str(NUMBER), manner],
        env={**os.environ, **address},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:] + server.log()[-3000:]
    ends: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [{**end, "path": saved_files(server.data_dir, end["path"])} for end in ends]


def saved_files(data: Path, path: str) -> dict[str, str]:
    found = re.match(r"tinker://(.*)/weights/final", path)
    assert found is not None, path
    folder = data / "checkpoints" / found.group(1).replace(":", "~")
    (record,) = folder.glob("weights/final/*/checkpoint.json")
    files = json.loads(record.read_text())["files"]
    return {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with daemon(tmp_path_factory.mktemp("alone")) as server:
        return run(server, "alone")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", POINTS)
def test_a_crash_while_a_model_leaves_or_comes_back_loses_nothing(
    alone: list[dict[str, Any]], tmp_path: Path, point: str
) -> None:
    with daemon(tmp_path, crash_at=point, more=ROOM, snapshot_requests=100) as server:
        assert run(server, "interleaved") == alone
        assert (tmp_path / "crashed").exists()
