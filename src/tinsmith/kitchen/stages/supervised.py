"""Stages of supervised fine-tuning.

Each step is submitted before the results of the one before it are read, so the server never waits for this program;
order, not timing, carries correctness. Everything a step does follows from the config, the data and the step's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tinsmith.data import BatchPlan, ConversationDataset, ConversationFile, build_dataset, hold_out
from tinsmith.data.jsonl import conversations_of
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.ports import CheckpointPaths, Dataset, Pending
from tinsmith.kitchen.run_log import RunLog, checkpoint_name
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.stages.common import count, data_path, is_due
from tinsmith.types import ForwardBackwardOutput, OptimStepResponse

LOSS_FN: Final = "cross_entropy"
FEW_STEPS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedCourse:
    """All that is decided before the first step."""

    training: ConversationDataset
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
        return ctx.put(course=plan_course(ctx.config, file, ctx.state.renderer))


def plan_course(config: Any, file: ConversationFile, renderer: Any) -> SupervisedCourse:
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
    if file.ignored_keys:
        keys = ", ".join(f"{key!r} ({count(number, 'line')})" for key, number in file.ignored_keys.items())
        remarks.append(f"keys in {file.path.name} that were not read: {keys}")
    if plan.num_steps < FEW_STEPS:
        remarks.append(f"{count(plan.num_steps, 'step')} will not teach much; raise epochs or lower batch_size")
    return remarks


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """One step under way: what to wait for, and what its row needs beside the results."""

    step: int
    """From 1."""
    epoch: int
    """From 1."""
    cursor: Mapping[str, int]
    learning_rate: float
    num_tokens: int
    num_trained: int
    forward_backward: Pending[ForwardBackwardOutput]
    optim_step: Pending[OptimStepResponse]
    save: Pending[CheckpointPaths] | None
    evaluation: Pending[ForwardBackwardOutput] | None


class SubmitStep(Stage):
    """Forward, backward and optimizer step; where they are due, a checkpoint and an evaluation behind them."""

    name = "submit_step"
    needs = ("training_client",)

    def execute(self, ctx: Context) -> Context:
        course: SupervisedCourse = ctx.state.course
        step = ctx.state.steps_current + 1
        submitted = _submit(ctx, course, step)
        ctx.emit("dataset.batch", {"step": step, "tokens": submitted.num_tokens})
        return ctx.put(under_way=(*ctx.get_state("under_way", ()), submitted))


def _submit(ctx: Context, course: SupervisedCourse, step: int) -> Submitted:
    config, client, session = ctx.config, ctx.get_adapter("training_client"), ctx.state.session
    last = step == course.num_steps
    data, num_trained = course.training.data(course.plan.batch(step - 1))
    params = config.adam_params(step, course.num_steps)
    forward_backward = client.forward_backward(session, data, LOSS_FN)
    optim_step = client.optim_step(session, params)
    save = evaluation = None
    if last or is_due(step, config.save_every):
        save = client.save_checkpoint(session, checkpoint_name(step))
    if course.test and (last or is_due(step, config.eval_every)):
        test_data, _ = course.test.data(range(len(course.test.examples)))
        evaluation = client.forward(session, test_data, LOSS_FN)
    return Submitted(
        step=step,
        epoch=course.plan.epoch_of(step - 1) + 1,
        cursor=ctx.cursor,
        learning_rate=params.learning_rate,
        num_tokens=sum(datum.model_input.length for datum in data),
        num_trained=num_trained,
        forward_backward=forward_backward,
        optim_step=optim_step,
        save=save,
        evaluation=evaluation,
    )


class ReadStep(Stage):
    """Wait for the steps under way, but for the newest `leave`, and write them down."""

    name = "read_step"
    options = ("leave",)
    commits = True

    async def execute(self, ctx: Context) -> Context:
        under_way: tuple[Submitted, ...] = ctx.get_state("under_way", ())
        while len(under_way) > ctx.stage_opts.leave:
            ctx = await _read(ctx, under_way[0])
            under_way = under_way[1:]
        return ctx.put(under_way=under_way)


async def _read(ctx: Context, submitted: Submitted) -> Context:
    """The checkpoint comes last, so that the rows before a checkpoint are there."""
    log: RunLog = ctx.state.log
    loss = (await submitted.forward_backward).loss_sum
    optimizer_metrics = (await submitted.optim_step).metrics or {}
    row = log.step(
        step=submitted.step,
        epoch=submitted.epoch,
        loss=loss,
        loss_sum=loss * submitted.num_trained,
        tokens=submitted.num_tokens,
        learning_rate=submitted.learning_rate,
        grad_norm=optimizer_metrics.get("grad_norm:mean"),
    )
    ctx.emit("training.step", {"step": row.step, "loss": row.loss, "learning_rate": row.learning_rate})
    if submitted.evaluation is not None:
        test_loss = (await submitted.evaluation).loss_sum
        log.evaluated(row.step, test_loss=test_loss)
        ctx.emit("eval.complete", {"step": row.step, "test_loss": test_loss})
    if submitted.save is not None:
        client, session = ctx.get_adapter("training_client"), ctx.state.session
        run_id = client.run_id(session)
        record = log.saved(row, await submitted.save, run_id=run_id, cursor=submitted.cursor)
        ctx.emit("training.checkpoint", {"step": row.step}, path=record.sampler_path)
    return ctx.record_metric("loss", row.loss, row.step)


class LogEpoch(Stage):
    name = "log_epoch"

    def execute(self, ctx: Context) -> None:
        ctx.emit("training.epoch", {"epoch": ctx.state.epochs_current + 1})


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
