"""The environment protocol: what is first seen, what an answer leads to, and where episodes come from.

An environment lives for one episode. It speaks in messages, never in tokens: rendering, sampling and reading answers
back is the rollout's work, so an environment fits every model and every backend.

    EnvironmentSource   groups by any number; the port `environment` of workflows
    TaskSet             groups by number, finitely many; `TaskSource` makes a source of one
    EnvironmentGroup    episodes that are compared with each other
    Environment         one episode
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tinsmith.data import Message, ParsedAnswer, Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the policy sees before its first answer."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    reward: float = 0.0
    """Of this answer; an episode's reward is the sum over its answers."""
    done: bool = True
    messages: tuple[Message, ...] = ()
    """What the policy sees next, after its own answer; there must be some unless the episode is done."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Added to those of the episode's other steps."""

    def __post_init__(self) -> None:
        if not self.done and not self.messages:
            raise ValueError("an episode that goes on needs a message for the policy to answer")


class Environment(Protocol):
    """One episode. Methods are called in order, by one rollout, never at the same time.

    Another one, made from the same number, goes the same way if it is given the same answers.
    """

    async def start(self) -> Observation: ...

    async def step(self, answer: ParsedAnswer) -> StepResult:
        """Raises nothing for a bad answer: that is what rewards are for. What it raises ends the rollout as failed."""

    async def close(self) -> None:
        """Called once on every path, also after a failure."""
        return


class EnvironmentGroup(Protocol):
    """Episodes that are compared with each other, usually of one task."""

    @property
    def tags(self) -> Mapping[str, str]:
        """What to report the group under: the task's name, its source."""

    def make(self) -> Sequence[Environment]:
        """Fresh environments, one per rollout."""

    async def rewards(self, rollouts: Sequence[RolloutLike]) -> Sequence[float]:
        """What each rollout earns beside its own rewards, once all have ended; in the order of `make`."""


class RolloutLike(Protocol):
    """What a group sees of its rollouts."""

    @property
    def messages(self) -> tuple[Message, ...]: ...

    @property
    def reward(self) -> float: ...


class TaskSet(Protocol):
    """Groups by number, the same for the same number: what a data set is to supervised training."""

    def __len__(self) -> int: ...

    def group(self, index: int, size: int) -> EnvironmentGroup:
        """`size` episodes of task `index`. Raises `IndexError`."""


class EnvironmentSource(Protocol):
    """Groups without end: the port `environment`.

    The same number is the same task, on every machine. Negative numbers are held out: they are never trained on.
    """

    def group(self, index: int, size: int) -> EnvironmentGroup:
        """`size` episodes of task `index`. Raises `IndexError` for a negative number that it does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SameTask:
    """A group of equal environments without rewards of its own."""

    make_one: Callable[[], Environment]
    size: int
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size!r}")

    def make(self) -> Sequence[Environment]:
        return [self.make_one() for _ in range(self.size)]

    async def rewards(self, rollouts: Sequence[RolloutLike]) -> Sequence[float]:
        return [0.0] * len(rollouts)
