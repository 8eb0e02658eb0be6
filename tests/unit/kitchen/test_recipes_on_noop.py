"""Every shipped recipe on the noop backend: it runs in moments, no key is dead, and a resumed run is the same run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinsmith.data import ChatTokenizer, DataError
from tinsmith.kitchen import (
    RECIPES,
    CheckpointRecord,
    ConfigError,
    GateFailed,
    RunFolder,
    TrainingConfig,
    TrainingResult,
    ValidationError,
    adapters,
    attach_telemetry,
    detach_telemetry,
    run,
    run_recipe,
)
from tinsmith.kitchen.adapters.noop_services import EvenDigits
from tinsmith.kitchen.adapters.noop_training import NoopBackend, NoopFailure
from tinsmith.kitchen.environments import QuestionTasks
from tinsmith.kitchen.ports import SessionSpec
from tinsmith.kitchen.telemetry import Event
from tinsmith.observe import keep_rows, read_jsonl

SMALL: dict[str, dict[str, Any]] = {
    "sl_basic": {"epochs": 1, "batch_size": 24},
    "chat_sl": {"epochs": 1, "batch_size": 24},
    "dpo": {"epochs": 2, "batch_size": 27},
    "math_rl": {"num_rollouts": 4, "groups_per_batch": 3, "group_size": 4, "eval_size": 2},
    "code_rl": {"num_rollouts": 4, "groups_per_batch": 3, "group_size": 4, "eval_size": 2},
    "multi_turn_rl": {"num_rollouts": 4, "groups_per_batch": 3, "group_size": 4, "eval_size": 2},
    "distillation": {"num_rollouts": 4, "groups_per_batch": 3, "teacher_epochs": 1},
    "off_policy_distillation": {"epochs": 2, "batch_size": 72, "teacher_epochs": 1},
}
"""Settings that make a recipe small; every recipe that needs no data is here."""


def deterministic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s")} for row in rows]


@pytest.fixture
def cook(tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> Callable[..., TrainingResult]:
    def go(name: str, output: str, backend: NoopBackend | None = None, **settings: Any) -> TrainingResult:
        recipe = RECIPES[name]
        config = recipe.make({"output": tmp_path / output, **SMALL[name], **settings})
        assert isinstance(config, TrainingConfig)
        used = backend or NoopBackend(chat_tokenizer=tiny_tokenizer)
        environment = {"environment": EvenDigits()} if "environment" in type(config).model_fields else {}
        return run_recipe(recipe, config, lambda _config, _folder: used, adapters=environment)

    return go


def test_every_recipe_is_tested_here() -> None:
    assert SMALL.keys() | {"supervised", "preference", "reinforcement", "feedback_loop"} == RECIPES.keys()


@pytest.mark.parametrize("name", SMALL)
def test_ck_17_a_recipe_runs_on_noop_in_under_a_second(
    name: str, tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    import matplotlib.figure  # noqa: F401 - what is measured is the run, not the import

    began = time.process_time()
    result = run(
        name,
        {"output": tmp_path / "run", **SMALL[name]},
        adapters=adapters.noop(chat_tokenizer=tiny_tokenizer),
    )
    assert time.process_time() - began < 1.0
    assert result.status == "completed"
    rows = RunFolder(tmp_path / "run").rows()
    assert rows[-1].loss < rows[0].loss or rows[0].loss == 0
    assert isinstance(result.artifacts["checkpoint"], CheckpointRecord)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page
    assert ("Samples, first and last" in page) == (tmp_path / "run" / "rollouts.jsonl").exists()


@pytest.mark.parametrize("name", ["dpo", "math_rl", "multi_turn_rl", "distillation", "off_policy_distillation"])
@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_ck_13_train_n_equals_train_k_kill_resume_train_the_rest(
    cook: Callable[..., TrainingResult], tiny_tokenizer: ChatTokenizer, name: str, killed_after: int
) -> None:
    taught = 9 if "distillation" in name else 0  # the steps of the teacher's own lessons
    whole = cook(name, "whole", save_every=1)
    mortal = NoopBackend(chat_tokenizer=tiny_tokenizer, fail_after_submitted_steps=killed_after + taught)
    with pytest.raises(NoopFailure):
        cook(name, "parts", mortal, save_every=1)
    survivor = NoopBackend(chat_tokenizer=tiny_tokenizer, store=mortal.store)
    parts = cook(name, "parts", survivor, save_every=1, resume=True)
    for file in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl"):
        assert deterministic(read_jsonl(parts.output / file)) == deterministic(read_jsonl(whole.output / file))
    assert parts.checkpoint.step == whole.checkpoint.step


def test_ck_13_43_a_run_killed_between_its_last_checkpoint_and_its_last_measure_makes_up_for_it(
    cook: Callable[..., TrainingResult], tiny_tokenizer: ChatTokenizer
) -> None:
    backend = NoopBackend(chat_tokenizer=tiny_tokenizer)
    whole = cook("distillation", "run", backend)
    assert [row["step"] for row in whole.evaluations] == [0, 4]
    keep_rows(whole.output / "evaluations.jsonl", lambda row: row["step"] == 0)
    for _ in range(2):
        survivor = NoopBackend(chat_tokenizer=tiny_tokenizer, store=backend.store)
        assert cook("distillation", "run", survivor, resume=True).evaluations == whole.evaluations


@pytest.mark.parametrize("save_every", [2, 3])
def test_ck_42_asynchronous_rounds_keep_their_bound_and_resume_exactly(
    cook: Callable[..., TrainingResult], tiny_tokenizer: ChatTokenizer, save_every: int
) -> None:
    settings = {"num_rollouts": 7, "max_staleness": 2, "save_every": save_every, "eval_size": 0}
    whole = cook("math_rl", "whole", **settings)
    staleness = [row.metrics["staleness"] for row in whole.rows]
    assert max(staleness) == min(2, save_every - 1)
    assert [staleness[step] for step in range(0, 7, save_every)] == [0.0] * len(range(0, 7, save_every))
    mortal = NoopBackend(chat_tokenizer=tiny_tokenizer, fail_after_submitted_steps=5)
    with pytest.raises(NoopFailure):
        cook("math_rl", "parts", mortal, **settings)
    survivor = NoopBackend(chat_tokenizer=tiny_tokenizer, store=mortal.store)
    parts = cook("math_rl", "parts", survivor, resume=True, **settings)
    assert deterministic(read_jsonl(parts.output / "metrics.jsonl")) == deterministic(
        read_jsonl(whole.output / "metrics.jsonl")
    )


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_ck_42_every_policy_loss_gets_what_it_reads(
    cook: Callable[..., TrainingResult], tiny_tokenizer: ChatTokenizer, loss: str
) -> None:
    backend = NoopBackend(chat_tokenizer=tiny_tokenizer)
    cook("math_rl", "run", backend, loss=loss, ppo_epochs=2, clip_epsilon=0.1, eval_size=0, kl_penalty_coef=0.5)
    inputs = backend.data[0][0].loss_fn_inputs
    assert {"target_tokens", "logprobs", "advantages"} <= inputs.keys()
    assert ("sequence_ratio_mask" in inputs) == (loss == "gspo")
    assert backend.loss_configs[0] == (loss, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1})
    assert len(backend.adam_params) == 8


def test_ck_15_16_built_in_workflows_emit_every_event_they_name(cook: Callable[..., TrainingResult]) -> None:
    seen: list[Event] = []
    number = attach_telemetry(seen.append)
    try:
        cook("sl_basic", "sl")
        cook("dpo", "dpo")
        cook("math_rl", "rl")
        cook("distillation", "distillation")
    finally:
        detach_telemetry(number)
    names = {event.name.removeprefix("crucible_kitchen.") for event in seen}
    assert names >= {
        "workflow.run.start", "workflow.run.stop", "stage.run.start", "stage.run.stop", "training.step",
        "training.epoch", "training.checkpoint", "eval.complete", "dataset.load", "dataset.batch", "gate.passed",
        "dpo.step", "rl.rollout", "rl.step", "distillation.step",
    }  # fmt: skip
    losses = [event.measurements["loss"] for event in seen if event.name.endswith("dpo.step")]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < losses[0]


class _Skewed(NoopBackend):
    """Trains other weights than it samples."""

    def forward(self, session: Any, datums: Any, loss_fn: str = "cross_entropy", loss_fn_config: Any = None) -> Any:
        session.weights = session.weights.after("skewed").pushed({})
        object.__setattr__(session.weights, "steps", 3)
        return session.forward(datums, loss_fn, loss_fn_config)


def test_the_gate_stops_a_run_whose_sampler_and_trainer_disagree(
    cook: Callable[..., TrainingResult], tiny_tokenizer: ChatTokenizer
) -> None:
    with pytest.raises(GateFailed, match=r"sampler and trainer disagree: their log-probabilities .* differ by 0.7"):
        cook("math_rl", "run", _Skewed(chat_tokenizer=tiny_tokenizer))


def test_the_gate_stops_dpo_whose_reference_is_not_what_is_trained(
    cook: Callable[..., TrainingResult], tiny_tokenizer: ChatTokenizer
) -> None:
    class _OtherBase(NoopBackend):
        def open_sampler(self, model: str) -> Any:
            sampler = super().open_sampler(model)
            object.__setattr__(sampler.weights, "steps", 20)
            return sampler

    with pytest.raises(GateFailed, match="a fresh adapter is not the base model"):
        cook("dpo", "run", _OtherBase(chat_tokenizer=tiny_tokenizer))


def test_ck_01_the_quick_start_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"model": "meta-llama/Llama-3.1-8B", "epochs": 3, "batch_size": 24, "learning_rate": 2.0e-4}
    result = run("supervised", config, adapters=adapters.noop())
    assert result.status == "completed"
    losses = [metric.value for metric in result.metrics if metric.name == "loss"]
    assert losses[-1] < losses[0] / 1.5
    assert result.artifacts["output"] == Path("runs/supervised-001")


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("dpo", {"losss": "ipo"}, "unknown key 'losss'.*did you mean 'loss'"),
        ("dpo", {"lora.rnk": 3}, "unknown key 'lora.rnk'.*did you mean 'lora_rank'"),
        ("dpo", {"loss": "simpo", "reference": "x"}, "loss='simpo' has no reference"),
        ("math_rl", {"group_size": 1}, "group_size=1 leaves nothing to compare"),
        ("math_rl", {"eval_size": 0, "eval_every": 2}, "eval_every=2 needs eval_size"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(name: str, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        RECIPES[name].make(settings)


def test_an_unknown_environment_and_a_missing_adapter_are_found_first(tmp_path: Path) -> None:
    noop = adapters.noop()
    del noop["environment"]
    with pytest.raises(ValidationError, match=r"environment='additon' is none of addition, .*did you mean 'addition'"):
        run("math_rl", {"environment": "additon", "output": tmp_path / "a"}, adapters=noop)
    del noop["sampling_client"]
    with pytest.raises(ValidationError, match="needs an adapter for 'sampling_client'"):
        run("math_rl", {"output": tmp_path / "b"}, adapters=noop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"prompt": "a", "chosen": "b"}, r"pairs.jsonl:2: field 'rejected' must be a text that is not empty, not None"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pairs.jsonl:2: chosen and rejected are the same, 'b'"),
        ({"chosen": "b", "rejected": "c"}, "pairs.jsonl:2: field 'prompt' is missing"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "system": "Be brief."},
            "pairs.jsonl:2: field 'system' is not supported; it holds 'Be brief.'",
        ),
        (
            {"prompt": "a", "messages": [{"role": "user", "content": "x"}], "chosen": "b", "rejected": "c"},
            "pairs.jsonl:2: the line has both 'prompt' and 'messages'; keep one",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "look"}]},
            "pairs.jsonl:2: the chat template has no place for tools",
        ),
    ],
)
def test_a_bad_pair_names_file_and_line(
    cook: Callable[..., TrainingResult], tmp_path: Path, line: dict[str, str], complaint: str
) -> None:
    good = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    with pytest.raises(Exception, match=complaint):
        cook("dpo", "run", data=tmp_path / "pairs.jsonl", test_size=0)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("chat_sl", r"\d+ tokens are more than the model's context of 20; set max_length=20"),
        ("dpo", r"\d+ tokens with 'chosen' do not fit into the model's context of 20"),
        ("distillation", r"a prompt of \d+ tokens leaves no room for an answer in the model's context of 20"),
        (
            "off_policy_distillation",
            r"a prompt of \d+ tokens leaves no room for an answer in the model's context of 20",
        ),
    ],
)
def test_what_the_model_cannot_take_is_found_before_anything_is_trained(
    tiny_tokenizer: ChatTokenizer, cook: Callable[..., TrainingResult], tmp_path: Path, name: str, complaint: str
) -> None:
    backend = NoopBackend(chat_tokenizer=tiny_tokenizer, max_context=20)
    with pytest.raises(DataError, match=r"\.jsonl:\d+: " + complaint):
        cook(name, "run", backend)
    assert not (tmp_path / "run").exists()
    assert not backend.calls


def test_keys_of_a_pair_that_are_not_read_are_counted(cook: Callable[..., TrainingResult], tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no", "id": 7}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    result = cook("dpo", "run", data=tmp_path / "pairs.jsonl", test_size=0)
    assert RunFolder(result.output).read_manifest()["data"]["ignored_keys"] == {"id": 1}


def test_the_reference_of_a_preference_run_may_be_a_checkpoint(
    cook: Callable[..., TrainingResult], tiny_tokenizer: ChatTokenizer
) -> None:
    backend = NoopBackend(chat_tokenizer=tiny_tokenizer)
    session = backend.start_session(SessionSpec(model="tinsmith/tiny", lora_rank=16, seed=0))
    session.optim_step(0.1)
    path = session.save("reference").result().sampler
    result = cook("dpo", "run", backend, reference=path)
    assert RunFolder(result.output).read_manifest()["data"]["reference"] == path
    assert result.rows[0].loss != pytest.approx(0.693147, abs=1e-3)


def test_a_task_set_is_an_environment_of_the_reinforcement_workflow(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    tasks = QuestionTasks(pairs=[("A digit?", "7"), ("Another?", "3")], score=lambda a, b: float(a == b))
    config = RECIPES["math_rl"].make({"output": tmp_path / "run", **SMALL["math_rl"], "eval_size": 0})
    assert isinstance(config, TrainingConfig)
    result = run_recipe(
        RECIPES["math_rl"],
        config,
        lambda _config, _folder: NoopBackend(chat_tokenizer=tiny_tokenizer),
        adapters={"environment": tasks},
    )
    rows = RunFolder(result.output).rollouts()
    assert {row["prompt"] for row in rows} == {"user: A digit?", "user: Another?"}
    target = {"user: A digit?": "7", "user: Another?": "3"}
    assert all(row["reward"] == float(row["answer"] == target[row["prompt"]]) for row in rows)


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo", "kto"])
def test_ck_41_every_preference_loss_trains_the_pairs_apart(cook: Callable[..., TrainingResult], loss: str) -> None:
    result = cook("dpo", "run", loss=loss, beta=0.5, epochs=4)
    assert result.rows[-1].metrics["accuracy"] == 1.0
    assert result.rows[-1].loss < result.rows[0].loss or loss == "ipo"  # noop's fixed pushes go past ipo's aim
    if loss == "kto":
        assert result.rows[0].loss == pytest.approx(0.5, abs=1e-6)
