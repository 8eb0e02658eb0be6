"""What a stage is given and gives back: an immutable context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

from pydantic import BaseModel

from tinsmith.kitchen.errors import AdapterError, ConfigError, WorkflowError, nearest
from tinsmith.kitchen.telemetry import Telemetry

_MISSING: Final = object()


class Settings(Mapping[str, Any]):
    """Values by name, read as keys or attributes: a config without a type, the state of a run, options of a stage."""

    __slots__ = ("_values", "_what")

    def __init__(self, values: Mapping[str, Any] | None = None, *, what: str = "config") -> None:
        self._values = dict(values or {})
        self._what = what

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            known = ", ".join(map(repr, self._values)) or "nothing"
            raise AttributeError(
                f"{self._what} has no {name!r}{nearest(name, self._values)} (it has {known})"
            ) from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._values!r})"

    def with_values(self, values: Mapping[str, Any], *, drop: tuple[str, ...] = ()) -> Settings:
        merged = {key: value for key, value in {**self._values, **values}.items() if key not in drop}
        return Settings(merged, what=self._what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    value: float
    step: int | None = None


@dataclass(frozen=True, slots=True)
class MetricLog:
    """What stages recorded, oldest first. Adding to it gives another log and leaves this one as it was."""

    _newest: tuple[Metric, Any] | None = None

    def add(self, metric: Metric) -> MetricLog:
        return MetricLog((metric, self._newest))

    def __iter__(self) -> Iterator[Metric]:
        found, cell = [], self._newest
        while cell is not None:
            metric, cell = cell
            found.append(metric)
        return reversed(found)

    def since(self, earlier: MetricLog) -> list[Metric]:
        """What was added after `earlier`, which this log grew out of."""
        found, cell = [], self._newest
        while cell is not None and cell is not earlier._newest:
            metric, cell = cell
            found.append(metric)
        return found[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One enclosing construct and, for a loop, the index (from 0) it stands at."""

    name: str
    index: int | None = None

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    run_id: str
    started_at: str
    """ISO 8601, UTC."""
    seed: int = 0
    resumed: Mapping[str, Any] | None = None
    """The checkpoint record that this run goes on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Stages read it and return a changed copy; nothing else passes between them."""

    config: Any
    """A recipe's config, or `Settings`: `ctx.config.epochs`."""
    adapters: Mapping[str, Any]
    state: Settings = field(default_factory=lambda: Settings(what="state"))
    metrics: MetricLog = field(default_factory=MetricLog)
    metadata: RunInfo
    telemetry: Telemetry
    path: tuple[Place, ...] = ()
    """Where in the workflow this is."""
    current_stage: str = ""
    stage_opts: Settings = field(default_factory=lambda: Settings(what="stage options"))

    # -- adapters -----------------------------------------------------------------------------------------------------

    def get_adapter(self, port: str) -> Any:
        """Raises `AdapterError` if there is none."""
        if port not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise AdapterError(f"no adapter for {port!r}{nearest(port, self.adapters)}; there are {known}")
        return self.adapters[port]

    # -- state --------------------------------------------------------------------------------------------------------

    def get_state(self, key: str, default: Any = _MISSING) -> Any:
        """Raises `WorkflowError` if no stage has put it there and there is no default."""
        if key in self.state:
            return self.state[key]
        if default is _MISSING:
            raise WorkflowError(
                f"no stage before {self.where!r} has put {key!r} into the state{nearest(key, self.state)}"
            )
        return default

    def put_state(self, key: str, value: Any) -> Context:
        return self.put(**{key: value})

    def put(self, **values: Any) -> Context:
        return replace(self, state=self.state.with_values(values))

    def drop_state(self, *keys: str) -> Context:
        return replace(self, state=self.state.with_values({}, drop=keys))

    # -- what is reported ---------------------------------------------------------------------------------------------

    def record_metric(self, name: str, value: float, step: int | None = None) -> Context:
        return replace(self, metrics=self.metrics.add(Metric(name=name, value=float(value), step=step)))

    def emit(self, event: str, measurements: Mapping[str, float] | None = None, /, **metadata: Any) -> None:
        self.telemetry.emit(event, measurements, **metadata)

    @property
    def plain_config(self) -> dict[str, Any]:
        """As JSON has it where the config is typed; else its values."""
        config = self.config
        return dict(config.model_dump(mode="json") if isinstance(config, BaseModel) else config or {})

    # -- randomness: a function of the seed and the place, so that a resumed run draws what it would have drawn -------

    def rng(self, *purpose: object) -> Random:
        return Random(f"tinsmith/{self.metadata.seed}/{self.where}/{purpose!r}")

    def draw_seed(self, *purpose: object) -> int:
        """For backends: from 0 to 2**31 - 1."""
        text = f"tinsmith/{self.metadata.seed}/{self.where}/{purpose!r}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    # -- where it is --------------------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        return "/".join([*map(str, self.path), *([self.current_stage] if self.current_stage else [])])

    @property
    def indices(self) -> dict[str, int]:
        return {place.name: place.index for place in self.path if place.index is not None}

    @property
    def cursor(self) -> dict[str, int]:
        """Where a run goes on that was stored in this iteration: paths of the enclosing loops to their indices."""
        names, cursor = [], {}
        for place in self.path:
            names.append(place.name)
            if place.index is not None:
                cursor["/".join(names)] = place.index
        return cursor


def as_settings(config: Mapping[str, Any] | None) -> Settings:
    """Raises `ConfigError` for keys that are no names."""
    for key in config or {}:
        if not isinstance(key, str) or not key.isidentifier():
            raise ConfigError(f"config key {key!r} is no name")
    return Settings(config, what="config")
