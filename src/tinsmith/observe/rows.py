"""What a training step reports. The keys are stable: files written today are read by tomorrow's tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    step: int
    """From 1: the number of optimizer steps taken, this one included."""
    epoch: int
    """From 1."""
    loss: float
    """Mean per trained token of the batch, before the step, in nats."""
    loss_sum: float
    """The same as a sum over the batch's trained tokens."""
    tokens: int
    """Tokens the model read in this step."""
    tokens_per_s: float
    learning_rate: float
    grad_norm: float | None
    """Before clipping; `None` if the server does not tell."""
    seconds: float
    """Since the start of the run, pauses between resumed parts left out."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """What a workflow measures beside these: rewards, margins. In a file its keys stand beside the others."""

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        metrics = values.pop("metrics")
        return {**values, **metrics}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> StepRow:
        """What `as_dict` gave."""
        own = {item.name for item in fields(cls)} - {"metrics"}
        metrics = {key: value for key, value in row.items() if key not in own}
        return cls(metrics=metrics, **{key: value for key, value in row.items() if key in own})
