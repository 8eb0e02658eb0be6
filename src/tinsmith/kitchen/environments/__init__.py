"""Where answers earn rewards: one small protocol, ready-made environments, and rollouts with any policy."""

from tinsmith.kitchen.environments.bridge import TaskSource, sampler_policy
from tinsmith.kitchen.environments.gymnasium_env import GymnasiumEnvironment, GymnasiumTasks, action_names
from tinsmith.kitchen.environments.programs import Problem, ProgramEnvironment, ProgramTasks
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
from tinsmith.kitchen.environments.sequences import DrawnSequence, join_turns
from tinsmith.kitchen.environments.tools import PythonTool, ToolEnvironment
from tinsmith.kitchen.environments.verifiers_tasks import VerifiersTasks
from tinsmith.kitchen.ports.environment import (
    Environment,
    EnvironmentGroup,
    EnvironmentSource,
    Observation,
    SameTask,
    StepResult,
    TaskSet,
)

__all__ = [
    "Draw",
    "DrawnSequence",
    "Environment",
    "EnvironmentGroup",
    "EnvironmentSource",
    "GymnasiumEnvironment",
    "GymnasiumTasks",
    "Observation",
    "Policy",
    "Problem",
    "ProgramEnvironment",
    "ProgramTasks",
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
    "ToolEnvironment",
    "Turn",
    "VerifiersTasks",
    "action_names",
    "join_turns",
    "roll_out",
    "roll_out_group",
    "sampler_policy",
]
