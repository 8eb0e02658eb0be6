"""Recipes by name: a config with defaults, and the workflow that follows it."""

from __future__ import annotations

from typing import Final

from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.recipes.supervised import ChatSl, SlBasic, Supervised, SupervisedConfig

RECIPES: Final[dict[str, type[Recipe]]] = {recipe.name: recipe for recipe in (Supervised, SlBasic, ChatSl)}

__all__ = ["RECIPES", "ChatSl", "Recipe", "SlBasic", "Supervised", "SupervisedConfig"]
