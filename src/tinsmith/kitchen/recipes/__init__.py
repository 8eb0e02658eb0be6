"""Recipes by name: a config with defaults, and the workflow that follows it."""

from __future__ import annotations

from typing import Final

from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.recipes.distillation import (
    Distillation,
    DistillationConfig,
    OffPolicyConfig,
    OffPolicyDistillation,
)
from tinsmith.kitchen.recipes.feedback import FeedbackConfig, FeedbackLoop
from tinsmith.kitchen.recipes.preference import Dpo, DpoConfig, Preference, PreferenceConfig
from tinsmith.kitchen.recipes.reinforcement import CodeRl, MathRl, MultiTurnRl, Reinforcement, ReinforcementConfig
from tinsmith.kitchen.recipes.supervised import ChatSl, SlBasic, Supervised, SupervisedConfig

_ALL: Final[tuple[type[Recipe], ...]] = (
    Supervised,
    SlBasic,
    ChatSl,
    Preference,
    Dpo,
    Reinforcement,
    MathRl,
    CodeRl,
    MultiTurnRl,
    Distillation,
    OffPolicyDistillation,
    FeedbackLoop,
)
RECIPES: Final[dict[str, type[Recipe]]] = {recipe.name: recipe for recipe in _ALL}

__all__ = [
    "RECIPES",
    "ChatSl",
    "CodeRl",
    "Distillation",
    "DistillationConfig",
    "Dpo",
    "DpoConfig",
    "FeedbackConfig",
    "FeedbackLoop",
    "MathRl",
    "MultiTurnRl",
    "OffPolicyConfig",
    "OffPolicyDistillation",
    "Preference",
    "PreferenceConfig",
    "Recipe",
    "Reinforcement",
    "ReinforcementConfig",
    "SlBasic",
    "Supervised",
    "SupervisedConfig",
]
