"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) over flat vectors, step for step as `torch.optim.AdamW`."""

# P all parameters of one adapter

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinsmith.types.params import AdamParams

_CLIP_EPS = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""
_LEAST_EPS = torch.finfo(torch.float32).tiny ** 0.5
"""The squares of smaller gradients are zero in fp32: divided by less, they would make steps of any size, or NaN."""


@dataclass(slots=True)
class AdamState:
    """First and second moments, fp32 `[P]`, and the number of steps taken since they were zero."""

    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    count: int = 0

    @classmethod
    def fresh(cls, like_P: Tensor) -> AdamState:
        return cls(torch.zeros_like(like_P), torch.zeros_like(like_P))


@dataclass(frozen=True, slots=True)
class AdamStep:
    """One vector's step that is due. Vectors of one call must not share memory."""

    weights_P: Tensor
    grads_P: Tensor
    state: AdamState
    params: AdamParams
    grad_norm: float
    """Euclidean norm of `grads_P`."""


def adamw_steps(steps: Sequence[AdamStep]) -> None:
    """Write one step each into `weights_P` and `state`, in one pass over all vectors of equal settings.

    Scales `grads_P` in place where the norm exceeds the clip.
    """
    together: dict[tuple[float, ...], list[AdamStep]] = {}
    for step in steps:
        _clip(step)
        params = step.params
        settings = (params.learning_rate, params.beta1, params.beta2, params.eps, params.weight_decay)
        together.setdefault(settings, []).append(step)
    for group in together.values():
        _step_together(group)


def _clip(step: AdamStep) -> None:
    limit = step.params.grad_clip_norm
    if limit > 0 and (factor := limit / (step.grad_norm + _CLIP_EPS)) < 1:
        step.grads_P.mul_(factor)


def _step_together(steps: Sequence[AdamStep]) -> None:
    params = steps[0].params
    adamw(
        [s.weights_P for s in steps],
        [s.grads_P for s in steps],
        [s.state.exp_avg_P for s in steps],
        [s.state.exp_avg_sq_P for s in steps],
        [],
        [torch.tensor(float(s.state.count), device=s.weights_P.device) for s in steps],
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        weight_decay=params.weight_decay,
        eps=max(params.eps, _LEAST_EPS),
    )
    for step in steps:
        step.state.count += 1
