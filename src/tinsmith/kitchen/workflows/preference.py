"""The preference workflow: DPO and its relatives."""

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
from tinsmith.kitchen.stages.preference import BuildPairs, PreferenceGate, ScoreReference, SubmitPairs
from tinsmith.kitchen.stages.steps import LogEpoch, ReadStep
from tinsmith.kitchen.stages.supervised import BestCheckpoint
from tinsmith.kitchen.workflow import loop, stage, workflow
from tinsmith.kitchen.workflows.supervised import steps_of_epoch

preference: Final = workflow(
    "preference",
    stage(LoadDataset),
    stage(StartSession),
    stage(BuildPairs),
    stage(OpenRun),
    stage(NumericsGate),
    stage(ScoreReference),
    stage(PreferenceGate),
    stage(BeginTraining),
    loop("epochs", over=lambda ctx: range(ctx.config.epochs))(
        loop("steps", over=steps_of_epoch)(
            stage(SubmitPairs),
            stage(ReadStep, leave=1),
        ),
        stage(LogEpoch),
    ),
    stage("read_last_step", ReadStep, leave=0),
    stage(BestCheckpoint),
    stage(FinishRun),
    stage(RegisterModel),
    cleanup=[stage(CloseRun)],
    description="score the reference, then batch by batch: a loss of pairs, optim_step, save, evaluate",
)
