"""On a deterministic engine, bit for bit: N steps equal k steps, a kill and N - k steps; a server gives the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tinsmith.kitchen import RECIPES, RunFolder, TrainingConfig, TrainingResult, run_recipe
from tinsmith.kitchen.adapters.tinker_training import TinkerBackend, open_backend
from tinsmith.observe import StepRow

SMALL: dict[str, dict[str, Any]] = {
    "dpo": {"epochs": 1, "batch_size": 2, "test_size": 0},
    "math_rl": {"num_rollouts": 3, "groups_per_batch": 4, "group_size": 4, "eval_size": 0, "kl_penalty_coef": 0.1},
    "distillation": {
        "num_rollouts": 3, "groups_per_batch": 3, "group_size": 2, "teacher_epochs": 1, "max_tokens": 6,
    },
    "off_policy_distillation": {
        "batch_size": 2, "group_size": 1, "epochs": 1, "teacher_epochs": 1, "top_k": 4, "max_tokens": 6,
    },
}  # fmt: skip
"""Three steps each; the base model scores for dpo and math_rl, a teacher that the run taught for the others."""
NUM_RECORDS = 6
LOCAL = "local:?dtype=float32&deterministic=true&threads=1"
"""Threads too: among how many a sum is shared shows in its last bits."""


def write_data(name: str, folder: Path) -> dict[str, Path]:
    """Six pairs or conversations, for recipes that have data."""
    if name == "math_rl":
        return {}
    path = folder / f"{name}.jsonl"
    answers = ("chosen", "rejected") if name == "dpo" else ("completion",)
    lines = [
        {"prompt": f"What is {n}?", **dict(zip(answers, (f"{n} it is", "no idea"), strict=False))}
        for n in range(NUM_RECORDS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data": path}


class KilledHere(Exception):
    pass


class KillAfter:
    """A watcher that ends the run at a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def started(self, *, title: str, first_step: int, num_steps: int) -> None:
        assert num_steps == 3

    def stepped(self, row: StepRow) -> None:
        if row.step == self.step:
            raise KilledHere

    def noted(self, text: str) -> None: ...

    def ended(self) -> None: ...


def cook(name: str, output: Path, *, url: str = LOCAL, watchers: Sequence[Any] = (), **more: Any) -> TrainingResult:
    config = RECIPES[name].make({"output": output, "seed": 3, "save_every": 1, **SMALL[name], **more})
    assert isinstance(config, TrainingConfig)

    def connect(config: TrainingConfig, folder: RunFolder) -> TinkerBackend:
        return open_backend(base_url=url, model=config.model, store=folder.store)

    return run_recipe(RECIPES[name], config, connect, observers=watchers)


def series(result: TrainingResult) -> list[tuple[int, float, float, dict[str, float]]]:
    return [(row.step, row.loss, row.grad_norm or 0.0, dict(row.metrics)) for row in RunFolder(result.output).rows()]


def assert_same(found: TrainingResult, expected: TrainingResult) -> None:
    """Bit for bit."""
    assert len(series(expected)) == 3
    assert series(found) == series(expected)


@pytest.mark.parametrize("name", SMALL)
def test_ck_13_n_steps_equal_k_steps_a_kill_and_the_rest(name: str, tmp_path: Path) -> None:
    data = write_data(name, tmp_path)
    whole = cook(name, tmp_path / "whole", **data)
    with pytest.raises(KilledHere):
        cook(name, tmp_path / "parts", **data, watchers=[KillAfter(2)])
    kept = RunFolder(tmp_path / "parts").checkpoints()
    assert [record.step for record in kept] == [1]
    parts = cook(name, tmp_path / "parts", **data, resume=True)
    assert_same(parts, whole)
    if name == "dpo":
        assert whole.rows[0].loss == pytest.approx(0.6931, abs=1e-3)
        assert parts.rows[-1].loss < 0.69, "the reference is the base still, not the policy that was loaded"
    if name == "math_rl":
        assert whole.rows[0].metrics["reference_kl"] == pytest.approx(0.0, abs=1e-3)
        assert RunFolder(parts.output).rollouts() == RunFolder(whole.output).rollouts()


def test_ck_12_a_server_gives_the_series_of_the_embedded_engine(tmp_path: Path, deterministic_server: str) -> None:
    for name in ("dpo", "distillation"):
        data = write_data(name, tmp_path)
        local = cook(name, tmp_path / f"{name} local", **data)
        served = cook(name, tmp_path / f"{name} served", **data, url=deterministic_server)
        assert_same(served, local)
