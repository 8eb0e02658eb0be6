"""Experiments: conditions and repeats, what fails and is tried again, and what is not run twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tinsmith.data import ChatTokenizer
from tinsmith.kitchen import ConfigError, RunFolder, RunFolderError
from tinsmith.kitchen.adapters.files import JsonlMetrics
from tinsmith.kitchen.adapters.noop_training import NoopBackend
from tinsmith.kitchen.experiments import Condition, ExperimentSpec, read_dead, read_spec, run_experiment

SMALL: dict[str, Any] = {"epochs": 1, "batch_size": 24}
RATES = (
    Condition(name="low", config={"learning_rate": 1e-4}),
    Condition(name="high", config={"learning_rate": 1e-3}),
)


class Bench:
    """Counts the backends it hands out; those numbered in `mortal` fail after a step."""

    def __init__(self, tokenizer: ChatTokenizer, *mortal: int) -> None:
        self.tokenizer, self.mortal, self.made = tokenizer, mortal, 0
        self.store: dict[str, Any] = {}

    def __call__(self, config: Any, folder: RunFolder) -> NoopBackend:
        number, self.made = self.made, self.made + 1
        dies = 1 if number in self.mortal else None
        return NoopBackend(chat_tokenizer=self.tokenizer, fail_after_steps=dies, store=self.store)


def test_ck_57_conditions_are_repeated_under_the_same_seeds_and_compared(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    spec = ExperimentSpec(name="rates", recipe="sl_basic", config=SMALL, conditions=RATES, repeats=2)
    bench = Bench(tiny_tokenizer)
    result = run_experiment(spec, tmp_path, bench, clock=lambda: 5.0)
    seeds = {
        name: [RunFolder(tmp_path / name / str(n)).read_config()["seed"] for n in (0, 1)] for name in ("low", "high")
    }
    assert seeds == {"low": [0, 1], "high": [0, 1]}
    low = [run["loss"] for run in result.values["low"]]
    mean, half = sum(low) / 2, abs(low[0] - low[1]) / 2**0.5
    row = result.table(["loss"]).splitlines()[2]
    assert row == f"| low | 2/2 | {mean:.4g} ± {half:.2g} |"
    rows = JsonlMetrics(tmp_path / "metrics.jsonl").read("rates/high/1", "loss")
    assert (rows[0].value, rows[0].timestamp) == (result.values["high"][1]["loss"], 5.0)
    assert rows[0].metadata == {"experiment": "rates", "condition": "high", "repeat": 1}

    again = run_experiment(spec, tmp_path, bench)
    assert bench.made == 4, "all of it was finished"
    assert again.table() == result.table()


def test_ck_57_figures_of_another_config_are_not_shown_as_those_of_this_one(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    def spec(rate: float) -> ExperimentSpec:
        conditions = (Condition(name="low", config={"learning_rate": rate}),)
        return ExperimentSpec(name="rates", recipe="sl_basic", config=SMALL, conditions=conditions)

    bench = Bench(tiny_tokenizer)
    run_experiment(spec(1e-4), tmp_path, bench)
    with pytest.raises(RunFolderError, match=r"low/0' was made with learning_rate=0.0001, not 0.0005"):
        run_experiment(spec(5e-4), tmp_path, bench)


def test_ck_57_what_fails_is_tried_again_and_then_put_on_the_list_of_the_dead(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    told: list[str] = []

    class Hooks:
        def started(self, trial: Any, attempt: int) -> None:
            told.append(f"{trial.condition} {attempt}")

        def finished(self, trial: Any, values: Any) -> None:
            told.append(f"{trial.condition} finished")

        def died(self, dead: Any) -> None:
            told.append(f"{dead.trial.condition} died")

    spec = ExperimentSpec(name="x", recipe="sl_basic", config={**SMALL, "save_every": 1}, conditions=RATES)
    result = run_experiment(spec, tmp_path, Bench(tiny_tokenizer, 0, 2, 3), hooks=Hooks())
    assert told == ["low 0", "low 1", "low finished", "high 0", "high 1", "high died"]
    assert [run["loss"] > 0 for run in result.values["low"]] == [True]
    assert result.values["high"] == []
    (dead,) = read_dead(tmp_path)
    assert (dead["condition"], dead["repeat"], dead["attempts"]) == ("high", 0, 2)
    assert dead["error"].startswith("NoopFailure: ")
    assert re.search(r"\| high \| 0/1 \|.*\n\nhigh 0 failed: NoopFailure", result.table(["loss"]))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"conditions": ()}, "experiment 'x' has no conditions"),
        ({"conditions": (*RATES, RATES[0])}, "two conditions of experiment 'x' are named 'low'"),
        ({"conditions": (Condition(name="a/b"),)}, "condition 'a/b' cannot be the name of a folder"),
        ({"repeats": 0}, "repeats must be at least 1, not 0"),
        ({"repeats": "3"}, "repeats must be at least 1, not '3'"),
        ({"config": {"output": "here"}}, "output is given by the experiment"),
        ({"config": {"resume": True}}, "resume is given by the experiment"),
        ({"config": 3}, "config must hold keys and values, not 3"),
        ({"conditions": (Condition(name="low", config=5),)}, "condition 'low' must hold keys and values, not 5"),
    ],
)
def test_a_wrong_experiment_is_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ExperimentSpec(**{"name": "x", "recipe": "sl_basic", "conditions": RATES, **settings})


def test_a_wrong_condition_is_found_before_anything_runs(tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    bad = (*RATES, Condition(name="bad", config={"lora.rnk": 3}))
    with pytest.raises(ConfigError, match=r"condition 'bad': unknown key 'lora.rnk'.*did you mean 'lora_rank'"):
        run_experiment(ExperimentSpec(name="x", recipe="sl_basic", conditions=bad), tmp_path, Bench(tiny_tokenizer))
    bad = (*RATES, Condition(name="bad", config={"seed": "x"}))
    with pytest.raises(ConfigError, match="condition 'bad': seed='x': Input should be a valid integer"):
        run_experiment(ExperimentSpec(name="x", recipe="sl_basic", conditions=bad), tmp_path, Bench(tiny_tokenizer))
    assert not list(tmp_path.iterdir())


def test_ck_57_an_experiment_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    path.write_text(
        'recipe = "sl_basic"\nrepeats = 2\n[config]\nepochs = 1\n'
        "[conditions.low]\nlearning_rate = 1e-4\n[conditions.high]\n"
    )
    spec = read_spec(path)
    assert (spec.name, spec.repeats, [condition.name for condition in spec.conditions]) == ("rates", 2, ["low", "high"])
    path.write_text('recipe = "sl_basic"\nrepeat = 2\n[conditions.a]\n')
    with pytest.raises(ConfigError, match="unknown key 'repeat'"):
        read_spec(path)
