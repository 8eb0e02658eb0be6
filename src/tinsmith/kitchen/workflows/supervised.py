"""The supervised workflow: read → render → (batch → forward_backward → optim_step → save, evaluate) → plot.

Each step is submitted before the results of the one before it are read, so the server never waits for this program;
order, not timing, carries correctness. Everything a step does follows from the config, the data and the step's number.
So a checkpoint needs no more than its number to go on from: *train N* equals *train k, kill, resume, train N - k*.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tinsmith.data import (
    BatchPlan,
    ChatTemplateRenderer,
    ConversationDataset,
    ConversationFile,
    build_dataset,
    hold_out,
    read_conversations,
)
from tinsmith.kitchen.errors import ConfigError, RunFolderError, TrainingDiverged
from tinsmith.kitchen.manifest import make_manifest
from tinsmith.kitchen.ports import CheckpointPaths, Pending, SessionSpec, TrainingBackend, TrainingSession
from tinsmith.kitchen.recipes.supervised import SupervisedConfig
from tinsmith.kitchen.run_folder import CheckpointRecord, RunFolder, checkpoint_row, free_folder
from tinsmith.kitchen.schedules import learning_rate
from tinsmith.observe import JsonlSink, RunObserver, StepRow, plot_loss
from tinsmith.types import AdamParams, ForwardBackwardOutput, OptimStepResponse

LOSS_FN: Final = "cross_entropy"
FREE_TO_CHANGE: Final = {"output", "resume", "base_url", "data", "save_every", "eval_every"}
"""Keys that a resumed run may set otherwise, for they change nothing of what is learned; data is compared by hash."""
FEW_STEPS: Final = 10

ConnectTo = Callable[[SupervisedConfig, RunFolder], TrainingBackend]
"""Opens the backend once it is known where the run's folder is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedResult:
    output: Path
    run_id: str
    steps: int
    loss_first: float
    """Of the run's first batch, before any step."""
    loss_last: float
    """Of its last batch, before the last step."""
    test_loss: float | None
    """After the last step, on the test set if there is one."""
    tokens: int
    """Read by the model over the whole run."""
    tokens_per_s: float
    seconds: float
    """Of training; loading is not counted."""
    checkpoint: CheckpointRecord


def run_supervised(
    config: SupervisedConfig,
    connect: ConnectTo,
    *,
    recipe: str = "supervised",
    observers: Sequence[RunObserver] = (),
    clock: Callable[[], float] = time.monotonic,
) -> SupervisedResult:
    """Fine-tune as `config` says. Nothing is written before data and config are known to fit.

    `recipe` is the name under which the run goes into its manifest and to the server.

    Raises `DataError`, `RenderError`, `ConfigError`, `RunFolderError`, `TrainingDiverged`, and what the backend raises.
    """
    folder = RunFolder(config.output or free_folder("supervised"))
    file = read_conversations(config.data)
    begin = _last_checkpoint(config, folder, file) if config.resume else None
    if not config.resume:
        folder.check_fresh()
    backend = connect(config, folder)
    try:
        session = backend.start_session(
            SessionSpec(
                model=config.model,
                lora_rank=config.lora_rank,
                seed=config.seed,
                resume_from=begin.state_path if begin else None,
                metadata={"recipe": recipe},
            )
        )
        course = _set_course(config, file, session)
        if config.resume:
            folder.rewind(begin.step if begin else 0)
        else:
            folder.create(
                config=config.model_copy(update={"output": folder.path}).model_dump(mode="json"),
                manifest=make_manifest(
                    recipe=recipe,
                    file=file,
                    model=config.model,
                    seed=config.seed,
                    run_id=session.run_id,
                    base_url=backend.location,
                ),
            )
        result = _Training(config, folder, session, course, begin, observers, clock).run()
    except BaseException:
        backend.close(failed=True)
        raise
    backend.close()
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """All that is decided before the first step."""

    training: ConversationDataset
    test: ConversationDataset | None
    plan: BatchPlan
    remarks: tuple[str, ...]


def _set_course(config: SupervisedConfig, file: ConversationFile, session: TrainingSession) -> _Course:
    renderer = ChatTemplateRenderer(session.tokenizer)
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
    if config.warmup_steps >= plan.num_steps:
        raise ConfigError(f"warmup_steps={config.warmup_steps} is not below the run's {plan.num_steps} steps")
    return _Course(
        training=training,
        test=dataset(test_indices) if test_indices else None,
        plan=plan,
        remarks=tuple(_remarks(file, training, plan)),
    )


