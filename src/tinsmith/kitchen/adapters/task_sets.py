"""The environment port over task sets: `tinsmith.kitchen.environments` in the reinforcement workflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinsmith.data import Message, ParsedAnswer
from tinsmith.kitchen import environments
from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.ports import Environment, EnvironmentSource, Outcome


@dataclass(frozen=True, slots=True)
class TaskSetEnvironment(Environment):
    """One episode of a task set's. Raises `ConfigError` if it offers tools, which rollouts of workflows do not call."""

    inner: environments.Environment

    async def start(self) -> Sequence[Message]:
        seen = await self.inner.start()
        if seen.tools:
            raise ConfigError("an environment with tools needs roll_out of tinsmith.kitchen.environments")
        return seen.messages

    async def step(self, answer: str) -> Outcome:
        parsed = ParsedAnswer(message=Message(role="assistant", content=answer), ended=True)
        result = await self.inner.step(parsed)
        if result.done:
            await self.inner.close()
        return Outcome(reward=result.reward, done=result.done, messages=result.messages)


@dataclass(frozen=True, slots=True)
class TaskSetSource(EnvironmentSource):
    """Tasks of a set again and again; negative numbers, which are held out, come from `held_out`.

    Rewards that a group gives once all have ended are not asked for.
    """

    tasks: environments.TaskSet
    held_out: environments.TaskSet | None = None

    def episode(self, index: int) -> Any:
        tasks = self.tasks if index >= 0 else self.held_out
        if tasks is None:
            raise ConfigError("eval_size needs held-out tasks; give TaskSetSource a second task set")
        (inner,) = tasks.group(index % len(tasks), 1).make()
        return TaskSetEnvironment(inner)
