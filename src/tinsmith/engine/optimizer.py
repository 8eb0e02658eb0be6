"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) over one flat vector, step for step as `torch.optim.AdamW`."""

# P all parameters of one adapter

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinsmith.types.params import AdamParams

_CLIP_EPS = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""


@dataclass(slots=True)
class AdamState:
    """First and second moments, fp32 `[P]`, and the number of steps taken since they were zero."""

    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    count: int = 0

    @classmethod
    def fresh(cls, like_P: Tensor) -> AdamState:
        return cls(torch.zeros_like(like_P), torch.zeros_like(like_P))


def adamw_step(weights_P: Tensor, grads_P: Tensor, state: AdamState, params: AdamParams, *, grad_norm: float) -> None:
    """Write one step into `weights_P` and `state`. Scales `grads_P` in place if the norm exceeds the clip."""
    if params.grad_clip_norm > 0:
        grads_P.mul_(min(1.0, params.grad_clip_norm / (grad_norm + _CLIP_EPS)))
    state.count += 1
    state.exp_avg_P.lerp_(grads_P, 1 - params.beta1)
    state.exp_avg_sq_P.mul_(params.beta2).addcmul_(grads_P, grads_P, value=1 - params.beta2)
    correction1 = 1 - params.beta1**state.count
    correction2 = 1 - params.beta2**state.count
    denominator_P = state.exp_avg_sq_P.sqrt().div_(math.sqrt(correction2)).add_(params.eps)
    weights_P.mul_(1 - params.learning_rate * params.weight_decay)
    weights_P.addcdiv_(state.exp_avg_P, denominator_P, value=-params.learning_rate / correction1)
