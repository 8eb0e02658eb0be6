"""The supervised workflow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tinsmith.kitchen.context import Context
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
from tinsmith.kitchen.stages.steps import LogEpoch, ReadStep
from tinsmith.kitchen.stages.supervised import BestCheckpoint, BuildDataset, SubmitStep
from tinsmith.kitchen.workflow import loop, stage, workflow


def steps_of_epoch(ctx: Context) -> Iterable[int]:
    """Numbers (from 0) of the steps of the present epoch."""
    per_epoch = ctx.state.course.plan.steps_per_epoch
    return range(ctx.state.epochs_current * per_epoch, (ctx.state.epochs_current + 1) * per_epoch)


supervised: Final = workflow(
    "supervised",
    stage(LoadDataset),
    stage(StartSession),
    stage(BuildDataset),
    stage(OpenRun),
    stage(NumericsGate),
    stage(BeginTraining),
    loop("epochs", over=lambda ctx: range(ctx.config.epochs))(
        loop("steps", over=steps_of_epoch)(
            stage(SubmitStep),
            stage(ReadStep, leave=1),
        ),
        stage(LogEpoch),
    ),
    stage("read_last_step", ReadStep, leave=0),
    stage(BestCheckpoint),
    stage(FinishRun),
    stage(RegisterModel),
    cleanup=[stage(CloseRun)],
    description="read, render, then batch by batch: forward_backward, optim_step, save, evaluate",
)
