"""Checkpoints as recovery uses them: when they are saved, what is written beside them, which are kept, which is taken.

What is recorded travels in the checkpoint's `user_metadata`, so it survives client and server, and any Tinker server
can hold it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tinsmith.client.errors import NotFoundError, TinkerError
from tinsmith.client.futures import APIFuture
from tinsmith.client.rest import RestClient
from tinsmith.types.checkpoint import Checkpoint, ParsedCheckpointTinkerPath

if TYPE_CHECKING:
    from tinsmith.client.training import TrainingClient
    from tinsmith.recovery.policy import CheckpointStrategy
    from tinsmith.types.rest import SaveWeightsResponse

logger = logging.getLogger("tinsmith.recovery")

_PREFIX = "tinsmith."
_TIMEOUT_S = 600.0
_PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """`all` saves every step; `steps` every `save_every`; `epoch` every `steps_per_epoch`; `best` whenever the metric
    improves; `last` only at the end. Whatever the strategy, step 0 and the last step are saved: there is always
    something to return to.

    Raises `ValueError` naming a field whose value cannot work.
    """

    strategy: Literal["steps", "epoch", "best", "last", "all"] = "steps"
    save_every: int = 100
    steps_per_epoch: int | None = None
    keep_last: int = 5
    """Older ones are deleted; the best one stays."""
    save_best: bool = False
    """Beside the strategy, save whenever the metric improves."""
    best_metric: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    name: str = "recovery"
    """Names start with it: `recovery-00000100`."""
    ttl_seconds: int | None = None

    def __post_init__(self) -> None:
        for name in ("save_every", "keep_last", "steps_per_epoch"):
            value = getattr(self, name)
            if name == "steps_per_epoch" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.strategy == "epoch" and self.steps_per_epoch is None:
            raise ValueError("strategy 'epoch' needs steps_per_epoch")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be min or max, not {self.best_mode!r}")
        if self.strategy not in ("steps", "epoch", "best", "last", "all"):
            raise ValueError(f"strategy must be steps, epoch, best, last or all, not {self.strategy!r}")

    def is_due(self, step: int) -> bool:
        """Whether the strategy saves after `step` steps, apart from improvements of the metric."""
        match self.strategy:
            case "all":
                return True
            case "steps":
                return step % self.save_every == 0
            case "epoch":
                return step % (self.steps_per_epoch or 1) == 0
        return False

    @property
    def saves_best(self) -> bool:
        return self.save_best or self.strategy == "best"

    def is_better(self, value: float, best: float | None) -> bool:
        if not math.isfinite(value):
            return False
        return best is None or (value < best if self.best_mode == "min" else value > best)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCheckpoint:
    """A checkpoint and what recovery wrote beside it."""

    path: str
    step: int | None
    """Optimizer steps taken when it was saved; `None` for checkpoints that others saved."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_name: str | None = None
    parent: str | None = None
    """The checkpoint before it in the same lineage."""
    time: float
    """Seconds since 1970."""

    @property
    def loss(self) -> float | None:
        return self.metrics.get("loss")

    @property
    def run_id(self) -> str:
        return ParsedCheckpointTinkerPath.from_tinker_path(self.path).training_run_id

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> RecordedCheckpoint:
        told = checkpoint.user_metadata or {}
        metrics = {
            key.removeprefix(_PREFIX + "metric."): value
            for key, text in told.items()
            if key.startswith(_PREFIX + "metric.") and (value := _number(text)) is not None
        }
        step = told.get(_PREFIX + "step", "")
        return cls(
            path=checkpoint.tinker_path,
            step=int(step) if step.isdecimal() else None,
            metrics=metrics,
            run_name=told.get(_PREFIX + "run"),
            parent=told.get(_PREFIX + "parent"),
            time=checkpoint.time.timestamp(),
        )

    def as_metadata(self) -> dict[str, str]:
        told: dict[str, str | None] = {
            "step": None if self.step is None else str(self.step),
            "run": self.run_name,
            "parent": self.parent,
            **{f"metric.{name}": repr(float(value)) for name, value in self.metrics.items()},
        }
        return {_PREFIX + key: value for key, value in told.items() if value is not None}


def select_checkpoint(
    checkpoints: Sequence[RecordedCheckpoint], strategy: CheckpointStrategy
) -> tuple[RecordedCheckpoint | None, str]:
    """The checkpoint that a strategy takes, and how it came to it.

    `latest` takes the one saved last, of those that tell their step if there are any; `best_loss` the smallest recorded
    loss, and the latest checkpoint where none is recorded; a specific path need not be among `checkpoints`. `None` if
    there is nothing to take.
    """
    if isinstance(strategy, tuple):
        path = strategy[1]
        ParsedCheckpointTinkerPath.from_tinker_path(path)
        known = next((one for one in checkpoints if one.path == path), None)
        return known or RecordedCheckpoint(path=path, step=None, time=0.0), "specific"
    if not checkpoints:
        return None, "none"
    latest = max(checkpoints, key=_newness)
    if strategy == "latest":
        return latest, "latest"
    scored = [(one.loss, one) for one in checkpoints if one.loss is not None and math.isfinite(one.loss)]
    if not scored:
        return latest, "latest_for_want_of_losses"
    return min(scored, key=lambda pair: (pair[0], -(pair[1].step or 0)))[1], "best_loss"


