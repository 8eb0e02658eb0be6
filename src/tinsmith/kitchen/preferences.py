"""Losses of preference pairs as functions of two summed log-probabilities, with their gradients.

    dpo    softplus(-m), m = beta (chosen - rejected), each less the reference's       (arXiv 2305.18290)
    ipo    (h - 1 / (2 beta))^2, h as m without beta                                   (arXiv 2310.12036)
    simpo  softplus(-(beta (chosen/|chosen| - rejected/|rejected|) - gamma))           (arXiv 2405.14734)
    orpo   -c + beta softplus(-(odds(c) - odds(r))), c and r per token as in simpo,
           odds(x) = x - log(1 - exp(x))                                               (arXiv 2403.07691)
           with 1 - exp(x) at least 1e-6: log-probabilities in fp32 round to 0 where an answer is all but certain
    kto    (1 - sigmoid(beta (hc - max(0, mean hr))) + 1 - sigmoid(beta (max(0, mean hc) - hr))) / 2,
           hc and hr the log-ratios of chosen and rejected to the reference            (arXiv 2402.01306)

All are means over pairs. KTO's point of comparison is the KL to the reference on answers to other prompts; here, where
pairs are at hand, it is the batch's mean log-ratio of the answers of the other kind, without a gradient of its own.

`accuracy` is the share of pairs with a margin above 0, and a margin is what the loss compares: for dpo, ipo and kto how
much likelier each answer is than to the reference; for simpo and orpo which of the two is likelier per token, a goal
that may be far off where the base model is certain of the rejected answer.
"""

# P pair

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from tinsmith.kitchen.ports import LossGradient
from tinsmith.types import Datum

