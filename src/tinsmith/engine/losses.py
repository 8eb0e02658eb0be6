"""Losses as functions of log-probabilities. All are plain sums over tokens: no averaging, no hidden mask.

With lp the model's log-probability of a target token, q the input `logprobs`, A `advantages`, w `weights` and
r = exp(lp - q) (protocol section 6):

    cross_entropy        -sum w lp
    importance_sampling  -sum r A
    ppo                  -sum min(r A, clamp(r, low, high) A)                     low 0.8, high 1.2
    cispo                -sum stopgrad(clamp(r, low, high)) lp A                  low 0, high 4
    dro                  -sum (lp A - beta/2 (lp - q)^2)                          beta 0.01
    gspo                 -sum min(s A, clamp(s, low, high) A)                     low 0.8, high 1.2

The ratio s of gspo is that of a whole sequence (a datum), exp(mean of stopgrad(lp) - q where `sequence_ratio_mask` is
not 0); each token has its value and the gradient of its own lp: s = exp(log s + lp - stopgrad(lp)). Its default bounds
are our choice, those of ppo; the service's are not published. `low` and `high` may also be inputs, one value per token.

Each returns the loss and metrics named `name:reduction`.
"""

# M target token of one request, D datum

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

Config: TypeAlias = Mapping[str, float]

_LOG_RATIO_MAX = 80.0
"""A ratio of exp(80) is finite in fp32, and beyond every bound."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a loss reads beside the log-probabilities: the inputs of some datums of one request, flat."""

    per_token: Mapping[str, Tensor]
    """fp32 `[M]` each."""
    lengths: Sequence[int]
    """Target tokens of each datum; they sum to M."""

    def __getitem__(self, name: str) -> Tensor:
        return self.per_token[name]


