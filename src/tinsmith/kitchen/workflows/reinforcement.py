"""The reinforcement workflow: rounds of episodes, advantages, updates. Synchronous and asynchronous alike."""

from __future__ import annotations

from typing import Final

from tinsmith.kitchen.stages.common import (
    BeginTraining,
    CloseRun,
    FinishRun,
    NumericsGate,
    OpenRun,
    RegisterModel,
    StartSession,
)
from tinsmith.kitchen.stages.reinforcement import (
    Assemble,
    AwaitRollouts,
    EvaluateHeldOut,
    LogRound,
    OpenReference,
    PenalizeDivergence,
    PlanRollouts,
    SaveRound,
    StartRollouts,
    StopRollouts,
    Update,
    checkpoint_is_due,
    evaluation_is_due,
)
from tinsmith.kitchen.workflow import conditional, loop, stage, workflow

reinforcement: Final = workflow(
    "reinforcement",
    stage(StartSession),
    stage(PlanRollouts),
    stage(OpenRun),
    stage(NumericsGate),
    stage(OpenReference),
    stage(BeginTraining),
    loop("rounds", over=lambda ctx: range(ctx.config.num_rollouts))(
        stage(StartRollouts),
        stage(AwaitRollouts),
        stage(Assemble),
        stage(PenalizeDivergence),
        loop("updates", over=lambda ctx: range(ctx.config.ppo_epochs))(stage(Update)),
        stage(LogRound),
        conditional(evaluation_is_due)(stage(EvaluateHeldOut)),
        conditional(checkpoint_is_due)(stage(SaveRound)),
    ),
    stage(FinishRun),
    stage(RegisterModel),
    cleanup=[stage(StopRollouts), stage(CloseRun)],
    description="draw episodes, take rewards less their group's mean as advantages, update the policy",
)
