"""Reinforcement recipes."""

from __future__ import annotations

from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from tinsmith.kitchen.advantages import AdvantageRule
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.rollouts import Overlong
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.kitchen.workflows.reinforcement import reinforcement

PolicyLoss: TypeAlias = Literal["importance_sampling", "ppo", "cispo", "gspo"]


class RolloutConfig(TrainingConfig):
    """Keys of all workflows that train on sampled episodes."""

    num_rollouts: int = Field(default=100, ge=1)
    """Rounds: each draws episodes and trains on them."""
    groups_per_batch: int = Field(default=100, ge=1)
    """Tasks per round."""
    group_size: int = Field(default=4, ge=1)
    """Episodes per task."""
    loss: PolicyLoss = "importance_sampling"
    """Of a drawn token with an advantage; all but importance_sampling clip the ratio."""
    clip_epsilon: float = Field(default=0.2, gt=0, lt=1)
    """Ratios are clipped to 1 - clip_epsilon and 1 + clip_epsilon, by the losses that clip."""
    ppo_epochs: int = Field(default=1, ge=1)
    """Updates on the episodes of a round."""
    max_tokens: int = Field(default=512, ge=1)
    """Of one answer."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of sampling. Training scores at temperature 1, so others bias the ratios."""
    max_turns: int = Field(default=8, ge=1)
    """Answers in one episode."""
    max_staleness: int = Field(default=0, ge=0)
    """Rounds by which the weights that draw may be older than those that are trained; 0 draws and trains in turn."""
    overlong: Overlong = "keep"
    """What becomes of episodes with an answer cut off at max_tokens: kept, their reward set to 0, or dropped."""
    rollout_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds that an episode may take; one that takes longer is left out and counted."""
    max_context: int = Field(default=32_768, ge=2)
    """Tokens of a prompt and its answer together, as far as the model takes so many; an episode without room for
    another answer ends as overlong."""

    def bound_keys(self) -> frozenset[str]:
        return frozenset({"save_every"}) if self.max_staleness else frozenset()


class ReinforcementConfig(RolloutConfig):
    environment: str = "addition"
    """Where tasks and rewards come from."""
    advantages: AdvantageRule = "group"
    """From rewards: less the group's mean, less the mean of the others, or gae, per token and without a critic."""
    normalize_advantages: bool = False
    """Divide advantages by the standard deviation of their group's rewards."""
    gae_gamma: float = Field(default=0.99, gt=0, le=1)
    """gae: discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """gae: decay per token; with few tokens between an answer's beginning and its reward, nearer to 1."""
    kl_penalty_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Taken off each token's advantage per nat by which the policy has left the base model."""
    eval_size: int = Field(default=0, ge=0)
    """Held-out tasks to measure the reward of the most likely answers on."""
    eval_every: int = Field(default=0, ge=0)
    """Rounds between evaluations; 0 evaluates at the end only."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.eval_every and not self.eval_size:
            raise ValueError(f"eval_every={self.eval_every} needs eval_size: there are no tasks to evaluate on")
        if self.group_size == 1 and not self.kl_penalty_coef:
            raise ValueError("group_size=1 leaves nothing to compare: every advantage would be 0")
        for key in ("gae_gamma", "gae_lambda"):
            if self.is_set(key) and self.advantages != "gae":
                raise ValueError(f"{key}={getattr(self, key)!r} needs advantages=gae, not {self.advantages}")
        return self


class Reinforcement(Recipe):
    name = "reinforcement"
    description = "Train a LoRA adapter on rewards of its own episodes (GRPO and its relatives)."
    workflow = reinforcement
    config_type = ReinforcementConfig
    optional_adapters = ("environment",)


class MathRl(Recipe):
    name = "math_rl"
    description = "Small sums from rewards alone: runs offline in about a minute."
    workflow = reinforcement
    config_type = ReinforcementConfig
    defaults = {
        "environment": "addition", "num_rollouts": 24, "groups_per_batch": 24, "group_size": 8, "max_tokens": 8,
        "learning_rate": 2e-3, "lr_schedule": "constant", "eval_size": 32,
    }  # fmt: skip


class CodeRl(Recipe):
    name = "code_rl"
    description = "Sums as Python expressions that are run in a process with limits. Runs offline in about a minute."
    workflow = reinforcement
    config_type = ReinforcementConfig
    defaults = {
        "environment": "addition_in_python", "num_rollouts": 12, "groups_per_batch": 16, "group_size": 8,
        "max_tokens": 8, "learning_rate": 2e-3, "lr_schedule": "constant", "eval_size": 16,
    }  # fmt: skip


class MultiTurnRl(Recipe):
    name = "multi_turn_rl"
    description = "Sums with a second try, worth half: episodes of several turns. Runs offline in about a minute."
    workflow = reinforcement
    config_type = ReinforcementConfig
    defaults = {
        "environment": "addition_with_retries", "num_rollouts": 18, "groups_per_batch": 24, "group_size": 8,
        "max_tokens": 8, "learning_rate": 2e-3, "lr_schedule": "constant", "eval_size": 32,
    }  # fmt: skip