LossFn: TypeAlias = Callable[[Tensor, LossInputs, Config], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, the per-token inputs it reads beside `target_tokens`, and its settings with their defaults."""

    fn: LossFn
    inputs: tuple[str, ...]
    defaults: Mapping[str, float] = field(default_factory=dict)
    per_token: tuple[str, ...] = ()
    """Settings that datums may give as inputs, one value per token."""


def evaluate(
    loss: Loss, logprobs_M: Tensor, inputs: LossInputs, config: Config
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The loss (scalar), its gradient with respect to the log-probabilities `[M]`, and its metrics."""
    leaf_M = logprobs_M.detach().requires_grad_()
    with torch.enable_grad():
        value, metrics = loss.fn(leaf_M, inputs, {**loss.defaults, **config})
        (grad_M,) = torch.autograd.grad(value, leaf_M)
    return value.detach(), grad_M, metrics


def cross_entropy(lp_M: Tensor, inputs: LossInputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    weights_M = inputs["weights"]
    return -(lp_M * weights_M).sum(), {"weight:sum": float(weights_M.sum())}


def importance_sampling(lp_M: Tensor, inputs: LossInputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    ratio_M = torch.exp(_where_advantage(lp_M - inputs["logprobs"], inputs))
    return -(ratio_M * inputs["advantages"]).sum(), _ratio_metrics(lp_M, ratio_M, inputs)


def ppo(lp_M: Tensor, inputs: LossInputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    return _clipped_surrogate(lp_M, lp_M - inputs["logprobs"], inputs, config)


def cispo(lp_M: Tensor, inputs: LossInputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    ratio_M = torch.exp(lp_M.detach() - inputs["logprobs"])
    clipped_M = _clip(ratio_M, inputs, config)
    return -(clipped_M * lp_M * inputs["advantages"]).sum(), _ratio_metrics(lp_M, ratio_M, inputs, clipped_M)


def dro(lp_M: Tensor, inputs: LossInputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    gap_M = lp_M - inputs["logprobs"]
    objective_M = lp_M * inputs["advantages"] - 0.5 * config["beta"] * gap_M.square()
    return -objective_M.sum(), _ratio_metrics(lp_M, torch.exp(gap_M), inputs)


def gspo(lp_M: Tensor, inputs: LossInputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    own_M = lp_M.detach()
    return _clipped_surrogate(lp_M, _sequence_log_ratio(own_M, inputs) + (lp_M - own_M), inputs, config)


def _clipped_surrogate(
    lp_M: Tensor, log_ratio_M: Tensor, inputs: LossInputs, config: Config
) -> tuple[Tensor, dict[str, float]]:
    advantages_M = inputs["advantages"]
    # beyond its bound an advantage above 0 has no slope, but 0 * inf would be NaN
    bounded_M = torch.where(advantages_M > 0, log_ratio_M.clamp(max=_LOG_RATIO_MAX), log_ratio_M)
    ratio_M = torch.exp(_where_advantage(bounded_M, inputs))
    clipped_M = _clip(ratio_M, inputs, config)
    surrogate_M = torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)
    return -surrogate_M.sum(), _ratio_metrics(lp_M, ratio_M, inputs, clipped_M)


def _where_advantage(log_ratio_M: Tensor, inputs: LossInputs) -> Tensor:
    """0 elsewhere: a token without advantage counts for nothing, whatever its `logprobs` are filled with."""
    return torch.where(inputs["advantages"] != 0, log_ratio_M, 0.0)


def _sequence_log_ratio(lp_M: Tensor, inputs: LossInputs) -> Tensor:
    """Per token, the mean log-ratio of its datum's masked tokens; 0 where the mask is empty."""
    mask_M = inputs["sequence_ratio_mask"] != 0
    gap_M = torch.where(mask_M, lp_M - inputs["logprobs"], 0.0)
    lengths = list(inputs.lengths)
    means = [
        (gap_N.sum() / mask_N.sum().clamp(min=1)).expand(len(gap_N))
        for gap_N, mask_N in zip(gap_M.split(lengths), mask_M.split(lengths), strict=True)
    ]
    return torch.cat(means)


def _clip(ratio_M: Tensor, inputs: LossInputs, config: Config) -> Tensor:
    low, high = (
        inputs.per_token[name] if name in inputs.per_token else torch.tensor(config[name], device=ratio_M.device)
        for name in CLIP
    )
    return ratio_M.clamp(low, high)


def _ratio_metrics(
    lp_M: Tensor, ratio_M: Tensor, inputs: LossInputs, clipped_M: Tensor | None = None
) -> dict[str, float]:
    """Over the tokens with an advantage; prompt rows carry none and would only dilute the figures.

    `approx_kl` is Schulman's k3 of the policy that sampled from the present one: mean of exp(d) - 1 - d, d = lp - q.
    It is never negative, and unbiased where the tokens were sampled from q (http://joschu.net/blog/kl-approx.html).
    `entropy` is the mean of -q: where tokens were sampled from q, an unbiased estimate of its entropy per token. The
    exact one would cost another pass over the logits.
    """
    trained_M = inputs["advantages"] != 0
    if not trained_M.any():
        return {}
    ratios = ratio_M.detach()[trained_M]
    gaps = (lp_M.detach() - inputs["logprobs"])[trained_M]
    metrics = {
        "ratio:mean": float(ratios.mean()),
        "ratio:max": float(ratios.max()),
        "ratio:min": float(ratios.min()),
        "approx_kl:mean": float((torch.expm1(gaps) - gaps).mean()),
        "entropy:mean": -float(inputs["logprobs"][trained_M].mean()),
    }
    if clipped_M is not None:
        metrics["clip_fraction:mean"] = float((clipped_M.detach()[trained_M] != ratios).float().mean())
    return metrics


_POLICY = ("logprobs", "advantages")
CLIP = ("clip_low_threshold", "clip_high_threshold")

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, ("weights",)),
    "importance_sampling": Loss(importance_sampling, _POLICY),
    "ppo": Loss(ppo, _POLICY, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, CLIP),
    "cispo": Loss(cispo, _POLICY, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, CLIP),
    "dro": Loss(dro, _POLICY, {"beta": 0.01}),
    "gspo": Loss(
        gspo, (*_POLICY, "sequence_ratio_mask"), {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, CLIP
    ),
}
