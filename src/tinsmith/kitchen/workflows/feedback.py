"""The feedback loop: where new feedback is reason to, train on what was good of it and register the model."""

from __future__ import annotations

from typing import Final

from tinsmith.kitchen.stages.feedback import CheckTriggers, Curate, Export, UpdateBaseline, should_retrain
from tinsmith.kitchen.workflow import conditional, stage, sub_workflow, workflow
from tinsmith.kitchen.workflows.supervised import supervised

train: Final = workflow(
    "train",
    *(node for node in supervised.nodes if node.name != "load_dataset"),
    cleanup=supervised.cleanup,
    description="the supervised workflow, on data that is there already",
)

feedback_loop: Final = workflow(
    "feedback_loop",
    stage(CheckTriggers),
    conditional(should_retrain)(
        stage(Curate),
        stage(Export),
        sub_workflow("train", train),
        stage(UpdateBaseline),
    ),
    description="count feedback; enough of it, or enough of it bad, trains on the good and registers the model",
)