def _remarks(file: ConversationFile, training: ConversationDataset, plan: BatchPlan) -> list[str]:
    """What a person should know before the run: counts, and everything that was left out."""
    remarks = [
        f"{_count(len(training.examples), 'conversation')}, {_count(training.num_tokens, 'token')}, "
        f"{training.num_trained_tokens:,} of them trained; {_count(plan.num_steps, 'step')}"
    ]
    if training.num_truncated:
        remarks.append(f"{_count(training.num_truncated, 'conversation')} truncated to max_length")
    if training.num_skipped:
        remarks.append(f"{_count(training.num_skipped, 'conversation')} skipped: too long, or nothing left to learn")
    if file.ignored_keys:
        keys = ", ".join(f"{key!r} ({_count(count, 'line')})" for key, count in file.ignored_keys.items())
        remarks.append(f"keys in {file.path.name} that were not read: {keys}")
    if plan.num_steps < FEW_STEPS:
        remarks.append(f"{_count(plan.num_steps, 'step')} will not teach much; raise epochs or lower batch_size")
    return remarks


def _last_checkpoint(config: SupervisedConfig, folder: RunFolder, file: ConversationFile) -> CheckpointRecord | None:
    """Where to go on; `None` if the run ended before its first checkpoint. Raises `RunFolderError`."""
    then, now = folder.read_config(), config.model_dump(mode="json")
    for key in now.keys() - FREE_TO_CHANGE:
        if then.get(key) != now[key]:
            raise RunFolderError(
                f"the run in {str(folder.path)!r} was made with {key}={then.get(key)!r}, not {now[key]!r}; "
                "a resumed run keeps its config"
            )
    sha256 = folder.read_manifest().get("data", {}).get("sha256")
    if sha256 != file.sha256:
        raise RunFolderError(f"{str(file.path)!r} is not the data that the run in {str(folder.path)!r} was made with")
    checkpoints = folder.checkpoints()
    return checkpoints[-1] if checkpoints else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Submitted:
    """One step under way: what to wait for, and what its row needs beside the results."""

    step: int
    """From 1."""
    learning_rate: float
    num_tokens: int
    num_trained: int
    forward_backward: Pending[ForwardBackwardOutput]
    optim_step: Pending[OptimStepResponse]
    save: Pending[CheckpointPaths] | None
    evaluation: Pending[ForwardBackwardOutput] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sinks:
    metrics: JsonlSink
    evaluations: JsonlSink | None
    """`None` without a test set."""
    checkpoints: JsonlSink


