"""Losses as functions of log-probabilities. All are plain sums over tokens: no averaging, no hidden mask.

With lp the model's log-probability of a target token, q the input `logprobs`, A `advantages`, w `weights` and
r = exp(lp - q) (protocol section 6):

    cross_entropy        -sum w lp
    importance_sampling  -sum r A
    ppo                  -sum min(r A, clamp(r, low, high) A)                     low 0.8, high 1.2
    cispo                -sum stopgrad(clamp(r, low, high)) lp A                  low 0, high 4
    dro                  -sum (lp A - beta/2 (lp - q)^2)                          beta 0.01

Each returns the loss and metrics named `name:reduction`.
"""

# M target token of one request

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = Mapping[str, Tensor]
Config: TypeAlias = Mapping[str, float]
LossFn: TypeAlias = Callable[[Tensor, Inputs, Config], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, the per-token inputs it reads beside `target_tokens`, and its settings with their defaults."""

    fn: LossFn
    inputs: tuple[str, ...]
    defaults: Mapping[str, float] = field(default_factory=dict)


def evaluate(loss: Loss, logprobs_M: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The loss (scalar), its gradient with respect to the log-probabilities `[M]`, and its metrics."""
    leaf_M = logprobs_M.detach().requires_grad_()
    with torch.enable_grad():
        value, metrics = loss.fn(leaf_M, inputs, {**loss.defaults, **config})
        (grad_M,) = torch.autograd.grad(value, leaf_M)
    return value.detach(), grad_M, metrics


def cross_entropy(lp_M: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    weights_M = inputs["weights"]
    return -(lp_M * weights_M).sum(), {"weight:sum": float(weights_M.sum())}


def importance_sampling(lp_M: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    ratio_M = torch.exp(lp_M - inputs["logprobs"])
    return -(ratio_M * inputs["advantages"]).sum(), _ratio_metrics(ratio_M, inputs)


def ppo(lp_M: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    advantages_M = inputs["advantages"]
    ratio_M = torch.exp(lp_M - inputs["logprobs"])
    clipped_M = ratio_M.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    surrogate_M = torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)
    return -surrogate_M.sum(), _ratio_metrics(ratio_M, inputs, clipped_M)


def cispo(lp_M: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    ratio_M = torch.exp(lp_M.detach() - inputs["logprobs"])
    clipped_M = ratio_M.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -(clipped_M * lp_M * inputs["advantages"]).sum(), _ratio_metrics(ratio_M, inputs, clipped_M)


def dro(lp_M: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, dict[str, float]]:
    gap_M = lp_M - inputs["logprobs"]
    objective_M = lp_M * inputs["advantages"] - 0.5 * config["beta"] * gap_M.square()
    return -objective_M.sum(), _ratio_metrics(torch.exp(gap_M), inputs)


def _ratio_metrics(ratio_M: Tensor, inputs: Inputs, clipped_M: Tensor | None = None) -> dict[str, float]:
    """Over the tokens with an advantage; prompt rows carry none and would only dilute the figures."""
    trained_M = inputs["advantages"] != 0
    if not trained_M.any():
        return {}
    ratios = ratio_M.detach()[trained_M]
    metrics = {"ratio:mean": float(ratios.mean()), "ratio:max": float(ratios.max()), "ratio:min": float(ratios.min())}
    if clipped_M is not None:
        metrics["clip_fraction:mean"] = float((clipped_M.detach()[trained_M] != ratios).float().mean())
    return metrics


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, ("weights",)),
    "importance_sampling": Loss(importance_sampling, ("logprobs", "advantages")),
    "ppo": Loss(ppo, ("logprobs", "advantages"), {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": Loss(cispo, ("logprobs", "advantages"), {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": Loss(dro, ("logprobs", "advantages"), {"beta": 0.01}),
}
