"""What a run writes down while it goes: rows into its folder, words to whoever watches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tinsmith.kitchen.errors import RunFolderError, TrainingDiverged
from tinsmith.kitchen.ports import CheckpointPaths
from tinsmith.kitchen.run_folder import CheckpointRecord, RunFolder, checkpoint_row
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.observe import JsonlSink, RunObserver, StepRow

FREE_TO_CHANGE = frozenset(
    {"output", "resume", "base_url", "data", "save_every", "eval_every", "numerics_gate", "register_as"}
)
"""Keys that a resumed run may set otherwise, for they change nothing of what is learned; data is compared by hash."""


class RunLog:
    """The open files of one run. Rows of a step are written before the row of its checkpoint."""

    def __init__(
        self,
        folder: RunFolder,
        observers: Sequence[RunObserver] = (),
        *,
        begin: CheckpointRecord | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.begin = begin
        self.checkpoint = begin
        self.rows: list[StepRow] = []
        self.evaluations: list[dict[str, Any]] = []
        self._observers = tuple(observers)
        self._clock = clock
        self._files = ExitStack()
        self._sinks: dict[str, JsonlSink] = {}
        self._started_at = self._read_at = 0.0
        self._watched = False

    def start(self, title: str, *, num_steps: int, remarks: Sequence[str] = ()) -> None:
        """Begin, or go on after `begin`: rows of later steps must be gone by then."""
        self.rows, self.evaluations = self.folder.rows(), self.folder.evaluations()
        first = (self.begin.step if self.begin else 0) + 1
        self._watched = True
        for observer in self._observers:
            observer.started(title=title, first_step=first, num_steps=num_steps)
        self.note(*remarks)
        if self.begin:
            done = "; nothing is left to train" if self.begin.step == num_steps else ""
            self.note(f"going on after step {self.begin.step} of {num_steps}{done}")
        self._started_at = self._clock() - (self.begin.seconds if self.begin else 0.0)
        self._read_at = self._clock()

    def step(
        self,
        *,
        step: int,
        epoch: int,
        loss: float,
        loss_sum: float,
        tokens: int,
        learning_rate: float,
        grad_norm: float | None,
        metrics: Mapping[str, float] | None = None,
    ) -> StepRow:
        """Write one step down. Raises `TrainingDiverged` if its loss is no finite number."""
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss of step {step} is {loss!r}; lower learning_rate={learning_rate!r}")
        before, self._read_at = self._read_at, self._clock()
        row = StepRow(
            step=step,
            epoch=epoch,
            loss=loss,
            loss_sum=loss_sum,
            tokens=tokens,
            tokens_per_s=tokens / max(self._read_at - before, 1e-9),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            seconds=self._read_at - self._started_at,
            metrics=dict(metrics or {}),
        )
        self.rows.append(row)
        self._sink("metrics").write(row.as_dict())
        for observer in self._observers:
            observer.stepped(row)
        return row

    def evaluated(self, step: int, **values: float) -> None:
        row = {"step": step, **values}
        self.evaluations.append(row)
        self._sink("evaluations").write(row)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        self.note(f"step {step}: {shown}")

    def rollout(self, row: Mapping[str, Any]) -> None:
        self._sink("rollouts").write(row)

    def saved(
        self,
        row: StepRow,
        paths: CheckpointPaths,
        *,
        run_id: str,
        cursor: Mapping[str, int],
        kept: Mapping[str, Any] | None = None,
    ) -> CheckpointRecord:
        """From here on a resumed run goes on after `cursor`."""
        self.checkpoint = CheckpointRecord(
            step=row.step,
            name=checkpoint_name(row.step),
            run_id=run_id,
            state_path=paths.state,
            sampler_path=paths.sampler,
            seconds=row.seconds,
            cursor=dict(cursor),
            kept=dict(kept or {}),
        )
        self._sink("checkpoints").write(checkpoint_row(self.checkpoint))
        self.note(f"step {row.step}: saved {self.checkpoint.sampler_path}")
        return self.checkpoint

    def note(self, *texts: str) -> None:
        for text in texts:
            for observer in self._observers:
                observer.noted(text)

    def end(self) -> None:
        """Close the files and let the watchers go. May be called again."""
        self._files.close()
        self._sinks.clear()
        if self._watched:
            self._watched = False
            for observer in self._observers:
                observer.ended()

    def _sink(self, name: str) -> JsonlSink:
        if name not in self._sinks:
            file = getattr(self.folder, f"{name}_file")
            self._sinks[name] = self._files.enter_context(JsonlSink(file, durable=name == "checkpoints"))
        return self._sinks[name]


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def last_checkpoint(config: TrainingConfig, folder: RunFolder) -> CheckpointRecord | None:
    """Where to go on; `None` if the run ended before its first checkpoint.

    Raises `RunFolderError` if the folder holds no run, or one of another config.
    """
    check_same_config(config, folder)
    checkpoints = folder.checkpoints()
    return checkpoints[-1] if checkpoints else None


def check_same_config(config: TrainingConfig, folder: RunFolder) -> None:
    """Raises `RunFolderError` if the folder holds no run, or one that another config would not have made."""
    then, now = folder.read_config(), config.model_dump(mode="json")
    for key in sorted(now.keys() - (FREE_TO_CHANGE - config.bound_keys())):
        if then.get(key) != now[key]:
            raise RunFolderError(
                f"the run in {str(folder.path)!r} was made with {key}={then.get(key)!r}, not {now[key]!r}; "
                "a resumed run keeps its config"
            )


def check_same_data(folder: RunFolder, *, sha256: str, name: str) -> None:
    """Raises `RunFolderError` if the run in the folder was made with other data."""
    if folder.read_manifest().get("data", {}).get("sha256") != sha256:
        raise RunFolderError(f"{name!r} is not the data that the run in {str(folder.path)!r} was made with")
