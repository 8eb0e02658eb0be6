"""An evaluator by its score of one answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from tinsmith.kitchen.ports import EvalExample, EvalResult, Evaluator
from tinsmith.types.errors import InvalidInput


class TextEvaluator(Evaluator, ABC):
    __slots__ = ()
    metric: ClassVar[str]

    @abstractmethod
    def score(self, prediction: str, target: str) -> float:
        """From 0 to 1. Any prediction has a score; raises `InvalidInput` for a target that is none."""

    def evaluate(self, examples: Sequence[EvalExample]) -> EvalResult:
        """Raises `InvalidInput` for no examples, and for a target that cannot be compared with, by its number."""
        if not examples:
            raise InvalidInput("there are no examples to evaluate")
        scores = []
        for number, example in enumerate(examples, start=1):
            try:
                scores.append(self.score(example.prediction, example.target))
            except InvalidInput as error:
                raise InvalidInput(f"example {number}: {error}") from error
        return EvalResult(metric=self.metric, score=sum(scores) / len(scores), scores=tuple(scores))

    def generate_report(self, result: EvalResult) -> str:
        right = sum(1 for score in result.scores if score == 1)
        row = f"| {result.metric} | {result.score:.1%} | {right}/{len(result.scores)} |"
        return f"| metric | score | fully right |\n|---|---|---|\n{row}\n"
