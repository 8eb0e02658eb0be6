"""Gymnasium environments, played in words: observations described, actions read from answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tinsmith.data import DataError, Message, ParsedAnswer
from tinsmith.kitchen.ports.environment import EnvironmentGroup, Observation, SameTask, StepResult

Describe: TypeAlias = Callable[[Any], str]
ReadAction: TypeAlias = Callable[[str], Any]
"""Raises `ValueError` for an answer that is no action; its message goes to the policy."""


def action_names(names: Mapping[str, Any]) -> ReadAction:
    """Actions by name: the last name that stands in the answer as a word counts."""
    if not names:
        raise ValueError("no names of actions")
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, names)) + r")\b", re.IGNORECASE)
    by_name = {name.casefold(): action for name, action in names.items()}

    def read(answer: str) -> Any:
        found = pattern.findall(answer)
        if not found:
            raise ValueError(f"say one of {', '.join(names)}")
        return by_name[found[-1].casefold()]

    return read


@dataclass(slots=True, kw_only=True)
class GymnasiumEnvironment:
    """One episode. `make` opens the environment (`lambda: gymnasium.make("FrozenLake-v1")`); nothing is imported here.

    An answer that is no action costs `invalid_reward` and is told why; it does not move the environment. A truncated
    episode ends like a terminated one, with the metric `truncated`.
    """

    make: Callable[[], Any]
    read_action: ReadAction
    instructions: str
    describe: Describe = str
    seed: int | None = None
    invalid_reward: float = 0.0
    _inner: Any = field(default=None, init=False, repr=False)

    async def start(self) -> Observation:
        self._inner = await asyncio.to_thread(self.make)
        seen, _ = await asyncio.to_thread(self._inner.reset, seed=self.seed)
        return Observation(messages=(Message(role="user", content=f"{self.instructions}\n\n{self.describe(seen)}"),))

    async def step(self, answer: ParsedAnswer) -> StepResult:
        try:
            action = self.read_action(answer.message.content)
        except ValueError as error:
            told = Message(role="user", content=f"That is no action: {error}.")
            return StepResult(
                reward=self.invalid_reward, done=False, messages=(told,), metrics={"invalid_actions": 1.0}
            )
        seen, reward, terminated, truncated, _ = await asyncio.to_thread(self._inner.step, action)
        done = bool(terminated or truncated)
        return StepResult(
            reward=float(reward),
            done=done,
            messages=() if done else (Message(role="user", content=self.describe(seen)),),
            metrics={"steps": 1.0, "truncated": float(truncated and not terminated)},
        )

    async def close(self) -> None:
        if self._inner is not None:
            await asyncio.to_thread(self._inner.close)


@dataclass(frozen=True, slots=True, kw_only=True)
class GymnasiumTasks:
    """One environment under many seeds: task i begins with seed `first_seed + i`, the same for a whole group."""

    make: Callable[[], Any]
    read_action: ReadAction
    instructions: str
    num_tasks: int
    describe: Describe = str
    first_seed: int = 0
    invalid_reward: float = 0.0
    name: str = "gymnasium"

    def __post_init__(self) -> None:
        if self.num_tasks < 1:
            raise DataError(f"num_tasks must be at least 1, not {self.num_tasks!r}")

    def __len__(self) -> int:
        return self.num_tasks

    def group(self, index: int, size: int) -> EnvironmentGroup:
        if not 0 <= index < self.num_tasks:
            raise IndexError(f"task {index} of {self.num_tasks}")

        def make_one() -> GymnasiumEnvironment:
            return GymnasiumEnvironment(
                make=self.make,
                read_action=self.read_action,
                instructions=self.instructions,
                describe=self.describe,
                seed=self.first_seed + index,
                invalid_reward=self.invalid_reward,
            )

        return SameTask(make_one=make_one, size=size, tags={"task": f"{self.name}/{index}"})
