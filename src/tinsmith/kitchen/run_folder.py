"""The folder a run writes, and what is read back from it to go on.

    config.json         the complete config
    manifest.json       versions, data hash and counts, seed, where it trained
    metrics.jsonl       one StepRow per step
    rollouts.jsonl      one row per episode, of workflows that sample: prompt, answer, reward, which weights drew it
    evaluations.jsonl   {"step", "test_loss"}, if a test set was held out
    checkpoints.jsonl   one CheckpointRecord per save; the last one is where a resumed run begins
    loss.png
    report.html         all of it for a reader, in one file

A checkpoint's row is written after the rows of all steps before it, and a resumed run first drops every row after the
checkpoint it begins at: each file always tells one story.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tinsmith.kitchen.errors import RunFolderError
from tinsmith.observe import StepRow, keep_rows, read_jsonl

CONFIG: Final = "config.json"
STORE_MARK: Final = "registry.sqlite3"
"""A file that every store of a server has."""
DEFAULT_PARENT: Final = Path("runs")
RUN_ENTRIES: Final = frozenset(
    (
        CONFIG,
        "manifest.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "checkpoints.jsonl",
        "rollouts.jsonl",
        "loss.png",
        "report.html",
        "checkpoints",
    )
)
"""Every name that a run may write into its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    step: int
    """Optimizer steps behind it."""
    name: str
    run_id: str
    state_path: str
    """Weights and optimizer: a resumed run begins here."""
    sampler_path: str
    """Weights to sample from."""
    seconds: float
    """Of training, up to here."""
    cursor: Mapping[str, int] = field(default_factory=dict)
    """The iteration of the workflow after which a resumed run goes on."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """What else a resumed run must know."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / CONFIG

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def checkpoints_file(self) -> Path:
        return self.path / "checkpoints.jsonl"

    @property
    def rollouts_file(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def plot_file(self) -> Path:
        return self.path / "loss.png"

    @property
    def store(self) -> Path:
        """Where an embedded server keeps the checkpoints of this run."""
        return self.path / "checkpoints"

    @classmethod
    def is_run(cls, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def check_fresh(self) -> None:
        """Raises `RunFolderError` unless a new run may be written here."""
        if self.is_run(self.path):
            raise RunFolderError(
                f"{str(self.path)!r} already holds a run; give another output, or go on with it by resume=true"
            )
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{str(self.path)!r} is a file; give another output")
        if self.path.exists() and any(path != self.store or not self._is_store() for path in self.path.iterdir()):
            raise RunFolderError(f"{str(self.path)!r} holds something that is no run of ours; give another output")

    def _is_store(self) -> bool:
        """Whether `store` is what an embedded server left behind when its run ended before it began."""
        return self.store.is_dir() and (not any(self.store.iterdir()) or (self.store / STORE_MARK).exists())

    def create(self, *, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Raises `RunFolderError` if another run has begun here since `check_fresh`: two must not share their rows."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self.manifest_file.touch(exist_ok=False)
        except FileExistsError:
            raise RunFolderError(f"another run has begun in {str(self.path)!r}; give another output") from None
        _write_json(self.manifest_file, manifest)
        _write_json(self.config_file, config)

    def read_config(self) -> dict[str, Any]:
        """Raises `RunFolderError` if there is no run."""
        if not self.is_run(self.path):
            raise RunFolderError(f"{str(self.path)!r} holds no run: it has no {CONFIG}")
        return _read_json(self.config_file)

    def read_manifest(self) -> dict[str, Any]:
        """Raises `RunFolderError` if it is missing or damaged."""
        return _read_json(self.manifest_file)

    def rows(self) -> list[StepRow]:
        return [StepRow.from_dict(row) for row in read_jsonl(self.metrics_file)]

    def checkpoints(self) -> list[CheckpointRecord]:
        return [CheckpointRecord(**row) for row in read_jsonl(self.checkpoints_file)]

    def evaluations(self) -> list[dict[str, Any]]:
        return read_jsonl(self.evaluations_file)

    def rollouts(self) -> list[dict[str, Any]]:
        return read_jsonl(self.rollouts_file)

    def rewind(self, step: int) -> None:
        """Forget everything after `step`."""
        for file in (self.metrics_file, self.evaluations_file, self.rollouts_file, self.checkpoints_file):
            if file.exists():
                keep_rows(file, lambda row: row["step"] <= step)


def free_folder(stem: str, parent: Path = DEFAULT_PARENT) -> Path:
    """The first of `parent/stem-001`, `-002`, … that does not exist."""
    return next(path for path in _numbered(parent, stem) if not path.exists())


def checkpoint_row(record: CheckpointRecord) -> dict[str, Any]:
    return asdict(record)


def _numbered(parent: Path, stem: str) -> Iterator[Path]:
    number = 1
    while True:
        yield parent / f"{stem}-{number:03d}"
        number += 1


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{str(path)!r} holds no JSON object")
    return value
