"""Evaluators that compare texts."""

from __future__ import annotations

from collections.abc import Sequence

from tinsmith.kitchen.ports import EvalExample, EvalResult, Evaluator
from tinsmith.types.errors import InvalidInput


class ExactMatch(Evaluator):
    """1 where prediction and target are equal, white space at the ends aside."""

    def evaluate(self, examples: Sequence[EvalExample]) -> EvalResult:
        if not examples:
            raise InvalidInput("there are no examples to evaluate")
        scores = tuple(float(example.prediction.strip() == example.target.strip()) for example in examples)
        return EvalResult(metric="exact_match", score=sum(scores) / len(scores), scores=scores)

    def generate_report(self, result: EvalResult) -> str:
        right = sum(1 for score in result.scores if score == 1)
        row = f"| {result.metric} | {result.score:.1%} | {right}/{len(result.scores)} |"
        return f"| metric | score | examples |\n|---|---|---|\n{row}\n"
