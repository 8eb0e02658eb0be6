"""Twelve models in room for three, through HTTP and both SDKs: each computes what it computes alone, bit for bit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.conftest import Server, running_server

SCRIPT = Path(__file__).with_name("many_models.py")
TIMEOUT_S = 400


def run(server: Server, python: Path, module: str, manner: str, number: int = 12) -> list[dict[str, Any]]:
    done = subprocess.run(
        [str(python), str(SCRIPT), module, str(number), manner],
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:] + server.log.read_text()[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def digests(ends: list[dict[str, Any]], data: Path) -> list[dict[str, str]]:
    """Of every file of the saved states."""
    found = []
    for end in ends:
        run_id = re.match(r"tinker://(.*)/weights/final", end["path"])
        assert run_id is not None, end["path"]
        (record,) = (data / "checkpoints" / run_id.group(1).replace(":", "~")).glob("weights/final/*/checkpoint.json")
        files = json.loads(record.read_text())["files"]
        found.append({name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")})
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("alone")
    with running_server(folder, "--deterministic") as server:
        ends = run(server, Path(sys.executable), "tinsmith", "alone")
    return ends, digests(ends, folder / "data")


@pytest.mark.parametrize("module", ["tinsmith", "tinker"])
def test_twelve_models_in_room_for_three_compute_what_each_computes_alone(
    alone: tuple[list[dict[str, Any]], list[dict[str, str]]], tmp_path: Path, tinker_python: Path, module: str
) -> None:
    expected, expected_digests = alone
    python = tinker_python if module == "tinker" else Path(sys.executable)
    room = ["--adapter-memory", "3600kB"]  # one of rank 4 takes 1,196,032 bytes
    with running_server(tmp_path, "--deterministic", *room, "--log-level", "info") as server:
        ends = run(server, python, module, "interleaved")
        log = server.log.read_text()
    for mine, theirs in zip(ends, expected, strict=True):
        assert mine["losses"] == theirs["losses"]
        assert mine["drawn"] == theirs["drawn"]
    assert digests(ends, tmp_path / "data") == expected_digests
    assert "Traceback" not in log
    assert log.count("left the device") > 12
    assert log.count("is back on the device") > 12
