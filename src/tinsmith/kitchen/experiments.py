"""Experiments: one recipe under several conditions, each repeated, and what they come to side by side.

    spec = ExperimentSpec(
        name="rates", recipe="sl_basic", config={"epochs": 2}, repeats=3,
        conditions=(Condition(name="low", config={"learning_rate": 1e-4}),
                    Condition(name="high", config={"learning_rate": 3e-3})),
    )
    result = run_experiment(spec, Path("runs/rates"))
    print(result.table())

A repeat has the seed of the config plus its number, the same in every condition. Every run has a folder of its own,
`FOLDER/CONDITION/REPEAT`; what was finished is not run again. A run that fails is tried again, then put on the list of
the dead, and the others go on. All figures go into `FOLDER/metrics.jsonl`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from tinsmith.kitchen.errors import ConfigError, KitchenError
from tinsmith.kitchen.launch import ConnectTo, TrainingResult, run_recipe
from tinsmith.kitchen.ports import MetricRow, MetricsStore
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.run_folder import RunFolder
from tinsmith.kitchen.run_log import check_same_config
from tinsmith.kitchen.running import find
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.observe import JsonlSink, read_jsonl

Values: TypeAlias = dict[str, float]
"""Figures of one run: the loss and metrics of its last step, its last evaluation, its seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """What is set otherwise than in the experiment's config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentSpec:
    """Raises `ConfigError` for a name that comes twice or is no folder's name, and for repeats below 1."""

    name: str
    recipe: str | type[Recipe]
    conditions: tuple[Condition, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of all runs."""
    repeats: int = 1
    retries: int = 1
    """Further attempts at a run that failed."""

    def __post_init__(self) -> None:
        names = [condition.name for condition in self.conditions]
        if not names:
            raise ConfigError(f"experiment {self.name!r} has no conditions")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two conditions of experiment {self.name!r} are named {name!r}")
            if not name or name in (".", "..") or "/" in name:
                raise ConfigError(f"condition {name!r} cannot be the name of a folder")
        for key, least in (("repeats", 1), ("retries", 0)):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < least:
                raise ConfigError(f"{key} must be at least {least}, not {getattr(self, key)!r}")
        _check_keys("config", self.config)
        for condition in self.conditions:
            _check_keys(f"condition {condition.name!r}", condition.config)


def _check_keys(what: str, config: object) -> None:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{what} must hold keys and values, not {config!r}")
    for key in config.keys() & {"output", "resume"}:
        raise ConfigError(f"{key} is given by the experiment: FOLDER/CONDITION/REPEAT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    condition: str
    repeat: int
    """From 0."""
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadTrial:
    trial: Trial
    attempts: int
    error: str


class Hooks(Protocol):
    """Told of every trial, in order."""

    def started(self, trial: Trial, attempt: int) -> None: ...

    def finished(self, trial: Trial, values: Values) -> None: ...

    def died(self, dead: DeadTrial) -> None: ...


class NoHooks:
    def started(self, trial: Trial, attempt: int) -> None: ...

    def finished(self, trial: Trial, values: Values) -> None: ...

    def died(self, dead: DeadTrial) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentResult:
    spec: ExperimentSpec
    values: Mapping[str, Sequence[Values]]
    """By condition, one entry per repeat that came through."""
    dead: tuple[DeadTrial, ...]

    def table(self, metrics: Sequence[str] = ()) -> str:
        """Markdown: a row per condition, mean ± standard deviation (of n - 1) over repeats; all metrics if none."""
        found = dict.fromkeys(name for runs in self.values.values() for run in runs for name in run)
        shown = list(metrics or found)
        lines = [f"| condition | runs | {' | '.join(shown)} |", "|---|---|" + "---|" * len(shown)]
        for condition in self.spec.conditions:
            runs = self.values[condition.name]
            cells = [_cell([run[name] for run in runs if name in run]) for name in shown]
            lines.append(f"| {condition.name} | {len(runs)}/{self.spec.repeats} | {' | '.join(cells)} |")
        lines += [f"\n{dead.trial.condition} {dead.trial.repeat} failed: {dead.error}" for dead in self.dead]
        return "\n".join(lines)


def _cell(numbers: Sequence[float]) -> str:
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.4g}{spread}"


def run_experiment(
    spec: ExperimentSpec,
    folder: Path,
    connect: ConnectTo[TrainingConfig] | None = None,
    *,
    adapters: Mapping[str, Any] | None = None,
    store: MetricsStore | None = None,
    hooks: Hooks | None = None,
    clock: Callable[[], float] = time.time,
) -> ExperimentResult:
    """Run what has not been run. `connect` is by default that of the command line: a server, or an engine in here.

    Before anything runs, raises `ConfigError` for a condition whose config is wrong, and `RunFolderError` for one that
    was run with another config.
    """
    from tinsmith.kitchen.adapters.files import JsonlMetrics

    recipe, told = _recipe(spec), hooks or NoHooks()
    kept = store or JsonlMetrics(folder / "metrics.jsonl")
    for condition in spec.conditions:
        for repeat in range(spec.repeats):
            own = RunFolder(folder / condition.name / str(repeat))
            config = _config(spec, recipe, condition, repeat=repeat, output=own.path)
            if own.is_run(own.path):
                check_same_config(config, own)
    values: dict[str, list[Values]] = {condition.name: [] for condition in spec.conditions}
    dead: list[DeadTrial] = []
    for condition in spec.conditions:
        for repeat in range(spec.repeats):
            trial = Trial(condition=condition.name, repeat=repeat, folder=folder / condition.name / str(repeat))
            found = _finished(kept, spec, trial)
            if found is None:
                outcome = _attempts(spec, recipe, condition, trial, connect or _connect, adapters, told)
                if isinstance(outcome, DeadTrial):
                    dead.append(outcome)
                    _bury(folder, outcome)
                    told.died(outcome)
                    continue
                found = _values_of(outcome)
                _keep(kept, spec, trial, found, clock())
            values[condition.name].append(found)
            told.finished(trial, found)
    return ExperimentResult(spec=spec, values=values, dead=tuple(dead))


def read_dead(folder: Path) -> list[dict[str, Any]]:
    """The list of the dead of an experiment's folder: condition, repeat, attempts, error; oldest first."""
    return read_jsonl(folder / "dead.jsonl")


def _recipe(spec: ExperimentSpec) -> type[Recipe]:
    found = find(spec.recipe)
    if not isinstance(found, type):
        raise ConfigError(f"an experiment needs a recipe, not {found!r}")
    return found


def _config(
    spec: ExperimentSpec, recipe: type[Recipe], condition: Condition, *, repeat: int, output: Path
) -> TrainingConfig:
    values = {**spec.config, **condition.config}
    try:
        made = recipe.make({**values, "output": output})
    except ConfigError as error:
        raise ConfigError(f"condition {condition.name!r}: {error}") from error
    if not isinstance(made, TrainingConfig):
        raise ConfigError(f"recipe {recipe.name!r} has no training config")
    return made.model_copy(update={"seed": made.seed + repeat})


def _attempts(
    spec: ExperimentSpec,
    recipe: type[Recipe],
    condition: Condition,
    trial: Trial,
    connect: ConnectTo[TrainingConfig],
    adapters: Mapping[str, Any] | None,
    hooks: Hooks,
) -> TrainingResult | DeadTrial:
    """A second attempt goes on after the first one's last checkpoint."""
    error: Exception | None = None
    for attempt in range(spec.retries + 1):
        hooks.started(trial, attempt)
        config = _config(spec, recipe, condition, repeat=trial.repeat, output=trial.folder)
        if RunFolder.is_run(trial.folder):
            config = config.model_copy(update={"resume": True})
        try:
            return run_recipe(recipe, config, connect, adapters=adapters)
        except Exception as failed:  # noqa: BLE001 - a task's boundary: one bad trial must not end the others
            error = failed
    return DeadTrial(trial=trial, attempts=spec.retries + 1, error=f"{type(error).__name__}: {error}")


def _connect(config: TrainingConfig, folder: RunFolder) -> Any:
    from tinsmith.kitchen.adapters.tinker_training import open_backend

    return open_backend(base_url=config.base_url, model=config.model, store=folder.store)


def _values_of(result: TrainingResult) -> Values:
    last = result.rows[-1]
    evaluated = result.evaluations[-1] if result.evaluations else {}
    values = {"loss": last.loss, **last.metrics, **evaluated, "seconds": last.seconds}
    return {name: float(value) for name, value in values.items() if name != "step" and math.isfinite(value)}


def _run_id(spec: ExperimentSpec, trial: Trial) -> str:
    return f"{spec.name}/{trial.condition}/{trial.repeat}"


def _keep(store: MetricsStore, spec: ExperimentSpec, trial: Trial, values: Values, now: float) -> None:
    """All of a trial's rows and then the one that says that it is whole."""
    rows = {**values, "finished": 1.0}
    for name, value in rows.items():
        metadata = {"experiment": spec.name, "condition": trial.condition, "repeat": trial.repeat}
        store.record(
            MetricRow(run_id=_run_id(spec, trial), metric=name, value=value, step=0, timestamp=now, metadata=metadata)
        )
    store.flush()


def _finished(store: MetricsStore, spec: ExperimentSpec, trial: Trial) -> Values | None:
    found = {row.metric: row.value for row in store.read(_run_id(spec, trial))}
    return found if found.pop("finished", None) else None


def _bury(folder: Path, dead: DeadTrial) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with JsonlSink(folder / "dead.jsonl", durable=True) as sink:
        sink.write(
            {
                "condition": dead.trial.condition,
                "repeat": dead.trial.repeat,
                "attempts": dead.attempts,
                "error": dead.error,
            }
        )


def read_spec(path: Path) -> ExperimentSpec:
    """An experiment from a TOML, YAML or JSON file: name, recipe, repeats, retries, config, conditions by name.

    Raises `ConfigError` naming what is wrong.
    """
    from tinsmith.kitchen.config import read_config_file

    values = dict(read_config_file(path))
    conditions = values.pop("conditions", None)
    known = {"name", "recipe", "repeats", "retries", "config"}
    if unknown := values.keys() - known:
        keys = ", ".join(sorted({*known, "conditions"}))
        raise ConfigError(f"{path}: unknown key {sorted(unknown)[0]!r}; the keys are {keys}")
    if "recipe" not in values or not isinstance(conditions, Mapping):
        raise ConfigError(f"{path}: 'recipe' and a table 'conditions' are required")
    made = tuple(Condition(name=name, config=config) for name, config in conditions.items())
    try:
        return ExperimentSpec(**{"name": path.stem, **values}, conditions=made)
    except TypeError as error:
        raise KitchenError(f"{path}: {error}") from error
