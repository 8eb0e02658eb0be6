"""Where answers earn rewards: one small protocol, ready-made environments, and rollouts with any policy."""

from tinsmith.kitchen.environments.environment import (
    Environment,
    EnvironmentGroup,
    Observation,
    SameTask,
    StepResult,
    TaskSet,
)
from tinsmith.kitchen.environments.questions import QuestionEnvironment, QuestionTasks
from tinsmith.kitchen.environments.rollouts import (
    Draw,
    Policy,
    Rollout,
    RolloutGroup,
    RolloutLimits,
    Turn,
    roll_out,
    roll_out_group,
)
from tinsmith.kitchen.environments.tools import PythonTool, ToolEnvironment

__all__ = [
    "Draw",
    "Environment",
    "EnvironmentGroup",
    "Observation",
    "Policy",
    "PythonTool",
    "QuestionEnvironment",
    "QuestionTasks",
    "Rollout",
    "RolloutGroup",
    "RolloutLimits",
    "SameTask",
    "StepResult",
    "TaskSet",
    "ToolEnvironment",
    "Turn",
    "roll_out",
    "roll_out_group",
]