def recorded_checkpoints(rest: RestClient) -> list[RecordedCheckpoint]:
    """All of the user's checkpoints that can be continued from, newest first."""
    found: list[Checkpoint] = []
    while True:
        page = rest.list_user_checkpoints(limit=_PAGE, offset=len(found)).result(_TIMEOUT_S).checkpoints
        found += page
        if len(page) < _PAGE:
            return [RecordedCheckpoint.of(one) for one in found if one.checkpoint_type == "training"]


class CheckpointKeeper:
    """Saves, and deletes what need not be kept. One per run of `Recovery`; use from one thread."""

    def __init__(self, policy: CheckpointPolicy, run_name: str) -> None:
        self._policy = policy
        self._run_name = run_name
        self._kept: list[RecordedCheckpoint] = []
        self._best: float | None = None
        self._pending: tuple[APIFuture[SaveWeightsResponse], RecordedCheckpoint] | None = None

    @property
    def checkpoints(self) -> list[RecordedCheckpoint]:
        """Saved and not deleted, oldest first."""
        return list(self._kept)

    def wants(self, step: int, metrics: Mapping[str, float], *, is_last: bool) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step == 0 or is_last or self._policy.is_due(step) or self._improves(metrics)

    def save(self, client: TrainingClient, step: int, metrics: Mapping[str, float], *, now: float) -> None:
        """Ask for a checkpoint of the weights as they are now; does not wait for it."""
        if self._improves(metrics):
            self._best = metrics[self._policy.best_metric]
        name = f"{self._policy.name}-{step:08d}"
        record = RecordedCheckpoint(
            path=f"tinker://{client.model_id}/weights/{name}",
            step=step,
            metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
            run_name=self._run_name,
            parent=self._kept[-1].path if self._kept else None,
            time=now,
        )
        saving = client.save_state(
            name, ttl_seconds=self._policy.ttl_seconds, overwrite=True, user_metadata=record.as_metadata()
        )
        self._pending = (saving, record)

    def settle(self) -> RecordedCheckpoint | None:
        """Wait for the checkpoint asked for last. Raises what it failed with."""
        if self._pending is None:
            return None
        (saving, record), self._pending = self._pending, None
        saved = RecordedCheckpoint(
            path=saving.result(_TIMEOUT_S).path,
            step=record.step,
            metrics=record.metrics,
            run_name=record.run_name,
            parent=record.parent,
            time=record.time,
        )
        self._kept = [one for one in self._kept if one.path != saved.path] + [saved]
        return saved

    def rewound_to(self, checkpoint: RecordedCheckpoint) -> None:
        """Training goes on from `checkpoint`: what was asked for and not had is forgotten, so are later ones."""
        self._pending = None
        at = next((i for i, one in enumerate(self._kept) if one.path == checkpoint.path), None)
        self._kept = [checkpoint] if at is None else self._kept[: at + 1]
        scores = [one.metrics.get(self._policy.best_metric) for one in self._kept]
        self._best = None
        for score in scores:
            if score is not None and self._policy.is_better(score, self._best):
                self._best = score

    def retain(self, rest: RestClient) -> list[str]:
        """Delete what the policy does not keep; the paths that went. A failure to delete is logged, not raised."""
        best = self._best_kept()
        old = [one for one in self._kept[: -self._policy.keep_last] if one is not best]
        gone = []
        for one in old:
            try:
                rest.delete_checkpoint_from_tinker_path(one.path).result(_TIMEOUT_S)
            except NotFoundError:
                pass
            except TinkerError as error:
                logger.warning("checkpoint %s could not be deleted: %s", one.path, error)
                continue
            gone.append(one.path)
        self._kept = [one for one in self._kept if one.path not in gone]
        return gone

    def _improves(self, metrics: Mapping[str, float]) -> bool:
        value = metrics.get(self._policy.best_metric)
        return self._policy.saves_best and value is not None and self._policy.is_better(value, self._best)

    def _best_kept(self) -> RecordedCheckpoint | None:
        best: RecordedCheckpoint | None = None
        score: float | None = None
        for one in self._kept:
            value = one.metrics.get(self._policy.best_metric)
            if value is not None and self._policy.is_better(value, score):
                best, score = one, value
        return best


def _newness(checkpoint: RecordedCheckpoint) -> tuple[bool, float, int]:
    """By time, not by step: a branch that a recovery went back from may have come further than the one that lives."""
    return (checkpoint.step is not None, checkpoint.time, checkpoint.step or 0)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
