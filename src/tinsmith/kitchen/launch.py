"""Runs of shipped recipes with a folder: what the command line and `run_supervised` call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from tinsmith.kitchen.backend import DeferredBackend
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import NothingTrained, StageError
from tinsmith.kitchen.ports import TrainingBackend
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.recipes.feedback import FeedbackConfig
from tinsmith.kitchen.recipes.supervised import Supervised, SupervisedConfig
from tinsmith.kitchen.run_folder import CheckpointRecord, RunFolder
from tinsmith.kitchen.run_log import RunLog
from tinsmith.kitchen.running import blocking, carry_out, folder_for, prepare, with_state
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.observe import RunObserver, StepRow

C = TypeVar("C", bound=TrainingConfig)
ConnectTo: TypeAlias = Callable[[C, RunFolder], TrainingBackend]
"""Opens the backend once it is known where the run's folder is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    output: Path
    run_id: str
    rows: Sequence[StepRow]
    evaluations: Sequence[Mapping[str, Any]]
    checkpoint: CheckpointRecord
    artifacts: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Of training; loading is not counted."""
        return self.rows[-1].seconds

    @property
    def tokens(self) -> int:
        """Read by the model over the whole run."""
        return sum(row.tokens for row in self.rows)


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


def run_recipe(
    recipe: type[Recipe],
    config: C,
    connect: ConnectTo[C],
    *,
    name: str | None = None,
    adapters: Mapping[str, Any] | None = None,
    observers: Sequence[RunObserver] = (),
    clock: Callable[[], float] = time.monotonic,
) -> TrainingResult:
    """Train as `config` says. Nothing is written before data and config are known to fit.

    `name` is what the run goes by in its manifest and with the server; `adapters` replace those for files.

    Raises what the stages raise, with a note that names the stage; and `ConfigError`, `RunFolderError`; and
    `NothingTrained` if the workflow found no reason to.
    """
    folder = folder_for(config, name or recipe.name)
    backend = DeferredBackend(lambda: connect(config, folder))
    files = _file_adapters(config, folder, adapters or {})
    backends = {"training_client": backend, "sampling_client": backend}
    prepared = prepare(
        recipe, config, adapters={**files, **backends, **(adapters or {})}, observers=observers, folder=folder
    )
    prepared = with_state(prepared, clock=clock, recipe=name or recipe.name)
    try:
        done = blocking(lambda: carry_out(prepared))
    except BaseException as error:
        backend.close(failed=True)
        if isinstance(error, StageError):
            error.cause.add_note(f"in stage {error.stage_path}")
            raise error.cause from error.cause.__cause__
        raise
    backend.close()
    return _result(done)


def _file_adapters(config: TrainingConfig, folder: RunFolder, given: Mapping[str, Any]) -> dict[str, Any]:
    """Files in the places that the config names, for ports that nothing else was given for."""
    from tinsmith.kitchen.adapters.datasets import FileDatasets
    from tinsmith.kitchen.adapters.files import FolderBlobs, FolderRegistry, JsonlFeedback

    found: dict[str, Any] = {"dataset_store": FileDatasets()}
    if config.register_as is not None and "model_registry" not in given:
        found["model_registry"] = FolderRegistry(folder.path.parent)
    if isinstance(config, FeedbackConfig):
        if "feedback_client" not in given:
            found["feedback_client"] = JsonlFeedback(config.data)
        if "blob_store" not in given:
            found["blob_store"] = FolderBlobs(config.data.parent / "feedback_loop")
    return found


def run_supervised(
    config: SupervisedConfig,
    connect: ConnectTo[SupervisedConfig],
    *,
    recipe: str = "supervised",
    observers: Sequence[RunObserver] = (),
    clock: Callable[[], float] = time.monotonic,
) -> SupervisedResult:
    """Fine-tune as `config` says. `recipe` is the name under which the run goes into its manifest and to the server.

    Raises `DataError`, `RenderError`, `ConfigError`, `RunFolderError`, `TrainingDiverged`, and what the backend raises.
    """
    found = run_recipe(Supervised, config, connect, name=recipe, observers=observers, clock=clock)
    return SupervisedResult(
        output=found.output,
        run_id=found.run_id,
        steps=found.rows[-1].step,
        loss_first=found.rows[0].loss,
        loss_last=found.rows[-1].loss,
        test_loss=float(found.evaluations[-1]["test_loss"]) if found.evaluations else None,
        tokens=found.tokens,
        tokens_per_s=found.tokens / max(found.seconds, 1e-9),
        seconds=found.seconds,
        checkpoint=found.checkpoint,
    )


def _result(ctx: Context) -> TrainingResult:
    if "log" not in ctx.state:
        raise NothingTrained(f"nothing was trained: {ctx.state.outcome}")
    log: RunLog = ctx.state.log
    assert log.checkpoint is not None, "the last step always saves"
    return TrainingResult(
        output=log.folder.path,
        run_id=log.checkpoint.run_id,
        rows=tuple(log.rows),
        evaluations=tuple(log.evaluations),
        checkpoint=log.checkpoint,
        artifacts=dict(ctx.state.artifacts),
    )
