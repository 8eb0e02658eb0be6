"""One question, one answer, one score: the environment of most benchmarks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tinsmith.data import Message, ParsedAnswer
from tinsmith.kitchen.ports.environment import EnvironmentGroup, Observation, SameTask, StepResult

Score: TypeAlias = Callable[[str, str], float]
"""`score(answer, target)`; the `score` method of every evaluator is one. It may block: it runs in a thread."""


@dataclass(slots=True, kw_only=True)
class QuestionEnvironment:
    """The answer's content is scored; an answer that was cut off or has faults costs `fault_penalty`."""

    question: str
    target: str
    score: Score
    system: str | None = None
    fault_penalty: float = 0.0

    async def start(self) -> Observation:
        system = () if self.system is None else (Message(role="system", content=self.system),)
        return Observation(messages=(*system, Message(role="user", content=self.question)))

    async def step(self, answer: ParsedAnswer) -> StepResult:
        score = await asyncio.to_thread(self.score, answer.message.content, self.target)
        is_clean = answer.ended and not answer.faults
        return StepResult(
            reward=score - (0.0 if is_clean else self.fault_penalty),
            metrics={"score": score, "clean": float(is_clean)},
        )

    async def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionTasks:
    """Pairs of question and target as tasks."""

    pairs: Sequence[tuple[str, str]]
    score: Score
    name: str = "questions"
    system: str | None = None
    fault_penalty: float = 0.0

    def __len__(self) -> int:
        return len(self.pairs)

    def group(self, index: int, size: int) -> EnvironmentGroup:
        if not 0 <= index < len(self.pairs):
            raise IndexError(f"task {index} of {len(self.pairs)}")
        question, target = self.pairs[index]

        def make_one() -> QuestionEnvironment:
            return QuestionEnvironment(
                question=question,
                target=target,
                score=self.score,
                system=self.system,
                fault_penalty=self.fault_penalty,
            )

        return SameTask(make_one=make_one, size=size, tags={"task": f"{self.name}/{index}"})
