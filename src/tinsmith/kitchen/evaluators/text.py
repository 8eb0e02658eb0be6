"""Comparisons with a target: equal, contained, equal numbers, a pattern, words in common."""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal, Overflow
from typing import ClassVar, Final

from tinsmith.kitchen.evaluators.base import TextEvaluator
from tinsmith.types.errors import InvalidInput

_NUMBER: Final = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?![\d/]|[.,]\d))?|[-+]?\.\d+"
)
_FRACTION: Final = re.compile(r"(?<!\d)\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_FINAL: Final = re.compile(r"\\boxed\{([^{}]*)\}|####\s*([^\n]+)|(?i:the (?:final )?answer is):?\s*([^\n]+)")
"""Where an answer says which of its numbers counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatchEvaluator(TextEvaluator):
    """1 where both are equal; white space at the ends never counts."""

    metric: ClassVar[str] = "exact_match"
    ignore_case: bool = False
    ignore_punctuation: bool = False
    """And articles, and how much white space: as SQuAD compares answers."""

    def score(self, prediction: str, target: str) -> float:
        return float(self._plain(prediction) == self._plain(target))

    def _plain(self, text: str) -> str:
        text = text.strip()
        if self.ignore_case:
            text = text.casefold()
        return " ".join(_words(text)) if self.ignore_punctuation else text


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainsEvaluator(TextEvaluator):
    """1 where the target stands anywhere in the answer."""

    metric: ClassVar[str] = "contains"
    ignore_case: bool = True

    def score(self, prediction: str, target: str) -> float:
        if not target.strip():
            raise InvalidInput("an empty target is contained in everything")
        if self.ignore_case:
            prediction, target = prediction.casefold(), target.casefold()
        return float(target.strip() in prediction)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericEvaluator(TextEvaluator):
    r"""1 where the answer's number equals the target's within a tolerance.

    The answer's number is the last in `\\boxed{…}`, after `####`, or after "the answer is"; else the last of all.
    Thousands separators, fractions (`3/4`, `\\frac{3}{4}`) and percent signs (`50%` is 50) are read; exact decimals,
    no floats.
    """

    metric: ClassVar[str] = "numeric"
    absolute: float = 0.0
    relative: float = 1e-6

    def __post_init__(self) -> None:
        if self.absolute < 0 or self.relative < 0:
            raise InvalidInput(f"tolerances must be at least 0, not {self.absolute!r} and {self.relative!r}")

    def score(self, prediction: str, target: str) -> float:
        wanted = last_number(target)
        if wanted is None:
            raise InvalidInput(f"the target {target!r} holds no number")
        found = last_number(prediction)
        if found is None:
            return 0.0
        try:
            allowed = max(Decimal(str(self.absolute)), Decimal(str(self.relative)) * abs(wanted))
            return float(abs(found - wanted) <= allowed)
        except Overflow:  # beyond what decimals reckon with: no tolerance bridges that
            return float(found == wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegexEvaluator(TextEvaluator):
    """With `pattern`, the last match of it in the answer (its first group, if it has one) must equal the target.

    Without, the target itself is the pattern, and the whole answer must match it.
    """

    metric: ClassVar[str] = "regex"
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            _compiled(self.pattern)

    def score(self, prediction: str, target: str) -> float:
        if self.pattern is None:
            return float(_compiled(target).fullmatch(prediction.strip()) is not None)
        found = list(_compiled(self.pattern).finditer(prediction))
        if not found:
            return 0.0
        group = found[-1].group(1 if found[-1].re.groups else 0) or ""
        return float(group.strip() == target.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class F1Evaluator(TextEvaluator):
    """Harmonic mean of precision and recall over words, as SQuAD counts them."""

    metric: ClassVar[str] = "f1"

    def score(self, prediction: str, target: str) -> float:
        said, wanted = Counter(_words(prediction.casefold())), Counter(_words(target.casefold()))
        if not said or not wanted:
            return float(said == wanted)
        common = (said & wanted).total()
        return 2 * common / (said.total() + wanted.total())


def last_number(text: str) -> Decimal | None:
    """The number that an answer ends in, or says is final; `None` if there is none."""
    text = _FRACTION.sub(r"\1/\2", text)
    finals = list(_FINAL.finditer(text))
    if finals:
        said = next(group for group in finals[-1].groups() if group is not None)
        numbers = _NUMBER.findall(said)
        if numbers:
            return _decimal(numbers[0])
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(text: str) -> Decimal | None:
    above, _, below = text.replace(",", "").replace(" ", "").partition("/")
    try:
        value = Decimal(above)
        return value / Decimal(below) if below else value
    except ArithmeticError:
        return None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InvalidInput(f"{pattern!r} is no regular expression: {error}") from error


def _words(text: str) -> list[str]:
    """Without punctuation and articles."""
    plain = text.translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word.casefold() not in ("a", "an", "the")]
