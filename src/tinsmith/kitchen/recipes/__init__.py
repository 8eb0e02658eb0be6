"""Recipes by name: a config with defaults, and the workflow that follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tinsmith.kitchen.config import RecipeConfig
from tinsmith.kitchen.recipes.supervised import SupervisedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str
    description: str
    config_type: type[RecipeConfig]


RECIPES: Final = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="supervised",
            description="Fine-tune a LoRA adapter on conversations.",
            config_type=SupervisedConfig,
        ),
    )
}

__all__ = ["RECIPES", "Recipe", "SupervisedConfig"]
