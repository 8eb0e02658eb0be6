"""Stages of supervised fine-tuning. Everything a step does follows from the config, the data and the step's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tinsmith.data import BatchPlan, ConversationDataset, ConversationFile, build_dataset, hold_out
from tinsmith.data.jsonl import conversations_of
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.ports import Dataset, Pending
from tinsmith.kitchen.run_log import RunLog
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.stages.common import count, data_path, unread_keys
from tinsmith.kitchen.stages.steps import Measured, submit_step
from tinsmith.types import Datum, ForwardBackwardOutput

LOSS_FN: Final = "cross_entropy"
FEW_STEPS: Final = 10


class TrainingData(Protocol):
    def data(self, indices: Sequence[int]) -> tuple[list[Datum], int]:
        """Datums of one batch, whose loss is a mean, and over how many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedCourse:
    """All that is decided before the first step."""

    training: TrainingData
    test: ConversationDataset | None
    plan: BatchPlan
    remarks: tuple[str, ...]
    facts: Mapping[str, Any]

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps


class BuildDataset(Stage):
    """Render every conversation and plan the batches. Raises `DataError`, `RenderError`, `ConfigError`."""

    name = "build_dataset"

    def execute(self, ctx: Context) -> Context:
        dataset: Dataset = ctx.state.dataset
        records = [(record.values, record.source) for record in dataset]
        file = conversations_of(data_path(ctx), records, sha256=dataset.sha256)
        return ctx.put(course=plan_course(ctx.config, file, ctx.state.renderer, ctx.get_state("max_context", None)))


def plan_course(config: Any, file: ConversationFile, renderer: Any, max_context: int | None = None) -> SupervisedCourse:
    try:
        training_indices, test_indices = hold_out(len(file.conversations), test_size=config.test_size, seed=config.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error

    def dataset(indices: Sequence[int]) -> ConversationDataset:
        return build_dataset(
            [file.conversations[index] for index in indices],
            renderer,
            train_on=config.train_on,
            max_length=config.max_length,
            too_long=config.too_long,
            max_context=max_context,
        )

    training = dataset(training_indices)
    plan = BatchPlan(
        num_examples=len(training.examples), batch_size=config.batch_size, epochs=config.epochs, seed=config.seed
    )
    check_warmup(config.warmup_steps, plan.num_steps)
    return SupervisedCourse(
        training=training,
        test=dataset(test_indices) if test_indices else None,
        plan=plan,
        remarks=tuple(_remarks(file, training, plan)),
        facts={"conversations": len(file.conversations), "ignored_keys": dict(file.ignored_keys)},
    )


def check_warmup(warmup_steps: int, num_steps: int) -> None:
    if warmup_steps >= num_steps:
        raise ConfigError(f"warmup_steps={warmup_steps} is not below the run's {num_steps} steps")


def _remarks(file: ConversationFile, training: ConversationDataset, plan: BatchPlan) -> list[str]:
    """What a person should know before the run: counts, and everything that was left out."""
    remarks = [
        f"{count(len(training.examples), 'conversation')}, {count(training.num_tokens, 'token')}, "
        f"{training.num_trained_tokens:,} of them trained; {count(plan.num_steps, 'step')}"
    ]
    if training.num_truncated:
        remarks.append(f"{count(training.num_truncated, 'conversation')} truncated to max_length")
    if training.num_skipped:
        remarks.append(f"{count(training.num_skipped, 'conversation')} skipped: too long, or nothing left to learn")
    remarks += unread_keys(file.path.name, file.ignored_keys)
    if plan.num_steps < FEW_STEPS:
        remarks.append(f"{count(plan.num_steps, 'step')} will not teach much; raise epochs or lower batch_size")
    return remarks


class SubmitStep(Stage):
    """Forward, backward and optimizer step; where they are due, a checkpoint and an evaluation behind them."""

    name = "submit_step"
    needs = ("training_client",)

    def execute(self, ctx: Context) -> Context:
        course: SupervisedCourse = ctx.state.course
        client, session, step = ctx.get_adapter("training_client"), ctx.state.session, ctx.state.steps_current + 1
        data, num_trained = course.training.data(course.plan.batch(step - 1))

        def evaluate() -> Pending[ForwardBackwardOutput]:
            assert course.test is not None, "asked only where a test set was held out"
            test_data, _ = course.test.data(range(len(course.test.examples)))
            found: Pending[ForwardBackwardOutput] = client.forward(session, test_data, LOSS_FN)
            return found

        return submit_step(
            ctx,
            step=step,
            epoch=course.plan.epoch_of(step - 1) + 1,
            num_tokens=sum(datum.model_input.length for datum in data),
            forward_backward=client.forward_backward(session, data, LOSS_FN),
            measure=lambda output: Measured(loss=output.loss_sum, loss_sum=output.loss_sum * num_trained),
            evaluate=evaluate if course.test else None,
            measure_evaluation=lambda output: {"test_loss": output.loss_sum},
        )


class BestCheckpoint(Stage):
    """Name the checkpoint with the lowest test loss, if a test set was held out."""

    name = "best_checkpoint"
    on_resume = "run"

    def execute(self, ctx: Context) -> Context:
        log: RunLog = ctx.state.log
        losses = {row["step"]: row["test_loss"] for row in log.evaluations}
        measured = [record for record in log.folder.checkpoints() if record.step in losses]
        if not measured:
            return ctx
        best = min(measured, key=lambda record: float(losses[record.step]))
        log.note(f"best checkpoint by test loss: {best.name}")
        return ctx.put(artifacts={**ctx.get_state("artifacts", {}), "best_checkpoint": best})
