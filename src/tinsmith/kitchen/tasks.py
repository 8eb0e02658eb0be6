"""Environments that ship: small sums, in one turn or with second tries, and prompts without reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Final

from tinsmith.data import Conversation, Message, ParsedAnswer
from tinsmith.kitchen.environments.programs import Problem, ProgramTasks
from tinsmith.kitchen.ports import (
    Environment,
    EnvironmentGroup,
    EnvironmentSource,
    Observation,
    SameTask,
    StepResult,
)

LARGEST_TERM: Final = 20


@dataclass(slots=True)
class Sum(Environment):
    """Reward 1 for the right sum, less `penalty` for each try before it; 0 if no try is right."""

    a: int
    b: int
    tries: int = 1
    penalty: float = 0.0
    used: int = field(default=0, init=False)

    async def start(self) -> Observation:
        return Observation(messages=(Message(role="user", content=f"What is {self.a} + {self.b}?"),))

    async def step(self, answer: ParsedAnswer) -> StepResult:
        self.used += 1
        if answer.message.content.strip() == str(self.a + self.b):
            return StepResult(reward=1.0 - self.penalty * (self.used - 1))
        if self.used == self.tries:
            return StepResult()
        again = Message(role="user", content=f"No. What is {self.a} + {self.b}?")
        return StepResult(done=False, messages=(again,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums(EnvironmentSource):
    seed: int
    num_tasks: int = 48
    """Sums to train on, again and again in the same order; those of negative numbers are none of them."""
    tries: int = 1
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.num_tasks < (LARGEST_TERM + 1) ** 2:
            raise ValueError(f"num_tasks={self.num_tasks} leaves no sums to hold out, or none to train on")

    def terms(self, index: int) -> tuple[int, int]:
        if index >= 0:
            return next(self._draws(index % self.num_tasks))
        trained = {self.terms(number) for number in range(self.num_tasks)}
        return next(terms for terms in self._draws(index) if terms not in trained)

    def _draws(self, index: int) -> Iterator[tuple[int, int]]:
        rng = Random(f"tinsmith/sums/{self.seed}/{index}")
        while True:
            yield rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)

    def group(self, index: int, size: int) -> EnvironmentGroup:
        a, b = self.terms(index)
        return SameTask(make_one=lambda: Sum(a, b, self.tries, self.penalty), size=size, tags={"task": f"sums/{index}"})


def sum_expressions(seed: int) -> ProgramTasks:
    """The same sums, answered by a Python expression that is run: `12` and `5 + 7` are both right."""
    sums = Sums(seed=seed)

    def problem(index: int) -> Problem:
        a, b = sums.terms(index)
        return Problem(question=f"What is {a} + {b}?", tests=f"assert answer == {a + b}")

    return ProgramTasks(problem_of=problem, program_of=lambda answer: f"answer = ({answer.strip()})")


@dataclass(frozen=True, slots=True)
class _Prompt(Environment):
    prompt: Conversation

    async def start(self) -> Observation:
        return Observation(messages=self.prompt.messages, tools=self.prompt.tools)

    async def step(self, answer: ParsedAnswer) -> StepResult:
        return StepResult()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts(EnvironmentSource):
    """Conversations to answer, again and again in the order given. No answer has a reward."""

    prompts: tuple[Conversation, ...]

    def group(self, index: int, size: int) -> EnvironmentGroup:
        prompt = self.prompts[index % len(self.prompts)]
        return SameTask(make_one=lambda: _Prompt(prompt), size=size, tags={"task": f"prompts/{index}"})


ENVIRONMENTS: Final[dict[str, Callable[[int], EnvironmentSource]]] = {
    "addition": lambda seed: Sums(seed=seed),
    "addition_with_retries": lambda seed: Sums(seed=seed, tries=2, penalty=0.5),
    "addition_in_python": sum_expressions,
}
"""By the name that configs give, from a seed. An adapter for the port `environment` goes before them."""
