"""Learning rates over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

LrSchedule: TypeAlias = Literal["linear", "cosine", "constant", "exponential", "polynomial"]


def learning_rate(
    schedule: LrSchedule,
    *,
    peak: float,
    step: int,
    num_steps: int,
    warmup_steps: int,
    end_share: float = 0.01,
    power: float = 2.0,
) -> float:
    """The rate of `step` (from 0): rises linearly over `warmup_steps` to `peak`, then falls towards 0 or stays.

    An exponential falls towards `end_share` of the peak; a polynomial is (1 - progress) to the `power`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "exponential":
            return float(peak * end_share**progress)
        case "polynomial":
            return float(peak * (1 - progress) ** power)
    raise ValueError(f"lr_schedule {schedule!r} is none of linear, cosine, constant, exponential, polynomial")
