"""Telemetry that goes elsewhere: experiment trackers, and a file that Prometheus' node exporter reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.telemetry import PREFIX, Event
from tinsmith.observe.trackers import TRACKERS, MetricSink, TrackerMissing

GROUPS: Final = {
    "training.step": "train",
    "rl.step": "rl",
    "rl.rollout": "rollout",
    "dpo.step": "preference",
    "distillation.step": "distillation",
    "eval.complete": "eval",
}
"""Events whose figures trackers get, and what stands before their names: `train/loss`."""


class TrackerHandler:
    """One run of a tracker for each run of the kitchen."""

    def __init__(self, kind: str, *, target: str = "") -> None:
        """`target` is a folder, a project or an address, as the tracker has it."""
        self._open: Callable[..., MetricSink] = TRACKERS[kind]
        self._target = target
        self._sinks: dict[str, MetricSink] = {}
        self._last_step: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        """Raises `ConfigError` at the start of a run if the tracker's package is missing."""
        name, run_id = event.name.removeprefix(PREFIX), str(event.metadata.get("run_id"))
        match name:
            case "workflow.run.start":
                self._begin(run_id, event.metadata.get("config") or {})
            case "workflow.run.stop" | "workflow.run.exception":
                if (sink := self._sinks.pop(run_id, None)) is not None:
                    sink.close(failed=name.endswith("exception"))
            case _ if name in GROUPS and run_id in self._sinks:
                self._log(run_id, GROUPS[name], event.measurements)

    def close(self) -> None:
        while self._sinks:
            self._sinks.popitem()[1].close(failed=True)

    def _begin(self, run_id: str, config: Mapping[str, Any]) -> None:
        try:
            self._sinks[run_id] = self._open(self._target, run_id=run_id, config=config)
        except TrackerMissing as error:
            raise ConfigError(str(error)) from error
        self._last_step[run_id] = 0

    def _log(self, run_id: str, group: str, measurements: Mapping[str, float]) -> None:
        step = max(self._last_step[run_id], int(measurements.get("step", measurements.get("round", -1) + 1)))
        self._last_step[run_id] = step
        values = {f"{group}/{name}": float(v) for name, v in measurements.items() if name not in ("step", "round")}
        self._sinks[run_id].log(step, values)


class PrometheusHandler:
    """Counts of events and their newest figures, in the text format; written whole, at most every `every_s` seconds."""

    def __init__(self, *, path: Path | str, every_s: float = 5.0) -> None:
        """Raises `ConfigError` if the package prometheus-client is missing."""
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ConfigError("this handler needs a package: pip install prometheus-client") from error
        self._write = prometheus.write_to_textfile
        self._registry = prometheus.CollectorRegistry()
        self._events = prometheus.Counter(
            "tinsmith_kitchen_events", "Events of runs.", ["event"], registry=self._registry
        )
        self._figures = prometheus.Gauge(
            "tinsmith_kitchen_figure", "The newest figure of an event.", ["event", "name"], registry=self._registry
        )
        self._path, self._every_s, self._written_at = Path(path), every_s, float("-inf")
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: Event) -> None:
        name = event.name.removeprefix(PREFIX)
        self._events.labels(event=name).inc()
        for figure, value in event.measurements.items():
            self._figures.labels(event=name, name=figure).set(value)
        if event.time - self._written_at >= self._every_s or name.startswith("workflow."):
            self._write(str(self._path), self._registry)
            self._written_at = event.time

    def close(self) -> None:
        self._write(str(self._path), self._registry)
