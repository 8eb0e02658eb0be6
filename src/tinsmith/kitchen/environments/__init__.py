"""Where answers earn rewards: one small protocol, ready-made environments, and rollouts with any policy."""

from tinsmith.kitchen.environments.bridge import TaskSource, TextEpisode, sampler_policy
from tinsmith.kitchen.environments.environment import (
    Environment,
    EnvironmentGroup,
    Observation,
    SameTask,
    StepResult,
    TaskSet,
)
from tinsmith.kitchen.environments.gymnasium_env import GymnasiumEnvironment, GymnasiumTasks, action_names
from tinsmith.kitchen.environments.questions import QuestionEnvironment, QuestionTasks
from tinsmith.kitchen.environments.reasoning import ReasoningGymTasks
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
from tinsmith.kitchen.environments.verifiers_tasks import VerifiersTasks

__all__ = [
    "Draw",
    "Environment",
    "EnvironmentGroup",
    "GymnasiumEnvironment",
    "GymnasiumTasks",
    "Observation",
    "Policy",
    "PythonTool",
    "QuestionEnvironment",
    "QuestionTasks",
    "ReasoningGymTasks",
    "Rollout",
    "RolloutGroup",
    "RolloutLimits",
    "SameTask",
    "StepResult",
    "TaskSet",
    "TaskSource",
    "TextEpisode",
    "ToolEnvironment",
    "Turn",
    "VerifiersTasks",
    "action_names",
    "roll_out",
    "roll_out_group",
    "sampler_policy",
]
