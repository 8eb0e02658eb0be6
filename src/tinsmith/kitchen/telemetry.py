"""Events of a run, and who listens.

An event has a name under `crucible_kitchen.`, measurements (numbers) and metadata. A run tells its own listeners and
those that `attach_telemetry` has added to this process; they are called in the order of the run, from its thread.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TextIO, TypeAlias

from tinsmith.kitchen.errors import ConfigError, nearest
from tinsmith.observe import JsonlSink

PREFIX: Final = "crucible_kitchen."
EVENTS: Final = (
    "workflow.run.start", "workflow.run.stop", "workflow.run.exception",
    "stage.run.start", "stage.run.stop", "stage.run.exception",
    "training.step", "training.epoch", "training.checkpoint",
    "eval.complete", "model.registered", "dataset.load", "dataset.batch", "gate.passed",
    "dpo.step", "rl.rollout", "rl.step", "distillation.step", "feedback.trigger",
)  # fmt: skip
"""Every event that exists, without the prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    name: str
    """With the prefix: `crucible_kitchen.training.step`."""
    time: float
    """Seconds since the epoch."""
    measurements: Mapping[str, float]
    metadata: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"event": self.name, "time": self.time, "measurements": dict(self.measurements), **self.metadata}


Handler: TypeAlias = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """Where a run sends its events; with `enabled` false, nowhere at all."""

    run_id: str
    enabled: bool = True
    handlers: tuple[Handler, ...] = ()
    clock: Callable[[], float] = field(default=time.time)

    def emit(self, name: str, measurements: Mapping[str, float] | None = None, /, **metadata: Any) -> None:
        """Raises `ValueError` for a name that is none of `EVENTS`."""
        if name not in EVENTS:
            raise ValueError(f"event {name!r} is unknown{nearest(name, EVENTS)}")
        if not self.enabled:
            return
        event = Event(
            name=PREFIX + name,
            time=self.clock(),
            measurements=measurements or {},
            metadata={"run_id": self.run_id, **metadata},
        )
        for handler in (*self.handlers, *(attached.handler for attached in _ATTACHED.values())):
            handler(event)


class ConsoleHandler:
    """One line per event on standard error; stages are left out unless `stages`."""

    def __init__(self, *, stages: bool = False, stream: TextIO | None = None) -> None:
        self._stages = stages
        self._stream = stream

    def __call__(self, event: Event) -> None:
        if event.name.startswith(f"{PREFIX}stage.") and not self._stages and not event.name.endswith("exception"):
            return
        values = {**event.measurements, **{k: v for k, v in event.metadata.items() if k not in ("run_id", "config")}}
        text = "  ".join(f"{key}={_short(value)}" for key, value in values.items())
        print(f"{event.name.removeprefix(PREFIX):24} {text}".rstrip(), file=self._stream or sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class JsonlHandler:
    """Appends every event to a file, one JSON object per line; what JSON lacks is written as text."""

    def __init__(self, *, path: Path | str) -> None:
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._sink = JsonlSink(place)

    def __call__(self, event: Event) -> None:
        self._sink.write(json.loads(json.dumps(event.as_dict(), default=str), parse_constant=str))

    def close(self) -> None:
        self._sink.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attached:
    handler: Handler
    close: Callable[[], None]


_ATTACHED: Final[dict[int, _Attached]] = {}
_NUMBERS = itertools.count(1)


class ClosableHandler(Protocol):
    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


def _tracker(kind: str) -> Callable[..., ClosableHandler]:
    def make(**options: Any) -> ClosableHandler:
        from tinsmith.kitchen.tracking import TrackerHandler

        return TrackerHandler(kind, **options)

    return make


def _prometheus(**options: Any) -> ClosableHandler:
    from tinsmith.kitchen.tracking import PrometheusHandler

    return PrometheusHandler(**options)


_KINDS: Final[dict[str, Callable[..., ClosableHandler]]] = {
    "console": ConsoleHandler,
    "jsonl": JsonlHandler,
    "prometheus": _prometheus,
    **{kind: _tracker(kind) for kind in ("tensorboard", "wandb", "mlflow", "trackio")},
}


def attach_telemetry(handler: str | Handler, **options: Any) -> int:
    """Listen to all runs of this process: by kind, or with a function of one `Event`.

    Kinds: `"console"`; `"jsonl"` and `"prometheus"` with `path=…`; `"tensorboard"`, `"wandb"`, `"mlflow"` and
    `"trackio"` with `target=…`, a folder, project or address.

    Returns what `detach_telemetry` takes. Raises `ConfigError` for an unknown kind or option.
    """
    number = next(_NUMBERS)
    if not isinstance(handler, str):
        _ATTACHED[number] = _Attached(handler=handler, close=lambda: None)
        return number
    if handler not in _KINDS:
        raise ConfigError(f"telemetry {handler!r} is none of {', '.join(_KINDS)}{nearest(handler, _KINDS)}")
    try:
        made = _KINDS[handler](**options)
    except TypeError as error:
        raise ConfigError(f"telemetry {handler!r} cannot be attached: {error}") from error
    _ATTACHED[number] = _Attached(handler=made, close=made.close)
    return number


def detach_telemetry(number: int | None = None) -> None:
    """Stop listening; `None` ends all. Raises `ConfigError` if nothing is attached under that number."""
    if number is not None and number not in _ATTACHED:
        raise ConfigError(f"no telemetry is attached under {number!r}")
    for key in [number] if number is not None else list(_ATTACHED):
        _ATTACHED.pop(key).close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
