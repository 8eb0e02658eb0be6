"""Distillation recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tinsmith.data import DEMO_CONVERSATIONS
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.recipes.reinforcement import RolloutConfig
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.kitchen.workflows.distillation import distillation, off_policy_distillation


class TeacherConfig(TrainingConfig):
    """Keys of both workflows that have teachers."""

    data: Path
    """Conversations as for supervised; their prompts are answered anew, their answers teach a teacher."""
    teacher: str | None = None
    """tinker:// path of sampler weights, or a base model, or several with commas between them; none first teaches an
    adapter on the data's answers."""
    teacher_weights: str | None = None
    """Shares of several teachers in their mixture, as 0.7,0.3; none gives all the same."""
    teacher_of: Literal["mixed", "record"] = "mixed"
    """Whether all teachers together teach every prompt, or each prompt has the one whose number (from 1) its record
    gives under "teacher"."""
    teacher_epochs: int = Field(default=8, ge=1)
    """Passes over the data of a teacher that is taught first."""
    teacher_learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    """Of that teacher."""

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Empty if a teacher is to be taught first."""
        return tuple(name.strip() for name in self.teacher.split(",")) if self.teacher else ()

    def weights_of(self, num_teachers: int) -> tuple[float, ...]:
        """They add up to 1."""
        weights = [float(text) for text in self.teacher_weights.split(",")] if self.teacher_weights else []
        weights = weights or [1.0] * num_teachers
        return tuple(weight / sum(weights) for weight in weights)

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        names, texts = self.teacher_names, (self.teacher_weights or "").split(",")
        if any(not name for name in names):
            raise ValueError(f"teacher={self.teacher!r} names nothing between two commas")
        if self.teacher_of == "record" and (len(names) < 2 or self.teacher_weights is not None):
            raise ValueError("teacher_of='record' needs several teachers, without teacher_weights")
        if self.teacher_weights is None:
            return self
        try:
            is_good = len(texts) == len(names) and all(0 < float(text) < math.inf for text in texts)
        except ValueError:
            is_good = False
        if not is_good:
            raise ValueError(
                f"teacher_weights={self.teacher_weights!r} must be a positive number for each of {len(names)} teachers"
            )
        return self


class DistillationConfig(TeacherConfig, RolloutConfig):
    pass


class OffPolicyConfig(TeacherConfig):
    top_k: int = Field(default=0, ge=0)
    """Learn the teacher's distribution over its so many likeliest tokens; 0 learns the tokens that it drew."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the teacher's answers."""
    batch_size: int = Field(default=128, ge=1)
    """Answers per optimizer step."""
    group_size: int = Field(default=4, ge=1)
    """Answers of the teacher per prompt."""
    max_tokens: int = Field(default=512, ge=1)
    """Of one answer."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Of the teacher's sampling."""


class Distillation(Recipe):
    name = "distillation"
    description = "On-policy distillation of a teacher's answers, by reverse KL: runs offline in about a minute."
    workflow = distillation
    config_type = DistillationConfig
    defaults = {
        "data": DEMO_CONVERSATIONS, "num_rollouts": 24, "groups_per_batch": 24, "group_size": 4, "max_tokens": 16,
        "learning_rate": 4e-3, "lr_schedule": "constant", "teacher_epochs": 3, "teacher_learning_rate": 2e-3,
    }  # fmt: skip


class OffPolicyDistillation(Recipe):
    name = "off_policy_distillation"
    description = "Fine-tune a student on answers that a teacher draws: runs offline in about a minute."
    workflow = off_policy_distillation
    config_type = OffPolicyConfig
    defaults = {
        "data": DEMO_CONVERSATIONS, "epochs": 4, "batch_size": 16, "group_size": 2, "max_tokens": 32,
        "learning_rate": 3e-3,
    }  # fmt: skip
