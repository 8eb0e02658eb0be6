"""Distillation recipes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tinsmith.data import DEMO_CONVERSATIONS
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.recipes.reinforcement import RolloutConfig
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.kitchen.workflows.distillation import distillation, off_policy_distillation


class DistillationConfig(RolloutConfig):
    data: Path
    """Conversations as for supervised; their prompts are answered by the student, their answers teach a teacher."""
    teacher: str | None = None
    """tinker:// path of sampler weights, or a base model; none first teaches an adapter on the data's answers."""
    teacher_epochs: int = Field(default=8, ge=1)
    """Passes over the data of a teacher that is taught first."""
    teacher_learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    """Of that teacher."""


class OffPolicyConfig(TrainingConfig):
    data: Path
    """Conversations as for supervised; their prompts are answered by the teacher, their answers teach a teacher."""
    teacher: str | None = None
    """tinker:// path of sampler weights, or a base model; none first teaches an adapter on the data's answers."""
    teacher_epochs: int = Field(default=8, ge=1)
    """Passes over the data of a teacher that is taught first."""
    teacher_learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    """Of that teacher."""
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
