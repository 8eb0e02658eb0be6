"""The kitchen: whole training runs from a config.

from tinsmith import kitchen

kitchen.run("supervised", {"epochs": 3, "batch_size": 8}, adapters=kitchen.adapters.noop())
"""

from tinsmith.kitchen import adapters
from tinsmith.kitchen.config import RecipeConfig
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import (
    AdapterError,
    ConfigError,
    GateFailed,
    KitchenError,
    NothingTrained,
    RunFolderError,
    StageError,
    TrainingDiverged,
    ValidationError,
    WorkflowError,
)
from tinsmith.kitchen.launch import SupervisedResult, TrainingResult, run_recipe, run_supervised
from tinsmith.kitchen.plan import describe, mermaid
from tinsmith.kitchen.recipes import RECIPES, Recipe, SupervisedConfig
from tinsmith.kitchen.run_folder import CheckpointRecord, RunFolder
from tinsmith.kitchen.running import RunResult, run
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.telemetry import attach_telemetry, detach_telemetry
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.kitchen.workflow import (
    Workflow,
    async_loop,
    conditional,
    loop,
    parallel,
    stage,
    stream_loop,
    sub_workflow,
    workflow,
)

__all__ = [
    "RECIPES",
    "AdapterError",
    "CheckpointRecord",
    "ConfigError",
    "Context",
    "GateFailed",
    "KitchenError",
    "NothingTrained",
    "Recipe",
    "RecipeConfig",
    "RunFolder",
    "RunFolderError",
    "RunResult",
    "Stage",
    "StageError",
    "SupervisedConfig",
    "SupervisedResult",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingResult",
    "ValidationError",
    "Workflow",
    "WorkflowError",
    "adapters",
    "async_loop",
    "attach_telemetry",
    "conditional",
    "describe",
    "detach_telemetry",
    "loop",
    "mermaid",
    "parallel",
    "run",
    "run_recipe",
    "run_supervised",
    "stage",
    "stream_loop",
    "sub_workflow",
    "workflow",
]
