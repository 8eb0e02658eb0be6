"""Steps under way: submitted, then read one step later.

Each step is submitted before the results of the one before it are read, so the server never waits for this program;
order, not timing, carries correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tinsmith.kitchen.context import Context
from tinsmith.kitchen.ports import CheckpointPaths, Pending
from tinsmith.kitchen.run_log import RunLog, checkpoint_name
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.stages.common import is_due
from tinsmith.types import ForwardBackwardOutput, OptimStepResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a forward-backward pass came to."""

    loss: float
    loss_sum: float
    metrics: Mapping[str, float] = field(default_factory=dict)


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
    forward_backward: Pending[ForwardBackwardOutput]
    measure: Callable[[ForwardBackwardOutput], Measured]
    optim_step: Pending[OptimStepResponse]
    save: Pending[CheckpointPaths] | None
    evaluation: Pending[ForwardBackwardOutput] | None
    measure_evaluation: Callable[[ForwardBackwardOutput], Mapping[str, float]]
    event: str | None
    """Emitted beside `training.step`, with the step's metrics."""


def submit_step(
    ctx: Context,
    *,
    step: int,
    epoch: int,
    num_tokens: int,
    forward_backward: Pending[ForwardBackwardOutput],
    measure: Callable[[ForwardBackwardOutput], Measured],
    evaluate: Callable[[], Pending[ForwardBackwardOutput]] | None = None,
    measure_evaluation: Callable[[ForwardBackwardOutput], Mapping[str, float]] = lambda output: {},
    event: str | None = None,
) -> Context:
    """Put the optimizer step behind a pass; where they are due, a checkpoint and an evaluation behind it."""
    config, client, session = ctx.config, ctx.get_adapter("training_client"), ctx.state.session
    num_steps: int = ctx.state.course.num_steps
    params, last = config.adam_params(step, num_steps), step == num_steps
    optim_step = client.optim_step(session, params)
    save = evaluation = None
    if last or is_due(step, config.save_every):
        save = client.save_checkpoint(session, checkpoint_name(step))
    if evaluate is not None and (last or is_due(step, config.eval_every)):
        evaluation = evaluate()
    ctx.emit("dataset.batch", {"step": step, "tokens": num_tokens})
    submitted = Submitted(
        step=step,
        epoch=epoch,
        cursor=ctx.cursor,
        learning_rate=params.learning_rate,
        num_tokens=num_tokens,
        forward_backward=forward_backward,
        measure=measure,
        optim_step=optim_step,
        save=save,
        evaluation=evaluation,
        measure_evaluation=measure_evaluation,
        event=event,
    )
    return ctx.put(under_way=(*ctx.get_state("under_way", ()), submitted))


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
    measured = submitted.measure(await submitted.forward_backward)
    optimizer_metrics = (await submitted.optim_step).metrics or {}
    row = log.step(
        step=submitted.step,
        epoch=submitted.epoch,
        loss=measured.loss,
        loss_sum=measured.loss_sum,
        tokens=submitted.num_tokens,
        learning_rate=submitted.learning_rate,
        grad_norm=optimizer_metrics.get("grad_norm:mean"),
        metrics=measured.metrics,
    )
    ctx.emit("training.step", {"step": row.step, "loss": row.loss, "learning_rate": row.learning_rate})
    if submitted.event is not None:
        ctx.emit(submitted.event, {"step": row.step, "loss": row.loss, **measured.metrics})
    if submitted.evaluation is not None:
        values = submitted.measure_evaluation(await submitted.evaluation)
        log.evaluated(row.step, **values)
        ctx.emit("eval.complete", {"step": row.step, **values})
    if submitted.save is not None:
        client, session = ctx.get_adapter("training_client"), ctx.state.session
        run_id = client.run_id(session)
        record = log.saved(
            row, await submitted.save, run_id=run_id, cursor=submitted.cursor, kept=ctx.get_state("kept", {})
        )
        ctx.emit("training.checkpoint", {"step": row.step}, path=record.sampler_path)
    return ctx.record_metric("loss", row.loss, row.step)


class LogEpoch(Stage):
    name = "log_epoch"

    def execute(self, ctx: Context) -> None:
        ctx.emit("training.epoch", {"epoch": ctx.state.epochs_current + 1})
