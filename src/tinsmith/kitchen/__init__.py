"""The kitchen: whole training runs from a config."""

from tinsmith.kitchen.errors import ConfigError, KitchenError, RunFolderError, TrainingDiverged
from tinsmith.kitchen.recipes import RECIPES, Recipe, SupervisedConfig
from tinsmith.kitchen.run_folder import CheckpointRecord, RunFolder
from tinsmith.kitchen.workflows import SupervisedResult, run_supervised

__all__ = [
    "RECIPES",
    "CheckpointRecord",
    "ConfigError",
    "KitchenError",
    "Recipe",
    "RunFolder",
    "RunFolderError",
    "SupervisedConfig",
    "SupervisedResult",
    "TrainingDiverged",
    "run_supervised",
]
