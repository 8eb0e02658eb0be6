"""Answers that are programs: run in a process with limits, rewarded by the tests that they pass."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from tinsmith.data import Message, ParsedAnswer
from tinsmith.kitchen.evaluators import CodeEvaluator, CodeLimits
from tinsmith.kitchen.ports.environment import Environment, EnvironmentGroup, Observation, SameTask, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    question: str
    tests: str
    """`assert` lines that run after the answer's code."""


class ProgramRunner:
    """Scores programs, `max_running` at once; the same program with the same tests is run once."""

    def __init__(self, limits: CodeLimits | None = None, *, max_running: int | None = None) -> None:
        self._evaluator = CodeEvaluator(limits=limits or CodeLimits())
        self._gate = asyncio.Semaphore(max_running or os.cpu_count() or 1)
        self._scores: dict[tuple[str, str], asyncio.Future[float]] = {}

    async def score(self, program: str, tests: str) -> float:
        """From 0 to 1. Blocks no event loop. To be called from one loop."""
        key = (program, tests)
        if key not in self._scores:
            self._scores[key] = asyncio.ensure_future(self._run(program, tests))
        return await asyncio.shield(self._scores[key])

    async def _run(self, program: str, tests: str) -> float:
        async with self._gate:
            return await asyncio.to_thread(self._evaluator.score, program, tests)


def as_it_is(answer: str) -> str:
    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramEnvironment(Environment):
    problem: Problem
    runner: ProgramRunner
    program_of: Callable[[str], str] = as_it_is

    async def start(self) -> Observation:
        return Observation(messages=(Message(role="user", content=self.problem.question),))

    async def step(self, answer: ParsedAnswer) -> StepResult:
        score = await self.runner.score(self.program_of(answer.message.content), self.problem.tests)
        return StepResult(reward=score, metrics={"passed": score})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramTasks:
    """A source of problems by number. `program_of` makes a program of an answer: of an expression, say."""

    problem_of: Callable[[int], Problem]
    program_of: Callable[[str], str] = as_it_is
    limits: CodeLimits = field(default_factory=CodeLimits)
    _runners: dict[asyncio.AbstractEventLoop, ProgramRunner] = field(default_factory=dict, init=False, repr=False)

    def group(self, index: int, size: int) -> EnvironmentGroup:
        """To be called where the episodes will run: in an event loop."""
        runner = self._runners.setdefault(asyncio.get_running_loop(), ProgramRunner(self.limits))
        problem = self.problem_of(index)
        return SameTask(
            make_one=lambda: ProgramEnvironment(problem=problem, runner=runner, program_of=self.program_of),
            size=size,
            tags={"task": f"programs/{index}"},
        )
