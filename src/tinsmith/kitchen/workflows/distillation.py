"""Distillation: on the student's own answers (reverse KL), or on the teacher's."""

from __future__ import annotations

from typing import Final

from tinsmith.kitchen.stages.common import (
    BeginTraining,
    CloseRun,
    FinishRun,
    LoadDataset,
    NumericsGate,
    OpenRun,
    RegisterModel,
    StartSession,
)
from tinsmith.kitchen.stages.distillation import (
    CloseTeacher,
    LogTeacherAnswers,
    MeasureTeacherKl,
    OpenTeacher,
    PlanOnPolicy,
    ReadPrompts,
    SaveTeacher,
    StartTeacher,
    TeacherAnswers,
    TeachStep,
    teacher_is_missing,
)
from tinsmith.kitchen.stages.reinforcement import (
    Assemble,
    AwaitRollouts,
    LogRound,
    PenalizeDivergence,
    SaveRound,
    StartRollouts,
    StopRollouts,
    Update,
    checkpoint_is_due,
)
from tinsmith.kitchen.stages.steps import LogEpoch, ReadStep
from tinsmith.kitchen.stages.supervised import SubmitStep
from tinsmith.kitchen.workflow import conditional, loop, stage, sub_workflow, workflow
from tinsmith.kitchen.workflows.supervised import steps_of_epoch

teach: Final = workflow(
    "teach",
    stage(StartTeacher),
    loop("lessons", over=lambda ctx: range(ctx.state.teacher_plan.num_steps))(stage(TeachStep)),
    stage(SaveTeacher),
    cleanup=[stage(CloseTeacher)],
)

distillation: Final = workflow(
    "distillation",
    stage(LoadDataset),
    stage(StartSession),
    stage(ReadPrompts),
    stage(PlanOnPolicy),
    stage(OpenRun),
    stage(NumericsGate),
    stage(BeginTraining),
    conditional(teacher_is_missing)(sub_workflow("teach", teach)),
    stage(OpenTeacher),
    stage("kl_before", MeasureTeacherKl),
    loop("rounds", over=lambda ctx: range(ctx.config.num_rollouts))(
        stage(StartRollouts),
        stage(AwaitRollouts),
        stage(Assemble),
        stage(PenalizeDivergence),
        loop("updates", over=lambda ctx: range(ctx.config.ppo_epochs))(stage(Update)),
        stage(LogRound),
        conditional(checkpoint_is_due)(stage(SaveRound)),
    ),
    stage("kl_after", MeasureTeacherKl),
    stage(FinishRun),
    stage(RegisterModel),
    cleanup=[stage(StopRollouts), stage(CloseRun)],
    description="the student answers, the teacher scores every token, the student moves towards the teacher",
)

off_policy_distillation: Final = workflow(
    "off_policy_distillation",
    stage(LoadDataset),
    stage(StartSession),
    stage(ReadPrompts),
    conditional(teacher_is_missing)(sub_workflow("teach", teach)),
    stage(OpenTeacher),
    stage(TeacherAnswers),
    stage(OpenRun),
    stage(NumericsGate),
    stage(BeginTraining),
    stage(LogTeacherAnswers),
    loop("epochs", over=lambda ctx: range(ctx.config.epochs))(
        loop("steps", over=steps_of_epoch)(
            stage(SubmitStep),
            stage(ReadStep, leave=1),
        ),
        stage(LogEpoch),
    ),
    stage("read_last_step", ReadStep, leave=0),
    stage(FinishRun),
    stage(RegisterModel),
    cleanup=[stage(CloseRun)],
    description="the teacher answers the prompts, the student is fine-tuned on its answers",
)
