"""Recipes: what to train, not how. A class with a name, a workflow, and the config it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationError as PydanticError

from tinsmith.kitchen.config import RecipeConfig, explain
from tinsmith.kitchen.context import Settings, as_settings
from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.workflow import Workflow


class Recipe:
    """Subclass it, fill in the class attributes, and hand the class to `run`.

        class SlBasic(Recipe):
            name = "sl_basic"
            description = "Basic supervised fine-tuning"
            workflow = supervised
            config_type = SupervisedConfig
            defaults = {"model": "meta-llama/Llama-3.1-8B", "epochs": 1, "batch_size": 128}

    Without a `config_type` every key is taken as it comes.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    workflow: ClassVar[Workflow]
    config_type: ClassVar[type[RecipeConfig] | None] = None
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What `config_type` has other defaults for; a user's config overrides them."""
    default_config: ClassVar[Mapping[str, Any]] = {}
    """Another name for `defaults`; both count, `defaults` first."""
    required_adapters: ClassVar[tuple[str, ...]] = ()
    """Ports beside those that the stages of the workflow name."""
    optional_adapters: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def validate_config(cls, config: Any) -> None:
        """Raises `ConfigError` for values that do not go together."""

    @classmethod
    def all_defaults(cls) -> dict[str, Any]:
        return {**cls.default_config, **cls.defaults}

    @classmethod
    def make(cls, config: Mapping[str, Any] | RecipeConfig | None = None) -> RecipeConfig | Settings:
        """A complete, checked config. Raises `ConfigError` naming every bad key and value."""
        if isinstance(config, RecipeConfig):
            made: RecipeConfig | Settings = config
        elif cls.config_type is None:
            made = as_settings({**cls.all_defaults(), **(config or {})})
        else:
            try:
                made = cls.config_type.model_validate({**cls.all_defaults(), **(config or {})})
            except PydanticError as error:
                raise ConfigError(explain(error, cls.config_type)) from error
        cls.validate_config(made)
        return made
