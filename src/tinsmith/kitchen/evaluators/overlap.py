"""How much of a reference's wording an answer has: BLEU and ROUGE, by the packages that papers report with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.evaluators.base import TextEvaluator
from tinsmith.kitchen.ports import EvalExample, EvalResult

BleuTokenizer = Literal["13a", "intl", "char", "zh", "none"]
RougeVariant = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BleuEvaluator(TextEvaluator):
    """BLEU (Papineni et al., 2002) by `sacrebleu`, from 0 to 1.

    The score of many answers is that of the corpus, not the mean of the answers' own. One answer's is smoothed, and
    counts only the n-gram orders that it is long enough for.
    """

    metric: ClassVar[str] = "bleu"
    tokenize: BleuTokenizer = "13a"
    ignore_case: bool = False

    def __post_init__(self) -> None:
        self._scorer(single=True)

    def score(self, prediction: str, target: str) -> float:
        return min(1.0, float(self._scorer(single=True).sentence_score(prediction, [target]).score) / 100)

    def evaluate(self, examples: Sequence[EvalExample]) -> EvalResult:
        result = super(BleuEvaluator, self).evaluate(examples)
        targets = [[example.target for example in examples]]
        corpus = self._scorer(single=False).corpus_score([example.prediction for example in examples], targets)
        return replace(result, score=min(1.0, float(corpus.score) / 100))

    def _scorer(self, *, single: bool) -> Any:
        try:
            from sacrebleu.metrics.bleu import BLEU
        except ImportError as error:
            raise _not_installed("bleu", "sacrebleu") from error
        return BLEU(tokenize=self.tokenize, lowercase=self.ignore_case, effective_order=single)


@dataclass(frozen=True, slots=True, kw_only=True)
class RougeEvaluator(TextEvaluator):
    """ROUGE (Lin, 2004) by `rouge-score`: F1 of words (`rouge1`), pairs (`rouge2`) or common subsequences."""

    metric: ClassVar[str] = "rouge"
    variant: RougeVariant = "rougeL"
    stem: bool = True
    """Compare English words by their stems, as papers do."""

    def __post_init__(self) -> None:
        self._scorer()

    def score(self, prediction: str, target: str) -> float:
        return float(self._scorer().score(target, prediction)[self.variant].fmeasure)

    def _scorer(self) -> Any:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise _not_installed("rouge", "rouge-score") from error
        return RougeScorer([self.variant], use_stemmer=self.stem)


def _not_installed(name: str, package: str) -> ConfigError:
    return ConfigError(f"evaluator {name!r} needs the package {package!r}: pip install 'tinsmith[scores]'")