@dataclass(slots=True)
class _Training:
    config: SupervisedConfig
    folder: RunFolder
    session: TrainingSession
    course: _Course
    begin: CheckpointRecord | None
    observers: Sequence[RunObserver]
    clock: Callable[[], float]
    rows: list[StepRow] = field(default_factory=list)
    checkpoint: CheckpointRecord | None = None
    test_loss: float | None = None
    started_at: float = 0.0
    read_at: float = 0.0

    def run(self) -> SupervisedResult:
        self.rows, self.checkpoint, self.test_loss = self.folder.rows(), self.begin, self.folder.last_test_loss()
        first, last = (self.begin.step if self.begin else 0) + 1, self.course.plan.num_steps
        for observer in self.observers:
            observer.started(title=f"training {self.config.model}", first_step=first, num_steps=last)
        try:
            self._note(*self.course.remarks)
            if self.begin:
                done = "; nothing is left to train" if self.begin.step == last else ""
                self._note(f"going on after step {self.begin.step} of {last}{done}")
            self._train(first, last)
        finally:
            for observer in self.observers:
                observer.ended()
        plot_loss(self.rows, self.folder.plot_file, title=f"Training loss of {self.config.model}")
        return self._result()

    def _train(self, first: int, last: int) -> None:
        before = self.begin.seconds if self.begin else 0.0
        self.started_at = self.clock() - before
        self.read_at = self.clock()
        under_way: deque[_Submitted] = deque()
        with ExitStack() as files:
            sinks = self._open_sinks(files)
            for step in range(first, last + 1):
                under_way.append(self._submit(step))
                if len(under_way) > 1:
                    self._read(under_way.popleft(), sinks)
            while under_way:
                self._read(under_way.popleft(), sinks)

    def _open_sinks(self, files: ExitStack) -> _Sinks:
        folder = self.folder
        return _Sinks(
            metrics=files.enter_context(JsonlSink(folder.metrics_file)),
            evaluations=files.enter_context(JsonlSink(folder.evaluations_file)) if self.course.test else None,
            checkpoints=files.enter_context(JsonlSink(folder.checkpoints_file, durable=True)),
        )

    def _submit(self, step: int) -> _Submitted:
        config, last = self.config, step == self.course.plan.num_steps
        data, num_trained = self.course.training.data(self.course.plan.batch(step - 1))
        params = self._adam_params(step)
        forward_backward = self.session.forward_backward(data, LOSS_FN)
        optim_step = self.session.optim_step(params)
        save = evaluation = None
        if last or _is_due(step, config.save_every):
            save = self.session.save(f"step_{step:06d}")
        if self.course.test and (last or _is_due(step, config.eval_every)):
            test_data, _ = self.course.test.data(range(len(self.course.test.examples)))
            evaluation = self.session.forward(test_data, LOSS_FN)
        return _Submitted(
            step=step,
            learning_rate=params.learning_rate,
            num_tokens=sum(datum.model_input.length for datum in data),
            num_trained=num_trained,
            forward_backward=forward_backward,
            optim_step=optim_step,
            save=save,
            evaluation=evaluation,
        )

    def _adam_params(self, step: int) -> AdamParams:
        config = self.config
        return AdamParams(
            learning_rate=learning_rate(
                config.lr_schedule,
                peak=config.learning_rate,
                step=step - 1,
                num_steps=self.course.plan.num_steps,
                warmup_steps=config.warmup_steps,
            ),
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            grad_clip_norm=config.grad_clip_norm,
        )

    def _read(self, submitted: _Submitted, sinks: _Sinks) -> None:
        """Wait for one step and write it down; its checkpoint last, so that the rows before a checkpoint are there."""
        loss = submitted.forward_backward.result().loss_sum
        optimizer_metrics = submitted.optim_step.result().metrics or {}
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss of step {submitted.step} is {loss!r}; lower learning_rate={self.config.learning_rate!r}"
            )
        row = self._row(submitted, loss, optimizer_metrics.get("grad_norm:mean"))
        self.rows.append(row)
        sinks.metrics.write(row.as_dict())
        for observer in self.observers:
            observer.stepped(row)
        if submitted.evaluation is not None and sinks.evaluations is not None:
            self.test_loss = submitted.evaluation.result().loss_sum
            sinks.evaluations.write({"step": row.step, "test_loss": self.test_loss})
            self._note(f"step {row.step}: test loss {self.test_loss:.4f}")
        if submitted.save is not None:
            self.checkpoint = self._record(row, submitted.save.result())
            sinks.checkpoints.write(checkpoint_row(self.checkpoint))
            self._note(f"step {row.step}: saved {self.checkpoint.sampler_path}")

    def _record(self, row: StepRow, paths: CheckpointPaths) -> CheckpointRecord:
        return CheckpointRecord(
            step=row.step,
            name=f"step_{row.step:06d}",
            run_id=self.session.run_id,
            state_path=paths.state,
            sampler_path=paths.sampler,
            seconds=row.seconds,
        )

    def _row(self, submitted: _Submitted, loss: float, grad_norm: float | None) -> StepRow:
        before, self.read_at = self.read_at, self.clock()
        return StepRow(
            step=submitted.step,
            epoch=self.course.plan.epoch_of(submitted.step - 1) + 1,
            loss=loss,
            loss_sum=loss * submitted.num_trained,
            tokens=submitted.num_tokens,
            tokens_per_s=submitted.num_tokens / max(self.read_at - before, 1e-9),
            learning_rate=submitted.learning_rate,
            grad_norm=grad_norm,
            seconds=self.read_at - self.started_at,
        )

    def _note(self, *texts: str) -> None:
        for text in texts:
            for observer in self.observers:
                observer.noted(text)

    def _result(self) -> SupervisedResult:
        assert self.checkpoint is not None, "the last step always saves"
        tokens, seconds = sum(row.tokens for row in self.rows), self.rows[-1].seconds
        return SupervisedResult(
            output=self.folder.path,
            run_id=self.checkpoint.run_id,
            steps=self.rows[-1].step,
            loss_first=self.rows[0].loss,
            loss_last=self.rows[-1].loss,
            test_loss=self.test_loss,
            tokens=tokens,
            tokens_per_s=tokens / max(seconds, 1e-9),
            seconds=seconds,
            checkpoint=self.checkpoint,
        )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
