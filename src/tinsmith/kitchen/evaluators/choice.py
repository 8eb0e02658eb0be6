"""Evaluators by name, as recipes choose them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Final

from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.evaluators.base import TextEvaluator
from tinsmith.kitchen.evaluators.code import CodeEvaluator
from tinsmith.kitchen.evaluators.judge import JudgeEvaluator
from tinsmith.kitchen.evaluators.overlap import BleuEvaluator, RougeEvaluator
from tinsmith.kitchen.evaluators.text import (
    ContainsEvaluator,
    ExactMatchEvaluator,
    F1Evaluator,
    NumericEvaluator,
    RegexEvaluator,
)

EVALUATORS: Final[Mapping[str, Callable[..., TextEvaluator]]] = {
    "exact_match": ExactMatchEvaluator,
    "contains": ContainsEvaluator,
    "numeric": NumericEvaluator,
    "regex": RegexEvaluator,
    "f1": F1Evaluator,
    "bleu": BleuEvaluator,
    "rouge": RougeEvaluator,
    "code_exec": CodeEvaluator,
    "llm_judge": JudgeEvaluator,
}


def make_evaluator(name: str, **options: Any) -> TextEvaluator:
    """Raises `ConfigError` for an unknown name or option, with the nearest valid one."""
    if name not in EVALUATORS:
        raise ConfigError(
            f"unknown evaluator {name!r}; {_hint(name, EVALUATORS)}the evaluators are {_list(EVALUATORS)}"
        )
    known = inspect.signature(EVALUATORS[name]).parameters
    for option in options:
        if option not in known:
            hint = _hint(option, known)
            raise ConfigError(f"evaluator {name!r} has no option {option!r}; {hint}the options are {_list(known)}")
    try:
        return EVALUATORS[name](**options)
    except TypeError as error:
        raise ConfigError(f"evaluator {name!r}: {error}") from error


def _hint(name: str, valid: Mapping[str, Any]) -> str:
    near = get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _list(valid: Mapping[str, Any]) -> str:
    return ", ".join(valid)
