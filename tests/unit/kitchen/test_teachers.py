"""Teachers: one or several, their mixture, and their distributions as training data."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from tinsmith.data import ChatTokenizer, RenderError
from tinsmith.kitchen import RECIPES, ConfigError, RunFolder, TrainingConfig, TrainingResult, run_recipe
from tinsmith.kitchen.adapters.noop_training import NoopBackend, NoopPending
from tinsmith.kitchen.distilled import DistilledDataset, TeacherAnswer
from tinsmith.kitchen.ports import SessionSpec
from tinsmith.kitchen.reference import Reference


@dataclass(frozen=True)
class Fixed:
    """A model whose next token is always distributed so."""

    distribution: dict[int, float]

    def compute_logprobs(self, tokens: Sequence[int]) -> Any:
        return NoopPending([None, *[math.log(self.distribution[token]) for token in tokens[1:]]], lambda: None)

    def topk_logprobs(self, tokens: Sequence[int], k: int) -> Any:
        row = sorted(((t, math.log(p)) for t, p in self.distribution.items()), key=lambda item: -item[1])[:k]
        return NoopPending([None, *[row] * (len(tokens) - 1)], lambda: None)


ONE, OTHER = Fixed({1: 0.8, 2: 0.1, 3: 0.1}), Fixed({1: 0.2, 2: 0.2, 3: 0.6})


def test_ck_43_a_mixture_of_teachers_is_the_mean_of_their_distributions() -> None:
    mixed = Reference(samplers=(ONE, OTHER), weights=(0.75, 0.25))  # type: ignore[arg-type]
    found = asyncio.run(mixed.logprobs([9, 1, 2, 3], task=0))
    assert np.exp(found) == pytest.approx([0.65, 0.125, 0.225])
    (row,) = asyncio.run(mixed.top_k([9, 1], 2, task=0))
    assert row == [(1, pytest.approx(0.65)), (3, pytest.approx(0.75 * 0 + 0.25 * 0.6))]
    shares = mixed.answering(0, 400, Random(0))
    assert [sampler for sampler, _ in shares] == [ONE, OTHER]
    assert shares[0][1] == pytest.approx(300, abs=40)
    assert shares[0][1] + shares[1][1] == 400


def test_ck_43_a_prompt_with_a_teacher_of_its_own_is_scored_by_that_one_alone() -> None:
    own = Reference(samplers=(ONE, OTHER), weights=(0.5, 0.5), of_prompt=(1, 0))  # type: ignore[arg-type]
    for task, probability in ((0, 0.2), (1, 0.8), (2, 0.2)):
        assert np.exp(asyncio.run(own.logprobs([9, 1], task=task))) == pytest.approx([probability])
        assert own.answering(task, 3, Random(0)) == [(OTHER if task % 2 == 0 else ONE, 3)]


def test_ck_43_top_k_targets_are_the_teacher_s_distribution_on_the_answer() -> None:
    answer = TeacherAnswer(
        prompt="", text="", tokens=(5, 6, 7, 8), num_prompt=2, top_k=([(7, 0.6), (3, 0.2)], [(8, 0.5)])
    )
    (datum,), num_trained = DistilledDataset(answers=(answer,)).data([0])
    assert num_trained == 2
    assert list(datum.model_input.to_ints()) == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].to_numpy().tolist() == [[0, 0], [7, 3], [8, 0]]
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    assert weights.tolist() == [[0, 0], pytest.approx([0.375, 0.125]), [0.5, 0]]


def cook(name: str, backend: NoopBackend, output: Path, **settings: Any) -> TrainingResult:
    config = RECIPES[name].make({"output": output, **settings})
    assert isinstance(config, TrainingConfig)
    return run_recipe(RECIPES[name], config, lambda _config, _folder: backend)


@pytest.fixture
def two_teachers(tiny_tokenizer: ChatTokenizer) -> tuple[NoopBackend, str, str]:
    """A backend that holds two checkpoints, after one step and after five: the second scores higher."""
    backend = NoopBackend(chat_tokenizer=tiny_tokenizer)
    paths = []
    for steps in (1, 5):
        session = backend.start_session(SessionSpec(model="tinsmith/tiny", lora_rank=8, seed=0))
        for _ in range(steps):
            session.optim_step(0.1)
        paths.append(session.save("teacher").result().sampler)
    return backend, paths[0], paths[1]


def test_ck_43_records_choose_their_teachers(two_teachers: tuple[NoopBackend, str, str], tmp_path: Path) -> None:
    backend, first, second = two_teachers
    lines = [{"prompt": f"Say {n}.", "completion": "x", "teacher": 1 + n % 2} for n in range(4)]
    data = tmp_path / "talk.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = {
        "data": data, "teacher": f"{first},{second}", "num_rollouts": 2, "groups_per_batch": 4, "group_size": 2,
    }  # fmt: skip
    mixed = cook("distillation", backend, tmp_path / "mixed", teacher_weights="3,1", **settings)
    own = cook("distillation", backend, tmp_path / "own", teacher_of="record", **settings)
    base, taught = 3.0, [3.0 * math.exp(-0.1 * steps) for steps in (1, 5)]
    each = [base - level for level in taught]
    assert own.evaluations[0]["teacher_kl"] == pytest.approx(-sum(each) / 2)
    mixture = math.log(0.75 * math.exp(-taught[0]) + 0.25 * math.exp(-taught[1]))
    assert mixed.evaluations[0]["teacher_kl"] == pytest.approx(-base - mixture)
    data.write_text(json.dumps({**lines[0], "teacher": 3}) + "\n")
    with pytest.raises(Exception, match=r"talk.jsonl:1: teacher=3 is no number of a teacher, from 1 to 2"):
        cook("distillation", backend, tmp_path / "bad", teacher_of="record", **settings)


@pytest.mark.parametrize("name", ["distillation", "off_policy_distillation"])
@pytest.mark.parametrize(
    ("messages", "tools", "what"),
    [
        ([{"role": "user", "content": "a"}], [{"name": "look"}], "tools"),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
                {"role": "tool", "content": "b"},
            ],
            None,
            "tool calls",
        ),
    ],
)
def test_ck_43_tools_are_a_part_of_the_prompt(
    two_teachers: tuple[NoopBackend, str, str], tmp_path: Path, name: str, messages: Any, tools: Any, what: str
) -> None:
    backend, teacher, _ = two_teachers
    data = tmp_path / "talk.jsonl"
    answer = {"role": "assistant", "content": "c"}
    data.write_text(json.dumps({"messages": [*messages, answer], "tools": tools}) + "\n")
    with pytest.raises(RenderError, match=rf"talk.jsonl:1: the chat template has no place for {what}"):
        cook(name, backend, tmp_path / "run", data=data, teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_ck_43_off_policy_distillation_learns_the_teacher_s_distribution(
    two_teachers: tuple[NoopBackend, str, str], tmp_path: Path
) -> None:
    backend, first, second = two_teachers
    result = cook(
        "off_policy_distillation", backend, tmp_path / "run", teacher=f"{first},{second}", top_k=3, epochs=1,
        batch_size=48,
    )  # fmt: skip
    targets = backend.data[0][0].loss_fn_inputs["target_tokens"].to_numpy()
    assert targets.shape[1] == 3
    assert result.rows[-1].loss < result.rows[0].loss
    assert RunFolder(result.output).read_manifest()["data"]["teacher"] == f"{first},{second}"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"teacher": "a,b", "teacher_weights": "1"}, "teacher_weights='1' must be a positive number for each of 2"),
        ({"teacher": "a,b", "teacher_weights": "1,x"}, "teacher_weights='1,x' must be a positive number"),
        ({"teacher": "a,,b"}, "teacher='a,,b' names nothing between two commas"),
        ({"teacher": "a", "teacher_of": "record"}, "teacher_of='record' needs several teachers"),
    ],
)
def test_teachers_that_do_not_fit_together_are_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        RECIPES["distillation"].make(settings)
