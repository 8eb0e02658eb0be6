"""Trackers and the Prometheus file: what arrives there of a run.

TensorBoard is asked for real. The other packages are played by stand-ins with the functions that are used of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinsmith.data import ChatTokenizer
from tinsmith.kitchen import ConfigError, StageError, adapters, attach_telemetry, detach_telemetry, run

SMALL = {"num_rollouts": 2, "groups_per_batch": 2, "group_size": 4, "eval_size": 2}


def cook(tokenizer: ChatTokenizer, output: Path, **settings: Any) -> None:
    run("math_rl", {"output": output, **SMALL, **settings}, adapters=adapters.noop(chat_tokenizer=tokenizer))


@pytest.fixture
def listening() -> Any:
    yield attach_telemetry
    detach_telemetry()


class Recorder:
    """Stands in for a tracker's module and its run: keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> Recorder:
        self.told.append(("init", options))
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.told.append((f"log {step}", values))

    def finish(self, **options: Any) -> None:
        self.told.append(("finish", options))


def check(told: list[tuple[str, Any]]) -> None:
    steps = [int(what.split()[1]) for what, _ in told if what.startswith("log")]
    assert steps == sorted(steps)
    logged = {name: value for what, values in told if what.startswith("log") for name, value in values.items()}
    assert logged.keys() >= {"train/loss", "train/learning_rate", "rl/reward", "rl/staleness", "eval/test_reward"}


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_ck_16_a_run_goes_to_a_tracker(
    kind: str, listening: Any, tiny_tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Recorder()
    monkeypatch.setitem(sys.modules, kind, tracker)  # type: ignore[arg-type]
    listening(kind, target="sums")
    cook(tiny_tokenizer, tmp_path / "run")
    first, *told, last = tracker.told
    assert (first[0], first[1]["project"], first[1]["config"]["group_size"]) == ("init", "sums", 4)
    check(told)
    assert last == ("finish", {"exit_code": 0} if kind == "wandb" else {})


def test_ck_16_mlflow_gets_parameters_and_figures_and_hears_of_a_failure(
    listening: Any, tiny_tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Any]] = []
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name: "7",
        create_run=lambda experiment, run_name: SimpleNamespace(info=SimpleNamespace(run_id="r")),
        log_param=lambda run, key, value: told.append((f"param {key}", value)),
        log_metric=lambda run, key, value, step: told.append((f"log {step}", {key: value})),
        set_terminated=lambda run, status: told.append(("end", status)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda tracking_uri: client))
    listening("mlflow", target="http://127.0.0.1:1")
    cook(tiny_tokenizer, tmp_path / "run")
    assert ("param group_size", 4) in told
    check(told)
    assert told[-1] == ("end", "FINISHED")
    given = adapters.noop(chat_tokenizer=tiny_tokenizer, fail_after_steps=1)
    with pytest.raises(StageError):
        run("math_rl", {"output": tmp_path / "failed", **SMALL}, adapters=given)
    assert told[-1] == ("end", "FAILED")


def test_ck_16_tensorboard_files_hold_the_curves(listening: Any, tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listening("tensorboard", target=str(tmp_path / "board"))
    cook(tiny_tokenizer, tmp_path / "run")
    (folder,) = (tmp_path / "board").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("rl/reward")] == [1, 2]
    assert len(events.Scalars("train/loss")) == 2


def test_a_tracker_that_is_not_installed_says_how(
    listening: Any, tiny_tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    listening("wandb")
    with pytest.raises(ConfigError, match="pip install wandb"):
        cook(tiny_tokenizer, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"telemetry 'wandbb' is none of .*did you mean 'wandb'"):
        listening("wandbb")


def test_ck_16_prometheus_reads_a_file(listening: Any, tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "textfiles" / "kitchen.prom"
    listening("prometheus", path=path)
    cook(tiny_tokenizer, tmp_path / "run")
    lines = path.read_text().splitlines()
    assert 'tinsmith_kitchen_events_total{event="training.step"} 2.0' in lines
    assert 'tinsmith_kitchen_events_total{event="workflow.run.stop"} 1.0' in lines
    assert 'tinsmith_kitchen_figure{event="rl.step",name="staleness"} 0.0' in lines
