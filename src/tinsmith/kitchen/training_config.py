"""Keys that the configs of all shipped recipes have."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from tinsmith.kitchen.config import RecipeConfig
from tinsmith.kitchen.schedules import LrSchedule, learning_rate
from tinsmith.models import TINY
from tinsmith.types import AdamParams


class TrainingConfig(RecipeConfig):
    model: str = Field(default=TINY, min_length=1)
    """Base model: tinsmith/tiny, a Hugging Face id, a folder, or what the server at base_url calls it."""
    output: Path | None = None
    """Folder for config, metrics, checkpoints and the report; none takes the next free runs/RECIPE-NNN."""
    resume: bool = False
    """Go on from the last checkpoint in output."""
    base_url: str | None = None
    """Server to train on; none takes TINKER_BASE_URL, or else an engine in this process."""
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate of AdamW."""
    lr_schedule: LrSchedule = "linear"
    """How the learning rate falls from its peak to the end of the run."""
    lr_end_share: float = Field(default=0.01, gt=0, le=1)
    """Exponential schedule: the share of the peak that it falls towards."""
    lr_power: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Polynomial schedule: the power of what is left of the run."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises to its peak."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: decay of the mean gradient."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the mean squared gradient."""
    adam_eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """AdamW: added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """AdamW: decoupled weight decay."""
    grad_clip_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Upper bound of the gradient norm; 0 turns clipping off."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the LoRA adapter."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Fixes the adapter's first weights, the order of the data, samples, and the test set."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves at the end only."""
    register_as: str | None = Field(default=None, min_length=1)
    """Name under which the last checkpoint goes into the model registry; none registers nothing."""
    numerics_gate: bool = True
    """Before the first step: check that sampling and training agree on log-probabilities, and stop if they do not."""

    @model_validator(mode="after")
    def _check_resume(self) -> Self:
        if self.resume and self.output is None:
            raise ValueError("resume=true needs output=: the folder of the run to go on with")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        for key, schedule in (("lr_end_share", "exponential"), ("lr_power", "polynomial")):
            if self.is_set(key) and self.lr_schedule != schedule:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is of lr_schedule={schedule}, not of {self.lr_schedule}"
                )
        return self

    def is_set(self, key: str) -> bool:
        """Whether it has another value than its default: a config that was written out names every key."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    def bound_keys(self) -> frozenset[str]:
        """Keys that change what is learned here, though elsewhere they do not: a resumed run must keep them."""
        return frozenset()

    def adam_params(self, step: int, num_steps: int) -> AdamParams:
        """Of `step` (from 1)."""
        return AdamParams(
            learning_rate=learning_rate(
                self.lr_schedule,
                peak=self.learning_rate,
                step=step - 1,
                num_steps=num_steps,
                warmup_steps=self.warmup_steps,
                end_share=self.lr_end_share,
                power=self.lr_power,
            ),
            beta1=self.adam_beta1,
            beta2=self.adam_beta2,
            eps=self.adam_eps,
            weight_decay=self.weight_decay,
            grad_clip_norm=self.grad_clip_norm,
        )
