"""Rollouts with policies that are written out by hand, on the tokenizer and template of `tinsmith/tiny`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.unit.data.family_templates import tokenizer_of
from tinsmith.data import ChatTemplateRenderer, Message, ParsedAnswer, SegmentRenderer, load_tokenizer, make_renderer
from tinsmith.kitchen.environments import (
    Draw,
    Observation,
    PythonTool,
    QuestionEnvironment,
    QuestionTasks,
    Rollout,
    RolloutLimits,
    SameTask,
    StepResult,
    ToolEnvironment,
    roll_out,
    roll_out_group,
)
from tinsmith.kitchen.evaluators import NumericEvaluator
from tinsmith.kitchen.ports.environment import RolloutLike
from tinsmith.models import TINY

LENGTH = NumericEvaluator()


@pytest.fixture(scope="module")
def renderer() -> ChatTemplateRenderer:
    return ChatTemplateRenderer(load_tokenizer(TINY))


@dataclass
class Script:
    """A policy that says what it is told to, and remembers its prompts."""

    renderer: SegmentRenderer
    answers: list[str]
    cut_last: bool = False
    prompts: list[list[int]] = field(default_factory=list)

    async def __call__(self, prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int) -> Draw:
        await asyncio.sleep(0)
        self.prompts.append(list(prompt))
        text = self.answers.pop(0)
        tokens = list(self.renderer._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.answers or not self.cut_last:
            tokens.append(self.renderer.stop[0])  # type: ignore[arg-type]
        tokens = tokens[:max_tokens]
        return Draw(tokens=tuple(tokens), logprobs=tuple(-0.5 - 0.01 * i for i in range(len(tokens))), weights="w1")


@dataclass
class Guess:
    """Guess a number: three turns of hints at most."""

    number: int
    is_closed: bool = False

    async def start(self) -> Observation:
        return Observation(messages=(Message(role="user", content="Guess."),))

    async def step(self, answer: ParsedAnswer) -> StepResult:
        guess = int(answer.message.content)
        if guess == self.number:
            return StepResult(reward=1.0, metrics={"right": 1.0, "tries": 1.0})
        hint = Message(role="user", content="Higher." if guess < self.number else "Lower.")
        return StepResult(reward=-0.1, done=False, messages=(hint,), metrics={"tries": 1.0})

    async def close(self) -> None:
        self.is_closed = True


def test_a_multi_turn_episode_adds_rewards_and_metrics(renderer: ChatTemplateRenderer) -> None:
    environment = Guess(number=5)
    rollout = asyncio.run(roll_out(environment, Script(renderer, ["3", "9", "5"]), renderer))
    assert rollout.ending == "done"
    assert rollout.reward == pytest.approx(0.8)
    assert rollout.metrics == {"right": 1.0, "tries": 3.0}
    assert [m.content for m in rollout.messages] == ["Guess.", "3", "Higher.", "9", "Lower.", "5"]
    assert rollout.num_splits == 0
    assert environment.is_closed


def test_turns_become_one_datum_whose_advantages_lie_on_drawn_tokens_only(renderer: ChatTemplateRenderer) -> None:
    rollout = asyncio.run(roll_out(Guess(number=5), Script(renderer, ["3", "5"]), renderer))
    (datum,) = rollout.data(2.0)
    first, last = rollout.turns
    tokens = [*last.prompt, *last.draw.tokens]
    assert list(datum.model_input.to_ints()) == tokens[:-1]
    assert datum.loss_fn_inputs["target_tokens"].to_numpy().tolist() == tokens[1:]
    advantages = datum.loss_fn_inputs["advantages"].to_numpy()
    trained = [token for token, value in zip(tokens[1:], advantages, strict=True) if value == 2.0]
    assert trained == [*first.draw.tokens, *last.draw.tokens]
    logprobs = datum.loss_fn_inputs["logprobs"].to_numpy()
    assert logprobs[advantages == 2.0] == pytest.approx([*first.draw.logprobs, *last.draw.logprobs])
    assert not logprobs[advantages == 0.0].any()
    (per_turn,) = rollout.data([1.0, -1.0])
    assert sorted(set(per_turn.loss_fn_inputs["advantages"].to_numpy().tolist())) == [-1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="3 advantages for 2 turns"):
        rollout.data([1.0, 2.0, 3.0])


def test_what_was_drawn_stays_even_where_its_text_encodes_otherwise(renderer: ChatTemplateRenderer) -> None:
    """The number is drawn digit by digit and byte by byte; the next prompt holds these very tokens."""
    tokenizer = renderer._tokenizer
    pieces = [token for letter in "Hello there" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    whole = tokenizer("Hello there", add_special_tokens=False)["input_ids"]
    assert pieces != whole

    @dataclass
    class Talk(Guess):
        async def step(self, answer: ParsedAnswer) -> StepResult:
            return StepResult(done=False, messages=(Message(role="user", content="And?"),))

    async def policy(prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int) -> Draw:
        tokens = (*pieces, renderer.stop[0])
        return Draw(tokens=tokens, logprobs=(0.0,) * len(tokens))

    rollout = asyncio.run(roll_out(Talk(number=0), policy, renderer, RolloutLimits(max_turns=3)))
    assert rollout.ending == "max_turns"
    assert [message.content for message in rollout.messages][1] == "Hello there"
    second = rollout.turns[1].prompt
    start = len(rollout.turns[0].prompt)
    assert list(second[start : start + len(pieces) + 1]) == [*pieces, renderer.stop[0]]


def test_a_format_that_forgets_thoughts_gives_several_data() -> None:
    renderer = make_renderer("qwen3", tokenizer_of("qwen3"))
    script = Script(renderer, ["<think>\nlow\n</think>\n\n3", "<think>\nhigh\n</think>\n\n5"])
    rollout = asyncio.run(roll_out(Guess(number=5), script, renderer))
    assert rollout.reward == pytest.approx(0.9)
    assert [turn.answer.message.thinking for turn in rollout.turns] == ["low", "high"]
    assert rollout.num_splits == 1
    assert len(rollout.data(1.0)) == 2


def test_a_failing_environment_ends_its_own_rollout_only(renderer: ChatTemplateRenderer) -> None:
    environment = Guess(number=5)
    rollout = asyncio.run(roll_out(environment, Script(renderer, ["x"]), renderer))
    assert rollout.ending == "failed"
    assert rollout.error is not None
    assert rollout.error.startswith("ValueError: invalid literal for int()")
    assert rollout.reward == 0.0
    assert environment.is_closed


def test_limits_of_turns_time_and_context(renderer: ChatTemplateRenderer) -> None:
    def play(limits: RolloutLimits) -> Rollout:
        return asyncio.run(roll_out(Guess(number=5), Script(renderer, ["1"] * 9), renderer, limits))

    assert play(RolloutLimits(max_turns=2)).ending == "max_turns"
    assert len(play(RolloutLimits(max_turns=2)).turns) == 2
    first_prompt = len(play(RolloutLimits(max_turns=1)).turns[0].prompt)
    overlong = play(RolloutLimits(max_context=first_prompt + 3, overlong_reward=-1.0))
    assert overlong.ending == "overlong"
    assert overlong.reward == pytest.approx(-1.0)

    async def sleepy(prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int) -> Draw:
        await asyncio.sleep(60)
        raise AssertionError

    environment = Guess(number=5)
    late = asyncio.run(roll_out(environment, sleepy, renderer, RolloutLimits(timeout_s=0.05)))
    assert (late.ending, late.error) == ("timeout", "not done after 0.05 s")
    assert environment.is_closed
    with pytest.raises(ValueError, match="max_turns must be at least 1, not 0"):
        RolloutLimits(max_turns=0)


def test_a_group_plays_at_once_and_may_reward_by_comparison(renderer: ChatTemplateRenderer) -> None:
    @dataclass
    class Contest:
        tags = {"task": "contest"}

        def make(self) -> Sequence[Guess]:
            return [Guess(number=n) for n in (1, 2, 3)]

        async def rewards(self, rollouts: Sequence[RolloutLike]) -> Sequence[float]:
            best = max(rollout.reward for rollout in rollouts)
            return [float(rollout.reward == best) for rollout in rollouts]

    async def policy(prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int) -> Draw:
        return await Script(renderer, ["2"])(prompt, stop, max_tokens)

    group = asyncio.run(roll_out_group(Contest(), policy, renderer, RolloutLimits(max_turns=1)))
    assert group.rewards == pytest.approx((-0.1, 2.0, -0.1))
    assert group.is_informative
    assert group.tags == {"task": "contest"}


def test_tasks_are_found_by_number(renderer: ChatTemplateRenderer) -> None:
    tasks = QuestionTasks(pairs=[("1+1?", "2"), ("2+2?", "4")], score=LENGTH.score, name="sums", fault_penalty=0.25)
    assert len(tasks) == 2
    group = tasks.group(1, 2)
    script = Script(renderer, ["4", "5"], cut_last=True)
    rolled = asyncio.run(roll_out_group(group, script, renderer))
    assert rolled.rewards == (1.0, -0.25)
    assert rolled.tags == {"task": "sums/1"}
    assert rolled.rollouts[0].record()["turn_rewards"] == [1.0]
    with pytest.raises(IndexError, match="task 2 of 2"):
        tasks.group(2, 1)
    with pytest.raises(ValueError, match="size must be at least 1"):
        SameTask(make_one=lambda: QuestionEnvironment(question="", target="", score=LENGTH.score), size=0)


def add(first: int, second: int) -> int:
    """Add two numbers.

    More is said here than the model needs.
    """
    if first > 100:
        raise OverflowError("too large")
    return first + second


def test_a_function_describes_itself_as_a_tool() -> None:
    assert PythonTool.of(add).tool.function == {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"first": {"type": "integer"}, "second": {"type": "integer"}},
            "required": ["first", "second"],
        },
    }

    def bad(values: list[int]) -> None: ...

    with pytest.raises(ValueError, match="parameter 'values' of tool 'bad' must be"):
        PythonTool.of(bad)
    bad.__annotations__["values"] = int | None
    with pytest.raises(ValueError, match="parameter 'values' of tool 'bad' must be"):
        PythonTool.of(bad)


def test_tools_answer_and_faults_go_back_to_the_model() -> None:
    renderer = make_renderer("qwen3_instruct", tokenizer_of("qwen3_instruct"))
    environment = ToolEnvironment(
        question="40 + 2?", target="42", score=LENGTH.score, tools=[PythonTool.of(add)], call_reward=-0.05
    )
    script = Script(
        renderer,
        [
            '<tool_call>\n{"name": "ad", "arguments": {}}\n</tool_call>',
            '<tool_call>\n{"name": "add", "arguments": {"first": 1}}\n</tool_call>',
            '<tool_call>\n{"name": "add", "arguments": {"first": 999, "second": 1}}\n</tool_call>',
            'So\n<tool_call>\n{"name": "add", "arguments": {"first": 40, "second": 2}}\n</tool_call>',
            "It is 42",
        ],
    )
    rollout = asyncio.run(roll_out(environment, script, renderer))
    results = [message.content for message in rollout.messages if message.role == "tool"]
    assert results == [
        "error: there is no tool 'ad'; did you mean 'add'?",
        "error: missing a required argument: 'second'",
        "error: OverflowError: too large",
        "42",
    ]
    assert rollout.reward == pytest.approx(0.95)
    assert rollout.metrics == {"calls": 4.0, "failed_calls": 3.0, "score": 1.0, "faults": 0.0}
    assert rollout.num_splits == 0


def test_an_endless_reward_is_a_failure(renderer: ChatTemplateRenderer) -> None:
    environment = QuestionEnvironment(question="?", target="1", score=lambda answer, target: float("nan"))
    rollout = asyncio.run(roll_out(environment, Script(renderer, ["1"]), renderer))
    assert rollout.ending == "failed"
    assert rollout.error == "ValueError: the reward is nan, not a finite number"


class UnmeasuredEnvironment(QuestionEnvironment):
    async def step(self, answer: ParsedAnswer) -> StepResult:
        return StepResult(reward=1.0, metrics={"speed": float("inf")})


def test_an_endless_metric_is_a_failure_and_its_record_is_json(renderer: ChatTemplateRenderer) -> None:
    environment = UnmeasuredEnvironment(question="?", target="1", score=lambda answer, target: 1.0)
    rollout = asyncio.run(roll_out(environment, Script(renderer, ["1"]), renderer))
    assert rollout.error == "ValueError: the metric 'speed' is inf, not a finite number"
    json.dumps(rollout.record(), allow_nan=False)


def test_an_episode_that_goes_on_needs_something_to_answer() -> None:
    with pytest.raises(ValueError, match="needs a message"):
        StepResult(done=False)
