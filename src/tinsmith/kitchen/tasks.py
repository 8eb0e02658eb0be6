"""Environments that ship: small sums, in one turn or with second tries, and prompts without reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from tinsmith.data import Message
from tinsmith.kitchen.ports import Environment, EnvironmentSource, Outcome

LARGEST_TERM: Final = 20


@dataclass(slots=True)
class Sum(Environment):
    """Reward 1 for the right sum, less `penalty` for each try before it; 0 if no try is right."""

    a: int
    b: int
    tries: int = 1
    penalty: float = 0.0
    used: int = field(default=0, init=False)

    def start(self) -> Sequence[Message]:
        return [Message(role="user", content=f"What is {self.a} + {self.b}?")]

    def step(self, answer: str) -> Outcome:
        self.used += 1
        if answer.strip() == str(self.a + self.b):
            return Outcome(reward=1.0 - self.penalty * (self.used - 1), done=True)
        if self.used == self.tries:
            return Outcome(reward=0.0, done=True)
        again = Message(role="user", content=f"No. What is {self.a} + {self.b}?")
        return Outcome(reward=0.0, done=False, messages=(again,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums(EnvironmentSource):
    seed: int
    num_tasks: int = 48
    """Sums to train on, again and again in the same order; those of negative numbers are others."""
    tries: int = 1
    penalty: float = 0.0

    def episode(self, index: int) -> Environment:
        index = index % self.num_tasks if index >= 0 else index
        rng = Random(f"tinsmith/sums/{self.seed}/{index}")
        return Sum(rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM), self.tries, self.penalty)


@dataclass(frozen=True, slots=True)
class _Prompt(Environment):
    messages: tuple[Message, ...]

    def start(self) -> Sequence[Message]:
        return self.messages

    def step(self, answer: str) -> Outcome:
        return Outcome(reward=0.0, done=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts(EnvironmentSource):
    """Conversations to answer, again and again in the order given. No answer has a reward."""

    prompts: tuple[tuple[Message, ...], ...]

    def episode(self, index: int) -> Environment:
        return _Prompt(self.prompts[index % len(self.prompts)])


ENVIRONMENTS: Final[dict[str, Callable[[int], EnvironmentSource]]] = {
    "addition": lambda seed: Sums(seed=seed),
    "addition_with_retries": lambda seed: Sums(seed=seed, tries=2, penalty=0.5),
}
"""By the name that configs give, from a seed. An adapter for the port `environment` goes before them."""
