"""The reinforcement workflow: tools, stuck, failing and overlong episodes, the penalty on leaving the base model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.family_templates import tokenizer_of
from tinsmith.data import ChatTokenizer, Message, ParsedAnswer
from tinsmith.kitchen import RECIPES, ConfigError, RunFolder, TrainingConfig, TrainingResult, WorkflowError, run_recipe
from tinsmith.kitchen.adapters.noop_training import NoopBackend, NoopPending, NoopSampler
from tinsmith.kitchen.environments import Problem, ProgramTasks, PythonTool, QuestionTasks, SameTask, ToolEnvironment
from tinsmith.kitchen.evaluators import CodeEvaluator, NumericEvaluator
from tinsmith.kitchen.ports import Environment, EnvironmentGroup, Observation, StepResult
from tinsmith.kitchen.tasks import Sums
from tinsmith.types import SampledSequence, SampleResponse, SamplingParams, StopReason

Says = Callable[[str, int], Sequence[tuple[str, StopReason]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script(NoopSampler):
    """Says what `says(prompt, num_samples)` tells it to."""

    says: Says

    def sample(self, prompt: Sequence[int], params: SamplingParams, *, num_samples: int) -> NoopPending[SampleResponse]:
        assert isinstance(params.stop, list)
        drawn = self.says(self.tokenizer.decode(list(prompt)), num_samples)
        return NoopPending(SampleResponse([self._say(text, why, params.stop[0]) for text, why in drawn]), lambda: None)

    def _say(self, text: str, why: StopReason, stop: Any) -> SampledSequence:
        tokens = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], *([stop] if why == "stop" else [])]
        logprobs = np.full(len(tokens), -0.5, dtype=np.float32)
        return SampledSequence(why, tokens_np=np.asarray(tokens, dtype=np.int64), logprobs_np=logprobs)


@dataclass(slots=True)
class ScriptedBackend(NoopBackend):
    says: Says = field(default=lambda prompt, count: [("7", "stop")] * count)

    def sampler(self, session: Any) -> Script:
        return Script(tokenizer=self.tokenizer, text="", weights=session.weights, says=self.says)


def train(environment: Any, backend: NoopBackend, output: Path, **settings: Any) -> TrainingResult:
    fitted = {"num_rollouts": 1, "groups_per_batch": 1, "group_size": 4, "max_tokens": 64, "numerics_gate": False}
    config = RECIPES["reinforcement"].make({"output": output, **fitted, **settings})
    assert isinstance(config, TrainingConfig)
    adapters = {"environment": environment}
    return run_recipe(RECIPES["reinforcement"], config, lambda _config, _folder: backend, adapters=adapters)


def advantages(backend: NoopBackend, call: int = 0) -> list[np.ndarray]:
    """Of each trained sequence, those of drawn tokens; times the number of drawn tokens in the batch."""
    arrays = [datum.loss_fn_inputs["advantages"].to_numpy().astype(np.float64) for datum in backend.data[call]]
    drawn = [array[datum.loss_fn_inputs["logprobs"].to_numpy() != 0] for array, datum in zip(
        arrays, backend.data[call], strict=True)]  # fmt: skip
    return [array * sum(map(len, drawn)) for array in drawn]


def add(first: int, second: int) -> int:
    """Add two numbers."""
    return first + second


@dataclass(frozen=True)
class ToolTasks:
    def group(self, index: int, size: int) -> EnvironmentGroup:
        return SameTask(
            make_one=lambda: ToolEnvironment(
                question="40 + 2?", target="42", score=NumericEvaluator().score, tools=[PythonTool.of(add)]
            ),
            size=size,
        )


def test_ck_42_episodes_with_tools_are_drawn_and_trained_by_the_workflow(tmp_path: Path) -> None:
    """Two of four call the tool, read 42 from it and are right; the others guess."""
    call = '<tool_call>\n{"name": "add", "arguments": {"first": 40, "second": 2}}\n</tool_call>'

    def says(prompt: str, count: int) -> list[tuple[str, StopReason]]:
        if "<tool_response>" in prompt:
            return [("It is 42", "stop")] * count
        assert '"name": "add"' in prompt, "the prompt offers the tool"
        return [(call, "stop"), ("It is 41", "stop")] * (count // 2)

    backend = ScriptedBackend(chat_tokenizer=tokenizer_of("qwen3_instruct"), says=says)
    result = train(ToolTasks(), backend, tmp_path / "run")
    assert result.rows[0].metrics["reward"] == 0.5
    rows = RunFolder(result.output).rollouts()
    assert [row["reward"] for row in rows] == [1.0, 0.0, 1.0, 0.0]
    assert rows[0]["prompt"] == "user: 40 + 2?\nassistant: add(first=40, second=2)\ntool: 42"
    assert rows[0]["metrics"] == {"calls": 1.0, "failed_calls": 0.0, "score": 1.0, "faults": 0.0}
    weights = advantages(backend)
    assert [sorted(set(array.round(6))) for array in weights] == [[0.5], [-0.5], [0.5], [-0.5]]
    both_turns = len(backend.tokenizer(call + "It is 42", add_special_tokens=False)["input_ids"]) + 2
    assert len(weights[0]) == both_turns, "the call and the answer are trained, the tool's words are not"


@dataclass
class Moody(Environment):
    """Its mood follows from what it is told: it waits for ever, breaks, or gives the number as reward."""

    async def start(self) -> Observation:
        return Observation(messages=(Message(role="user", content="?"),))

    async def step(self, answer: ParsedAnswer) -> StepResult:
        match answer.message.content:
            case "wait":
                await asyncio.sleep(60)
            case "break":
                raise OSError("the sandbox is gone")
        return StepResult(reward=float(answer.message.content))


class Moods:
    def group(self, index: int, size: int) -> EnvironmentGroup:
        return SameTask(make_one=Moody, size=size)


def moods(*texts: str) -> Says:
    return lambda prompt, count: [(text, "stop") for text in texts]


def test_ck_42_stuck_and_failed_episodes_are_left_out_and_told(tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    backend = ScriptedBackend(chat_tokenizer=tiny_tokenizer, says=moods("1", "wait", "0", "break"))
    result = train(Moods(), backend, tmp_path / "run", rollout_timeout_s=0.2)
    metrics = result.rows[0].metrics
    assert (metrics["stuck"], metrics["failed"], metrics["reward"]) == (1.0, 1.0, 0.5)
    rows = RunFolder(result.output).rollouts()
    assert [row["ending"] for row in rows] == ["done", "timeout", "done", "failed"]
    assert rows[3]["error"] == "OSError: the sandbox is gone"
    assert [array.round(6).tolist() for array in advantages(backend)] == [[0.5, 0.5], [-0.5, -0.5]]


def test_ck_42_a_round_in_which_every_episode_fails_ends_the_run(tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    backend = ScriptedBackend(chat_tokenizer=tiny_tokenizer, says=moods(*["break"] * 4))
    with pytest.raises(WorkflowError, match=r"every episode of the round failed; .*OSError: the sandbox is gone"):
        train(Moods(), backend, tmp_path / "run")


def test_ck_42_a_sampler_that_fails_ends_the_run_and_is_no_fault_of_an_episode(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    def says(prompt: str, count: int) -> list[tuple[str, StopReason]]:
        raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError, match="the server is gone"):
        train(Moods(), ScriptedBackend(chat_tokenizer=tiny_tokenizer, says=says), tmp_path / "run")


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [("keep", [0.5, 0.5, -0.5, -0.5]), ("zero", [0.75, -0.25, -0.25, -0.25]), ("drop", [0.5, -0.5, -0.5])],
)
def test_ck_42_answers_that_were_cut_off(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path, overlong: str, expected: list[float]
) -> None:
    drawn: list[tuple[str, StopReason]] = [("1", "stop"), ("1", "length"), ("0", "stop"), ("0", "stop")]
    backend = ScriptedBackend(chat_tokenizer=tiny_tokenizer, says=lambda prompt, count: drawn)
    result = train(Moods(), backend, tmp_path / "run", overlong=overlong)
    assert result.rows[0].metrics["overlong"] == 0.25
    assert [round(float(array[0]), 6) for array in advantages(backend)] == expected


def test_ck_42_an_episode_without_room_for_another_answer_is_overlong(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    backend = ScriptedBackend(chat_tokenizer=tiny_tokenizer, says=moods("1", "1", "0", "0"))
    with pytest.raises(WorkflowError, match=r"no episode of the round was answered.*max_context=4"):
        train(Moods(), backend, tmp_path / "run", max_context=4)
    backend.max_context = 5
    with pytest.raises(WorkflowError, match=r"no episode of the round was answered.*max_context=4"):
        train(Moods(), backend, tmp_path / "model")


def test_ck_42_gae_reaches_the_tokens(tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    backend = ScriptedBackend(chat_tokenizer=tiny_tokenizer, says=moods("1", "1", "0", "0"))
    train(Moods(), backend, tmp_path / "run", advantages="gae", gae_gamma=1.0, gae_lambda=0.5)
    right, wrong = 1 - 1 / 3, 0 - 2 / 3
    expected = [[right / 2, right], [right / 2, right], [wrong / 2, wrong], [wrong / 2, wrong]]
    assert [array.tolist() for array in advantages(backend)] == [pytest.approx(row, rel=1e-5) for row in expected]


def test_ck_42_the_penalty_on_leaving_the_base_model_is_per_token_and_centred(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    """Drawn at -0.5 per token, the base scores -3: each log-ratio is 2.5, their mean the KL, their centre 0."""
    backend = ScriptedBackend(chat_tokenizer=tiny_tokenizer, says=moods("1", "1", "0", "0"))
    result = train(Moods(), backend, tmp_path / "run", kl_penalty_coef=0.1)
    assert result.rows[0].metrics["reference_kl"] == pytest.approx(2.5)
    assert [float(array[0]) for array in advantages(backend)] == pytest.approx([0.5, 0.5, -0.5, -0.5])

    class Uneven(ScriptedBackend):
        """Its base model has seen the answer 1."""

        def open_sampler(self, model: str) -> Any:
            one = self.tokenizer("1", add_special_tokens=False)["input_ids"][0]

            class Knowing(NoopSampler):
                def compute_logprobs(self, tokens: Sequence[int]) -> Any:
                    values = [None, *[-0.5 if token == one else -1.5 for token in list(tokens)[1:]]]
                    return NoopPending(values, lambda: None)

            return Knowing(tokenizer=self.tokenizer, text="")

    backend = Uneven(chat_tokenizer=tiny_tokenizer, says=moods("1", "1", "0", "0"))
    result = train(Moods(), backend, tmp_path / "uneven", kl_penalty_coef=0.1)
    kl = 6 * 1.0 / 8  # of eight drawn tokens two are the 1 that the base knows; the others lie a nat above it
    assert result.rows[0].metrics["reference_kl"] == pytest.approx(kl)
    first, last = advantages(backend)[0], advantages(backend)[3]
    assert first.tolist() == pytest.approx([0.5 - 0.1 * (0 - kl), 0.5 - 0.1 * (1 - kl)], rel=1e-5)
    assert last.tolist() == pytest.approx([-0.5 - 0.1 * (1 - kl)] * 2, rel=1e-5)


def test_ck_42_a_task_set_holds_its_last_tasks_out_for_evaluation(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    tasks = QuestionTasks(pairs=[(f"{n} and 1?", "7") for n in range(5)], score=lambda a, b: float(a == b))
    backend = ScriptedBackend(chat_tokenizer=tiny_tokenizer)
    result = train(tasks, backend, tmp_path / "run", num_rollouts=2, groups_per_batch=4, eval_size=2)
    assert result.evaluations == ({"step": 2, "test_reward": 1.0},)
    asked = {row["prompt"] for row in RunFolder(result.output).rollouts()}
    assert asked == {f"user: {n} and 1?" for n in range(3)}
    with pytest.raises(Exception, match="eval_size=5: num_held_out=5 leaves nothing of 5 tasks"):
        train(tasks, backend, tmp_path / "none", eval_size=5)


@pytest.mark.parametrize("seed", range(4))
def test_ck_42_sums_that_are_held_out_are_none_of_those_that_are_trained_on(seed: int) -> None:
    sums = Sums(seed=seed)
    assert not {sums.terms(number) for number in range(96)} & {sums.terms(-number) for number in range(1, 65)}


def test_settings_of_gae_without_gae_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gae_lambda=0.5 needs advantages=gae, not group"):
        RECIPES["reinforcement"].make({"gae_lambda": 0.5})


def test_ck_55_programs_are_run_and_tested_once_each(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    score = CodeEvaluator.score
    monkeypatch.setattr(CodeEvaluator, "score", lambda self, *given: ran.append(given[0]) or score(self, *given))
    tasks = ProgramTasks(
        problem_of=lambda index: Problem(question="Double 21.", tests="assert answer == 42"),
        program_of=lambda answer: f"answer = ({answer})",
    )
    backend = ScriptedBackend(chat_tokenizer=tiny_tokenizer, says=moods("42", "21 * 2", "forty-two", "42"))
    result = train(tasks, backend, tmp_path / "run")
    assert [row["reward"] for row in RunFolder(result.output).rollouts()] == [1.0, 1.0, 0.0, 1.0]
    assert sorted(ran) == ["answer = (21 * 2)", "answer = (42)", "answer = (forty-two)"]
