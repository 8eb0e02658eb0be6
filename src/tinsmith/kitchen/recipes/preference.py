"""Preference recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from tinsmith.data.demo import DEMO_PREFERENCES
from tinsmith.kitchen.preferences import WITHOUT_REFERENCE, PreferenceLoss
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.kitchen.workflows.preference import preference


class PreferenceConfig(TrainingConfig):
    defaults_of_loss: ClassVar[Mapping[str, Mapping[str, float]]] = {"simpo": {"beta": 2.0}}
    """Keys that have another default with a loss than with the others."""

    data: Path
    """JSONL file of {"prompt", "chosen", "rejected"}; the prompt is a text or a list of messages."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data; each is shuffled anew."""
    batch_size: int = Field(default=128, ge=1)
    """Pairs per optimizer step."""
    loss: PreferenceLoss = "dpo"
    """dpo, ipo, kto; or simpo and orpo, which have no reference."""
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """How strongly the policy is held to the reference; for simpo, the scale of the margin, 2 if not given;
    for orpo, the weight of the odds ratio beside the likelihood."""
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """simpo: the margin to reach."""
    reference: str | None = None
    """What answers are compared with: none takes the base model, else a tinker:// path of sampler weights."""
    max_length: int = Field(default=8192, ge=2)
    """Tokens a prompt with its answer may have."""
    test_size: int = Field(default=0, ge=0)
    """Pairs held out of training to measure accuracy on."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on the test set; 0 evaluates at the end only."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults_of_loss(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**cls.defaults_of_loss.get(str(values.get("loss")), {}), **values}

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.eval_every and not self.test_size:
            raise ValueError(f"eval_every={self.eval_every} needs test_size: there is no test set to evaluate on")
        if self.loss in WITHOUT_REFERENCE and self.reference is not None:
            raise ValueError(f"loss={self.loss!r} has no reference; leave out reference={self.reference!r}")
        if self.is_set("gamma") and self.loss != "simpo":
            raise ValueError(f"gamma={self.gamma!r} is of loss='simpo', not of {self.loss!r}")
        return self


class Preference(Recipe):
    name = "preference"
    description = "Teach a LoRA adapter which of two answers is the better."
    workflow = preference
    config_type = PreferenceConfig


class DpoConfig(PreferenceConfig):
    defaults_of_loss = {"simpo": {"beta": 2.0, "learning_rate": 2e-3}, "orpo": {"learning_rate": 2e-3}}

    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate of AdamW; if not given, 2e-3 with simpo and orpo: they have to make the chosen answer the
    likelier one, not only likelier than it was, and the base model is all but certain of the rejected ones."""


class Dpo(Recipe):
    name = "dpo"
    description = "DPO, or another loss, on the pairs that ship: runs offline in seconds."
    workflow = preference
    config_type = DpoConfig
    defaults = {"data": DEMO_PREFERENCES, "epochs": 4, "batch_size": 8, "test_size": 24}
