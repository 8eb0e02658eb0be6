"""The feedback loop as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.recipes.supervised import SupervisedConfig
from tinsmith.kitchen.workflows.feedback import feedback_loop


class FeedbackConfig(SupervisedConfig):
    data: Path = Path("feedback.jsonl")
    """JSONL file of {"prompt", "response", "rating" from -1 to 1, "correction"?}, unless an adapter has the feedback;
    what was used of it is kept in the folder feedback_loop beside it."""
    register_as: str | None = Field(default="feedback", min_length=1)
    """Name of the model in the registry; every loop that trains makes its next version."""
    min_new: int = Field(default=100, ge=1)
    """New entries that are reason to train."""
    bad_share_max: float | None = Field(default=None, ge=0, lt=1)
    """A greater share of new entries rated below 0 is reason to train as well."""
    bad_min: int = Field(default=20, ge=1)
    """New entries from which on that share counts."""
    min_rating: float = Field(default=0.5, ge=-1, le=1)
    """Responses rated so or better are learned, and every correction."""

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.register_as is None:
            raise ValueError("register_as: the loop registers what it trains; give a name")
        return self


class FeedbackLoop(Recipe):
    name = "feedback_loop"
    description = "Train on new feedback when there is reason to, and register the model."
    workflow = feedback_loop
    config_type = FeedbackConfig
    defaults = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
