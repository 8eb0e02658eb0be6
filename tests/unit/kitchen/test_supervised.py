from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinsmith.data import DataError
from tinsmith.kitchen import (
    ConfigError,
    RunFolder,
    RunFolderError,
    SupervisedConfig,
    SupervisedResult,
    TrainingDiverged,
    run_supervised,
)
from tinsmith.kitchen.adapters.files import FolderRegistry
from tinsmith.kitchen.adapters.noop_training import NoopBackend, NoopFailure
from tinsmith.kitchen.ports import SessionSpec, TrainingSession
from tinsmith.observe import read_jsonl
from tinsmith.types.errors import UserError

Train = Callable[..., SupervisedResult]
NewBackend = Callable[..., NoopBackend]
STEPS = 6


def deterministic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s")} for row in rows]


def test_a_run_reports_a_falling_loss_and_fills_its_folder(train: Train, tmp_path: Path, data: Path) -> None:
    result = train(save_every=2, test_size=1)
    assert result.steps == STEPS
    assert result.loss_last < result.loss_first
    assert sorted(path.name for path in result.output.iterdir()) == [
        "checkpoints.jsonl", "config.json", "evaluations.jsonl", "loss.png", "manifest.json", "metrics.jsonl",
        "report.html",
    ]  # fmt: skip
    rows = read_jsonl(result.output / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert rows[0].keys() == {
        "step", "epoch", "loss", "loss_sum", "tokens", "tokens_per_s", "learning_rate", "grad_norm", "seconds"
    }  # fmt: skip
    assert sum(row["tokens"] for row in rows) == result.tokens
    assert [row["step"] for row in read_jsonl(result.output / "checkpoints.jsonl")] == [2, 4, 6]
    assert result.checkpoint.sampler_path == "tinker://noop-1/sampler_weights/step_000006"
    assert json.loads((result.output / "config.json").read_text())["batch_size"] == 4
    manifest = json.loads((result.output / "manifest.json").read_text())
    assert (manifest["seed"], manifest["data"]["path"], manifest["data"]["conversations"]) == (0, str(data), 10)
    assert manifest["versions"]["tinsmith"]
    assert (result.output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_is_the_mean_per_trained_token(train: Train, backend: NoopBackend) -> None:
    result = train()
    for step, data in enumerate(backend.data):
        weights = [weight for datum in data for weight in datum.loss_fn_inputs["weights"].data]
        num_trained = sum(1 for weight in weights if weight)
        assert sum(weights) == pytest.approx(1.0, abs=1e-6)
        row = read_jsonl(result.output / "metrics.jsonl")[step]
        assert row["loss_sum"] == pytest.approx(row["loss"] * num_trained)


def test_each_step_is_submitted_before_the_one_before_it_is_read(train: Train, backend: NoopBackend) -> None:
    train(save_every=2, epochs=1, test_size=1, eval_every=2, numerics_gate=False)
    assert backend.calls == [
        "submit forward_backward 1", "submit optim_step 1",
        "submit forward_backward 2", "submit optim_step 2", "submit save 3", "submit forward 3",
        "read forward_backward 1", "read optim_step 1",
        "submit forward_backward 3", "submit optim_step 3", "submit save 4", "submit forward 4",
        "read forward_backward 2", "read optim_step 2", "read forward 3", "read save 3",
        "read forward_backward 3", "read optim_step 3", "read forward 4", "read save 4",
    ]  # fmt: skip
    assert backend.closed


def test_the_same_config_gives_the_same_series_and_another_seed_another(
    train: Train, new_backend: NewBackend, tmp_path: Path
) -> None:
    def series(name: str, **settings: Any) -> list[dict[str, Any]]:
        result = train(new_backend(), output=tmp_path / name, **settings)
        return deterministic(read_jsonl(result.output / "metrics.jsonl"))

    assert series("a") == series("b")
    assert series("a2", seed=1) != series("b2")


@pytest.mark.parametrize("killed_after", range(STEPS))
@pytest.mark.parametrize("save_every", [1, 2, 5])
def test_train_n_equals_train_k_kill_resume_train_the_rest(
    train: Train, new_backend: NewBackend, tmp_path: Path, killed_after: int, save_every: int
) -> None:
    settings = {"save_every": save_every, "lr_schedule": "cosine", "epochs": 3, "test_size": 2, "eval_every": 2}
    whole = train(new_backend(), output=tmp_path / "whole", **settings)

    mortal = new_backend(fail_after_steps=killed_after)
    with pytest.raises(NoopFailure):
        train(mortal, output=tmp_path / "parts", **settings)
    parts = train(new_backend(store=mortal.store), output=tmp_path / "parts", resume=True, **settings)

    for file in ("metrics.jsonl", "evaluations.jsonl"):
        assert deterministic(read_jsonl(parts.output / file)) == deterministic(read_jsonl(whole.output / file))
    for key in ("steps", "loss_first", "loss_last", "test_loss", "tokens"):
        assert getattr(parts, key) == getattr(whole, key)
    steps = [record.step for record in RunFolder(parts.output).checkpoints()]
    assert steps == [record.step for record in RunFolder(whole.output).checkpoints()]


def test_resuming_forgets_rows_after_the_checkpoint_and_a_torn_last_line(
    train: Train, new_backend: NewBackend, tmp_path: Path
) -> None:
    mortal = new_backend(fail_after_steps=5)
    with pytest.raises(NoopFailure):
        train(mortal, save_every=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 5, "epo')
    train(new_backend(store=mortal.store), resume=True)
    assert [row["step"] for row in read_jsonl(metrics)] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_changes_nothing(train: Train, new_backend: NewBackend, backend: NoopBackend) -> None:
    first = train()
    again = train(new_backend(store=backend.store), resume=True)
    assert again == first


def test_a_resumed_run_keeps_its_config(train: Train) -> None:
    train()
    with pytest.raises(
        RunFolderError, match=r"made with learning_rate=0.0002, not 0.1; a resumed run keeps its config"
    ):
        train(resume=True, learning_rate=0.1)


def test_a_resumed_run_keeps_its_data(train: Train, data: Path) -> None:
    train()
    data.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(RunFolderError, match=r"talk.jsonl' is not the data that the run in .* was made with"):
        train(resume=True)


def test_a_folder_of_splits_is_not_trained_on_as_a_whole(train: Train, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(data.read_bytes())
    assert train(data=folder, epochs=1).steps == 3
    (folder / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"talks' has the splits 'test', 'train'; name the one to train on"):
        train(data=folder, output=tmp_path / "other")


def test_there_must_be_a_run_to_resume(train: Train, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"none' holds no run: it has no config.json"):
        train(resume=True, output=tmp_path / "none")


def test_a_run_is_never_overwritten(train: Train) -> None:
    train()
    with pytest.raises(RunFolderError, match=r"already holds a run; give another output, or go on with it by resume"):
        train()


def test_of_two_runs_that_find_the_same_folder_free_one_gets_it(
    train: Train, new_backend: NewBackend, tmp_path: Path
) -> None:
    class Slow(NoopBackend):
        def start_session(self, spec: SessionSpec) -> TrainingSession:
            train(new_backend(), learning_rate=1e-3)
            return super().start_session(spec)

    with pytest.raises(RunFolderError, match=r"another run has begun in .*run'; give another output"):
        train(Slow(chat_tokenizer=new_backend().chat_tokenizer))
    assert RunFolder(tmp_path / "run").read_config()["learning_rate"] == 1e-3
    assert len(RunFolder(tmp_path / "run").rows()) == 6


def test_a_folder_with_something_else_in_it_is_left_alone(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match="holds something that is no run of ours"):
        train()


def test_without_an_output_the_next_free_folder_is_taken(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(output=None).output == Path("runs/supervised-001")
    assert train(output=None).output == Path("runs/supervised-002")


def test_bad_data_writes_nothing_and_closes_the_backend(train: Train, backend: NoopBackend, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more than max_length 12"):
        train(max_length=12)
    assert not (tmp_path / "run").exists()
    assert backend.closed


def test_a_conversation_that_the_model_cannot_take_writes_nothing(
    train: Train, new_backend: NewBackend, tmp_path: Path
) -> None:
    complaint = r"talk.jsonl:\d+: \d+ tokens are more than the model's context of 12; set max_length=12"
    with pytest.raises(DataError, match=complaint):
        train(new_backend(max_context=12))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run(
    train: Train, backend: NoopBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.kitchen.adapters.noop_training.FIRST_LOSS", math.nan)
    with pytest.raises(TrainingDiverged, match=r"the loss of step 1 is nan; lower learning_rate=0.0002"):
        train()
    assert backend.closed


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"test_size": 10}, "test_size 10 leaves nothing of 10 examples to train on"),
        ({"warmup_steps": 6}, "warmup_steps=6 is not below the run's 6 steps"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(train: Train, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(**settings)


CHANGES: dict[str, dict[str, Any]] = {
    "data": {"data": "other.jsonl"},
    "model": {"model": "other/model"},
    "output": {"output": "elsewhere"},
    "resume": {"resume": True},
    "base_url": {"base_url": "http://127.0.0.1:1"},
    "epochs": {"epochs": 1},
    "batch_size": {"batch_size": 3},
    "learning_rate": {"learning_rate": 1e-3},
    "lr_schedule": {"lr_schedule": "constant"},
    "lr_end_share": {"lr_schedule": "exponential", "lr_end_share": 0.5},
    "lr_power": {"lr_schedule": "polynomial", "lr_power": 3.0},
    "register_as": {"register_as": "talker"},
    "warmup_steps": {"warmup_steps": 2},
    "adam_beta1": {"adam_beta1": 0.8},
    "adam_beta2": {"adam_beta2": 0.9},
    "adam_eps": {"adam_eps": 1e-6},
    "weight_decay": {"weight_decay": 0.1},
    "grad_clip_norm": {"grad_clip_norm": 0.0},
    "lora_rank": {"lora_rank": 8},
    "seed": {"seed": 5},
    "train_on": {"train_on": "all_tokens"},
    "max_length": {"max_length": 24, "too_long": "skip"},
    "too_long": {"max_length": 24, "too_long": "truncate"},
    "save_every": {"save_every": 2},
    "numerics_gate": {"numerics_gate": False},
    "test_size": {"test_size": 2},
    "eval_every": {"test_size": 2, "eval_every": 2},
}
"""For every key a setting that must change what a run does."""

BASELINES: dict[str, dict[str, Any]] = {
    "too_long": {"max_length": 24, "too_long": "skip"},
    "eval_every": {"test_size": 2},
    "lr_end_share": {"lr_schedule": "exponential"},
    "lr_power": {"lr_schedule": "polynomial"},
}


def test_every_key_has_a_change_to_test() -> None:
    assert CHANGES.keys() == SupervisedConfig.model_fields.keys()


@pytest.mark.parametrize("key", CHANGES)
def test_no_key_is_dead(
    new_backend: NewBackend, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text(data.read_text().replace("What", "Which"))

    def trace(settings: dict[str, Any]) -> object:
        """All that a run can be seen to do: where it connects, what it submits, where it writes; or its refusal."""
        backend, connected = new_backend(), []

        def connect(config: SupervisedConfig, folder: RunFolder) -> NoopBackend:
            connected.append((config.base_url, folder.path))
            return backend

        config = SupervisedConfig(**({"data": data, "batch_size": 4, "epochs": 2} | settings))
        try:
            run_supervised(config, connect)
        except UserError as error:
            return str(error)
        submitted = [call for call in backend.calls if call.startswith("submit")]
        dumps = [[datum.model_dump() for datum in batch] for batch in backend.data]
        registered = FolderRegistry(Path()).list()
        return connected, submitted, dumps, backend.adam_params, backend.specs, registered

    baseline = {"output": "base"} | BASELINES.get(key, {})
    change = {"output": "base"} | BASELINES.get(key, {}) | CHANGES[key]
    before = trace(baseline)
    if "output" not in CHANGES[key] and key != "resume":
        for path in Path("base").iterdir():
            path.unlink()
    assert trace(change) != before
