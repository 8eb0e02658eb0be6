"""Environments of other packages."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit.kitchen.environments.test_rollouts import Script
from tinsmith.data import ChatTemplateRenderer, DataError, Message, ParsedAnswer, load_tokenizer
from tinsmith.kitchen.environments import (
    Environment,
    GymnasiumTasks,
    ReasoningGymTasks,
    RolloutLimits,
    StepResult,
    VerifiersTasks,
    action_names,
    roll_out,
)
from tinsmith.models import TINY


@pytest.fixture(scope="module")
def renderer() -> ChatTemplateRenderer:
    return ChatTemplateRenderer(load_tokenizer(TINY))


def said(text: str) -> ParsedAnswer:
    return ParsedAnswer(message=Message(role="assistant", content=text), ended=True)


async def answered(environment: Environment, answer: str) -> StepResult:
    await environment.start()
    return await environment.step(said(answer))


def lake() -> Any:
    import gymnasium

    return gymnasium.make("FrozenLake-v1", is_slippery=False, max_episode_steps=8)


def lake_tasks(num_tasks: int = 2) -> GymnasiumTasks:
    return GymnasiumTasks(
        make=lake,
        read_action=action_names({"left": 0, "down": 1, "right": 2, "up": 3}),
        instructions="Cross the lake.",
        describe=lambda cell: f"You are at row {cell // 4}, column {cell % 4}.",
        num_tasks=num_tasks,
        invalid_reward=-0.1,
    )


def play(tasks: GymnasiumTasks, renderer: ChatTemplateRenderer, moves: Sequence[str], **limits: int) -> Any:
    environment = tasks.group(0, 1).make()[0]
    return asyncio.run(roll_out(environment, Script(renderer, list(moves)), renderer, RolloutLimits(**limits)))


def test_a_gymnasium_episode_is_won_in_words(renderer: ChatTemplateRenderer) -> None:
    moves = ["Down.", "I go down", "fly", "right", "not up but right", "down", "right"]
    rollout = play(lake_tasks(), renderer, moves)
    assert rollout.ending == "done"
    assert rollout.reward == pytest.approx(0.9)
    assert rollout.metrics == {"steps": 6.0, "truncated": 0.0, "invalid_actions": 1.0}
    texts = [message.content for message in rollout.messages if message.role == "user"]
    assert texts[0] == "Cross the lake.\n\nYou are at row 0, column 0."
    assert texts[3] == "That is no action: say one of left, down, right, up."


def test_a_truncated_gymnasium_episode_ends(renderer: ChatTemplateRenderer) -> None:
    rollout = play(lake_tasks(), renderer, ["left"] * 20, max_turns=20)
    assert rollout.ending == "done"
    assert rollout.metrics["truncated"] == 1.0
    assert len(rollout.turns) == 8


def test_gymnasium_tasks_are_counted() -> None:
    assert len(lake_tasks(3)) == 3
    with pytest.raises(IndexError, match="task 3 of 3"):
        lake_tasks(3).group(3, 1)
    with pytest.raises(DataError, match="num_tasks must be at least 1"):
        lake_tasks(0)


def test_reasoning_gym_tasks_score_their_own_answers() -> None:
    tasks = ReasoningGymTasks("chain_sum", size=3, seed=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert len(tasks) == 3
    one, two = tasks.group(2, 2).make()
    target = one.target  # type: ignore[attr-defined]
    assert asyncio.run(answered(one, f"So <answer>0</answer>, no, <answer> {target} </answer>")).reward == 1.0
    assert asyncio.run(answered(two, f"<answer>{target}9</answer>")).reward < 1.0
    again = ReasoningGymTasks("chain_sum", size=3, seed=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert again.group(2, 1).make()[0].question == one.question  # type: ignore[attr-defined]


def test_unknown_reasoning_gym_tasks_and_options_are_named() -> None:
    with pytest.raises(DataError, match="no tasks of kind 'chain_sm'; did you mean 'chain_sum'"):
        ReasoningGymTasks("chain_sm", size=1, seed=0)
    with pytest.raises(DataError, match=r"refuses \{'min_term': 2\} for 'chain_sum'"):
        ReasoningGymTasks("chain_sum", size=1, seed=0, min_term=2)


if importlib.util.find_spec("verifiers") is not None:  # its releases pin other packages than ours

    def test_verifiers_tasks_score_with_their_own_weights() -> None:
        vf = importlib.import_module("verifiers.v1")
        tasks = VerifiersTasks(
            [sum_task(vf)(sum_data(vf)(prompt="2+2?", answer="4", system_prompt="Brief."))], name="sums"
        )
        good, bad = tasks.group(0, 2).make()
        result = asyncio.run(answered(good, "4"))
        assert result.reward == 2.0
        assert result.metrics == {"right": 1.0, "length": 1.0}
        assert asyncio.run(answered(bad, "five")).reward == 0.0

    def test_verifiers_tasks_that_need_a_runtime_are_refused() -> None:
        vf = importlib.import_module("verifiers.v1")
        task = sum_task(vf, needs_container=True)(sum_data(vf)(prompt="2+2?", answer="4"))
        with pytest.raises(DataError, match="task 0 of 'sums' needs a container"):
            VerifiersTasks([task], name="sums")


def sum_data(vf: Any) -> Any:
    class Data(vf.TaskData):  # type: ignore[misc]
        answer: str = ""

    return Data


def sum_task(vf: Any, *, needs_container: bool = False) -> Any:
    class Sum(vf.Task):  # type: ignore[misc]
        NEEDS_CONTAINER = needs_container

        @vf.reward(weight=2.0)  # type: ignore[misc]
        async def right(self, trace: Any) -> float:
            return float(trace.last_reply == self.data.answer)

        @vf.metric  # type: ignore[misc]
        async def length(self, trace: Any) -> float:
            return float(len(trace.last_reply))

    return Sum


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("reasoning_gym", "verifiers.v1"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"pip install 'tinsmith\[environments\]'"):
        ReasoningGymTasks("chain_sum", size=1, seed=0)
    with pytest.raises(DataError, match=r"pip install 'tinsmith\[verifiers\]'"):
        VerifiersTasks([])
