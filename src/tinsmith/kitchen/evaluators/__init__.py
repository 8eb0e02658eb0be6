"""Scores of answers: against a target, by running code, by asking a judge. All are the `Evaluator` port."""

from tinsmith.kitchen.evaluators.base import TextEvaluator
from tinsmith.kitchen.evaluators.choice import EVALUATORS, make_evaluator
from tinsmith.kitchen.evaluators.code import CodeEvaluator, CodeLimits, CodeResult, run_code
from tinsmith.kitchen.evaluators.judge import JudgeEvaluator
from tinsmith.kitchen.evaluators.overlap import BleuEvaluator, RougeEvaluator
from tinsmith.kitchen.evaluators.text import (
    ContainsEvaluator,
    ExactMatchEvaluator,
    F1Evaluator,
    NumericEvaluator,
    RegexEvaluator,
)

__all__ = [
    "EVALUATORS",
    "BleuEvaluator",
    "CodeEvaluator",
    "CodeLimits",
    "CodeResult",
    "ContainsEvaluator",
    "ExactMatchEvaluator",
    "F1Evaluator",
    "JudgeEvaluator",
    "NumericEvaluator",
    "RegexEvaluator",
    "RougeEvaluator",
    "TextEvaluator",
    "make_evaluator",
    "run_code",
]