PreferenceLoss: TypeAlias = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
WITHOUT_REFERENCE: Final = frozenset({"simpo", "orpo"})
LEFT_MIN: Final = 1e-6
"""orpo: the least 1 - exp(x) of an answer, as the odds of a certain one are infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """Summed log-probabilities, float64 `[P]` each; the reference's are 0 where the loss has none."""

    chosen_P: np.ndarray
    rejected_P: np.ndarray
    reference_chosen_P: np.ndarray
    reference_rejected_P: np.ndarray
    chosen_tokens_P: np.ndarray
    rejected_tokens_P: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        found: np.ndarray = (self.chosen_P - self.reference_chosen_P) - (self.rejected_P - self.reference_rejected_P)
        return found

    @property
    def chosen_per_token(self) -> np.ndarray:
        found: np.ndarray = self.chosen_P / self.chosen_tokens_P
        return found

    @property
    def rejected_per_token(self) -> np.ndarray:
        found: np.ndarray = self.rejected_P / self.rejected_tokens_P
        return found

    @property
    def likelier(self) -> float:
        """Share of pairs whose chosen answer is the likelier one per token, whatever the reference says."""
        return float((self.chosen_per_token > self.rejected_per_token).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLoss:
    loss: float
    d_chosen_P: np.ndarray
    """dloss/dchosen."""
    d_rejected_P: np.ndarray
    metrics: dict[str, float]


def preference_loss(kind: PreferenceLoss, scores: PairScores, *, beta: float, gamma: float) -> PairLoss:
    P = len(scores.chosen_P)
    match kind:
        case "dpo":
            margin_P = beta * scores.gap
            loss_P, slope_P = _softplus(-margin_P), -_sigmoid(-margin_P)
            d_chosen_P, d_rejected_P = slope_P * beta, -slope_P * beta
        case "ipo":
            margin_P = scores.gap
            loss_P, slope_P = (margin_P - 1 / (2 * beta)) ** 2, 2 * (margin_P - 1 / (2 * beta))
            d_chosen_P, d_rejected_P = slope_P, -slope_P
        case "simpo":
            own_P = scores.chosen_per_token - scores.rejected_per_token
            margin_P = beta * own_P - gamma
            loss_P, slope_P = _softplus(-margin_P), -_sigmoid(-margin_P)
            d_chosen_P = slope_P * beta / scores.chosen_tokens_P
            d_rejected_P = -slope_P * beta / scores.rejected_tokens_P
            margin_P = beta * own_P
        case "orpo":
            loss_P, d_chosen_P, d_rejected_P, margin_P = _orpo(scores, beta)
        case "kto":
            loss_P, d_chosen_P, d_rejected_P, margin_P = _kto(scores, beta)
    chosen_reward_P, rejected_reward_P = _rewards(kind, scores)
    return PairLoss(
        loss=float(loss_P.mean()),
        d_chosen_P=d_chosen_P / P,
        d_rejected_P=d_rejected_P / P,
        metrics={
            "accuracy": float((margin_P > 0).mean()),
            "margin": float(margin_P.mean()),
            "chosen_reward": float(beta * chosen_reward_P.mean()),
            "rejected_reward": float(beta * rejected_reward_P.mean()),
        },
    )


def _rewards(kind: PreferenceLoss, scores: PairScores) -> tuple[np.ndarray, np.ndarray]:
    """Of chosen and rejected answers, before beta: per token where there is no reference."""
    if kind in WITHOUT_REFERENCE:
        return scores.chosen_per_token, scores.rejected_per_token
    return scores.chosen_P - scores.reference_chosen_P, scores.rejected_P - scores.reference_rejected_P


_Terms: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of every pair: loss, dloss/dchosen, dloss/drejected, margin."""


def _orpo(scores: PairScores, beta: float) -> _Terms:
    chosen_P, rejected_P = scores.chosen_per_token, scores.rejected_per_token
    left_chosen_P = np.maximum(-np.expm1(chosen_P), LEFT_MIN)  # 1 - exp(x)
    left_rejected_P = np.maximum(-np.expm1(rejected_P), LEFT_MIN)
    margin_P = chosen_P - np.log(left_chosen_P) - rejected_P + np.log(left_rejected_P)
    slope_P = -beta * _sigmoid(-margin_P)
    return (
        beta * _softplus(-margin_P) - chosen_P,
        (slope_P / left_chosen_P - 1) / scores.chosen_tokens_P,
        -slope_P / left_rejected_P / scores.rejected_tokens_P,
        margin_P,
    )


def _kto(scores: PairScores, beta: float) -> _Terms:
    chosen_P, rejected_P = scores.chosen_P - scores.reference_chosen_P, scores.rejected_P - scores.reference_rejected_P
    good_P = _sigmoid(beta * (chosen_P - max(0.0, float(rejected_P.mean()))))
    bad_P = _sigmoid(beta * (max(0.0, float(chosen_P.mean())) - rejected_P))
    slope_chosen_P, slope_rejected_P = -beta * good_P * (1 - good_P) / 2, beta * bad_P * (1 - bad_P) / 2
    return 1 - (good_P + bad_P) / 2, slope_chosen_P, slope_rejected_P, beta * (chosen_P - rejected_P)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt as datums; `weights` are 1 on the answer's tokens."""

    chosen: Datum
    rejected: Datum
    source: str


def score_pairs(
    data: Sequence[Datum], logprobs: Sequence[np.ndarray], reference: Sequence[tuple[float, float]]
) -> PairScores:
    """`data` and `logprobs` hold chosen and rejected in turn; `reference` holds both sums of each pair."""
    masks = [(datum.loss_fn_inputs["weights"].to_numpy() != 0).astype(np.float64) for datum in data]
    sums = np.asarray([float((mask * values).sum()) for mask, values in zip(masks, logprobs, strict=True)])
    counts = np.asarray([mask.sum() for mask in masks])
    of_reference = np.asarray(reference, dtype=np.float64).reshape(-1, 2)
    return PairScores(
        chosen_P=sums[::2],
        rejected_P=sums[1::2],
        reference_chosen_P=of_reference[:, 0],
        reference_rejected_P=of_reference[:, 1],
        chosen_tokens_P=counts[::2],
        rejected_tokens_P=counts[1::2],
    )


def make_loss(
    kind: PreferenceLoss, reference: Sequence[tuple[float, float]], *, beta: float, gamma: float
) -> Callable[[Sequence[Datum], Sequence[np.ndarray]], LossGradient]:
    """The loss of one batch, for `forward_backward_custom`."""

    def loss(data: Sequence[Datum], logprobs: Sequence[np.ndarray]) -> LossGradient:
        found = preference_loss(kind, score_pairs(data, logprobs, reference), beta=beta, gamma=gamma)
        slopes = np.stack([found.d_chosen_P, found.d_rejected_P], axis=1).reshape(-1)
        gradients = [
            ((datum.loss_fn_inputs["weights"].to_numpy() != 0) * slope).astype(np.float32)
            for datum, slope in zip(data, slopes, strict=True)
        ]
        return LossGradient(loss=found.loss, gradients=gradients, metrics=found.metrics)

    return loss


def _softplus(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.logaddexp(0.0, x)
    return found


def _sigmoid(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(-np.logaddexp(0.0, -x))
    return found
