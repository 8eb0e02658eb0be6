"""Our client and the official SDK run one script against a recording server, which must not be able to tell them apart.

Compared per scenario and path: method, query, body field by field, and the headers of the protocol. Bodies of protobuf
are compared as messages, since their maps have no order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.sequences.recorder import Seen, recording
from tests.protocol.test_parity import OFFICIAL

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "protocol" / "sequences" / "script.py"
FLAGS: Mapping[str, Mapping[str, Any]] = {
    "parallel": {"fwdbwd_max_chunk_len": 2},
    "one after another": {"fwdbwd_max_chunk_len": 2, "parallel_fwdbwd_chunks": False},
}
DIFFERENT = {
    "a rest client": "the official one asks for its settings anew; ours has those of the service client",
}
CLONE_BLOCK = 1_000_000


@cache
def recorded(package: str, flags: str) -> dict[str, list[Seen]]:
    """What the server saw of `package`, by scenario."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    python = sys.executable
    if package == "tinker":
        environment.pop("PYTHONPATH", None)
        python = str(OFFICIAL)
    with recording(FLAGS[flags]) as (recorder, url):
        command = [python, "-W", "ignore", str(SCRIPT), package, url]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return dict(recorder.seen)


def told_by_path(seen: Sequence[Seen]) -> dict[str, list[str]]:
    """What was told on each path. What is sent side by side has no order; sequence numbers tell that of the rest."""
    told = defaultdict(list)
    for request in seen:
        told[request.path].append(json.dumps(_without_chance(request.told), sort_keys=True))
    return {path: sorted(requests) for path, requests in told.items()}


def _without_chance(told: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copied sampler counts from a random block of numbers."""
    *rest, body = told
    if isinstance(body, dict) and body.get("seq_id", 0) > CLONE_BLOCK:
        body = {**body, "seq_id": body["seq_id"] % CLONE_BLOCK}
    return (*rest, body)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_server_sees_the_same_of_both_clients(flags: str) -> None:
    ours, official = recorded("tinsmith", flags), recorded("tinker", flags)
    assert set(ours) - set(DIFFERENT) == set(official) - set(DIFFERENT)
    assert len(official) > 30
    for scenario in official.keys() - DIFFERENT.keys():
        assert told_by_path(ours[scenario]) == told_by_path(official[scenario]), scenario


def submits(seen: Sequence[Seen]) -> list[int]:
    return [request.body["seq_id"] for request in seen if request.path == "forward_backward"]


def test_chunks_are_sent_together_with_the_first_last_or_one_after_another() -> None:
    for package in ("tinsmith", "tinker"):
        *later, first = submits(recorded(package, "parallel")["five datums"])
        assert (sorted(later), first) == ([5, 6], 4)
        assert submits(recorded(package, "one after another")["five datums"]) == [4, 5, 6]
        forward, backward = (submits(recorded(package, "parallel")["a custom loss"])[i : i + 2] for i in (0, 2))
        assert (forward, backward) == ([12, 11], [14, 13])


@pytest.mark.parametrize("package", ["tinsmith", "tinker"])
def test_a_retried_submit_keeps_its_idempotency_key(package: str) -> None:
    seen = recorded(package, "parallel")
    for scenario, path, count in (
        ("a step that meets a conflict", "optim_step", 3),
        ("a submit that is dropped", "forward_backward", 2),
    ):
        keys = [request.idempotency_key for request in seen[scenario] if request.path == path]
        assert len(keys) == count
        assert len(set(keys)) == 1
        assert keys[0]


def test_pauses_after_faults_are_of_the_official_ones_order() -> None:
    """Ours may wait longer where a server holds no polls, never less after a limit."""
    ours, official = recorded("tinsmith", "parallel"), recorded("tinker", "parallel")
    for scenario, path in (
        ("polls that are limited or dropped", "retrieve_future"),
        ("a step that meets a conflict", "optim_step"),
        ("a sample that is not taken yet", "asample"),
    ):
        mine, theirs = ([request.at for request in seen[scenario] if request.path == path] for seen in (ours, official))
        assert mine[1] - mine[0] >= 0.5 * (theirs[1] - theirs[0]), scenario
        assert mine[-1] - mine[0] < 10, scenario
