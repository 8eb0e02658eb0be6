"""The recipes that ship learn what they promise, on the embedded engine, each with a seed and a margin."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tinsmith.kitchen import RECIPES, RunFolder, TrainingConfig, TrainingResult, run_recipe
from tinsmith.kitchen.adapters.tinker_training import TinkerBackend, open_backend
from tinsmith.kitchen.preferences import WITHOUT_REFERENCE
from tinsmith.observe import StepRow


def connect(config: TrainingConfig, folder: RunFolder) -> TinkerBackend:
    return open_backend(base_url="local:", model=config.model, store=folder.store)


def cook(name: str, output: Path, **settings: Any) -> TrainingResult:
    config = RECIPES[name].make({"output": output, "seed": 0, **settings})
    assert isinstance(config, TrainingConfig)
    return run_recipe(RECIPES[name], config, connect)


def mean(rows: Sequence[StepRow], metric: str) -> float:
    return statistics.fmean(row.metrics[metric] for row in rows)


@pytest.mark.parametrize("name", ["sl_basic", "chat_sl"])
def test_ck_55_supervised_recipes_halve_the_loss(name: str, tmp_path: Path) -> None:
    result = cook(name, tmp_path / "run")
    assert result.rows[-1].loss < result.rows[0].loss / 2


def test_ck_55_dpo_starts_at_ln_2_and_tells_held_out_pairs_apart(tmp_path: Path) -> None:
    result = cook("dpo", tmp_path / "run", epochs=2)
    assert result.rows[0].loss == pytest.approx(0.6931, abs=1e-3)
    assert result.evaluations[-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize("loss", sorted(WITHOUT_REFERENCE))
def test_ck_41_losses_without_a_reference_make_the_chosen_answers_the_likelier(loss: str, tmp_path: Path) -> None:
    """The base model is all but certain of the rejected answers."""
    result = cook("dpo", tmp_path / "run", loss=loss)
    assert result.rows[0].metrics["accuracy"] < 0.1
    assert result.evaluations[-1]["test_accuracy"] == result.evaluations[-1]["test_likelier"] > 0.9


def test_ck_55_math_rl_raises_its_reward_by_three_tenths(tmp_path: Path) -> None:
    result = cook("math_rl", tmp_path / "run", eval_size=0)
    assert mean(result.rows[-4:], "reward") > mean(result.rows[:2], "reward") + 0.3
    rollouts = RunFolder(result.output).rollouts()
    assert rollouts[0]["prompt"].startswith("user: What is ")
    assert len(rollouts) == 24 * 24 * 8
    assert "What is" in (result.output / "report.html").read_text()


def test_ck_55_code_rl_learns_from_programs_that_run(tmp_path: Path) -> None:
    result = cook("code_rl", tmp_path / "run", num_rollouts=6, eval_size=0)
    assert mean(result.rows[-2:], "reward") > mean(result.rows[:2], "reward") + 0.05


def test_ck_55_multi_turn_rl_learns_across_turns(tmp_path: Path) -> None:
    result = cook("multi_turn_rl", tmp_path / "run", num_rollouts=12)
    assert mean(result.rows[-4:], "reward") > mean(result.rows[:2], "reward") + 0.15
    assert any("user: No." in row["prompt"] for row in RunFolder(result.output).rollouts())


def test_ck_55_distillation_halves_the_divergence_from_the_teacher(tmp_path: Path) -> None:
    result = cook("distillation", tmp_path / "run")
    before, after = result.evaluations[0]["teacher_kl"], result.evaluations[-1]["teacher_kl"]
    assert after < before / 2, (before, after)


def test_ck_42_asynchronous_rounds_learn_within_their_bound(tmp_path: Path) -> None:
    result = cook("math_rl", tmp_path / "run", num_rollouts=12, max_staleness=1, eval_size=0)
    assert {row.metrics["staleness"] for row in result.rows} == {0.0, 1.0}
    assert mean(result.rows[-4:], "reward") > mean(result.rows[:2], "reward") + 0.15


def test_a_run_on_a_server_gives_the_series_of_the_embedded_engine(tmp_path: Path, server: str) -> None:
    settings = {"num_rollouts": 2, "groups_per_batch": 4, "group_size": 4, "eval_size": 0}
    local = cook("math_rl", tmp_path / "local", **settings)
    config = RECIPES["math_rl"].make({"output": tmp_path / "served", "seed": 0, **settings})
    assert isinstance(config, TrainingConfig)
    served = run_recipe(
        RECIPES["math_rl"], config, lambda config, folder: open_backend(base_url=server, model=config.model)
    )
    for ours, theirs in zip(local.rows, served.rows, strict=True):
        assert (ours.metrics["reward"], ours.tokens) == (theirs.metrics["reward"], theirs.tokens)
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
