"""Counts and distributions of what one client did, in memory: `snapshot()` whenever one likes, `reset()` to begin anew.

    figures = MetricsAggregate()
    with ServiceClient(telemetry=[figures]) as service:
        ...
    figures.snapshot().histograms["forward_backward.wall_s"].p95

A distribution keeps counts of values in steps of two percent, however many there are: a percentile is right within one.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tinsmith.types.events import Event

_STEP: Final = math.log(1.02)
_ZERO: Final = 1e-12
_SUMMED: Final = ("tokens", "bytes_sent", "bytes_received")
_MEASURED: Final = ("wall_s", "turn_s", "submit_s", "server_s", "duration_s", "loss", "grad_norm", "pause_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    count: int
    sum: float
    min: float
    max: float
    p50: float
    p95: float
    p99: float

    @property
    def mean(self) -> float:
        return self.sum / self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSnapshot:
    counters: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Distribution] = field(default_factory=dict)


class Histogram:
    """Not thread-safe."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._min = math.inf
        self._max = -math.inf
        self._steps: Counter[tuple[int, int]] = Counter()
        """By sign and step of the logarithm."""

    def add(self, value: float) -> None:
        """Raises `ValueError` if it is not finite."""
        if not math.isfinite(value):
            raise ValueError(f"cannot count {value!r}: it is not finite")
        self.count += 1
        self._sum += value
        self._min, self._max = min(self._min, value), max(self._max, value)
        size = abs(value)
        sign = 0 if size < _ZERO else (1 if value > 0 else -1)
        self._steps[sign, round(math.log(size) / _STEP) if sign else 0] += 1

    def percentile(self, share: float) -> float:
        """Of `share` in [0, 1], within one percent. Raises `ValueError` if nothing was counted."""
        if not self.count:
            raise ValueError("nothing was counted yet")
        rank = share * (self.count - 1)
        seen = 0
        for sign, step in sorted(self._steps, key=lambda place: place[0] * (place[1] + 1e6)):
            seen += self._steps[sign, step]
            if seen > rank:
                return min(max(sign * math.exp(step * _STEP), self._min), self._max)
        return self._max

    def distribution(self) -> Distribution:
        p50, p95, p99 = (self.percentile(share) for share in (0.5, 0.95, 0.99))
        return Distribution(count=self.count, sum=self._sum, min=self._min, max=self._max, p50=p50, p95=p95, p99=p99)


class MetricsAggregate:
    """An `EventSink`, and usable by hand; callable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._histograms: dict[str, Histogram] = {}

    def increment(self, name: str, by: float = 1) -> None:
        with self._lock:
            self._counters[name] += by  # type: ignore[assignment]  # counts of tokens and of seconds

    def observe(self, name: str, value: float) -> None:
        """Raises `ValueError` if it is not finite."""
        with self._lock:
            self._histograms.setdefault(name, Histogram()).add(value)

    def snapshot(self) -> MetricsSnapshot:
        with self._lock:
            return self._snapshot()

    def reset(self) -> MetricsSnapshot:
        """Begin anew; what there was until now."""
        with self._lock:
            last = self._snapshot()
            self._counters.clear()
            self._histograms.clear()
            return last

    def _snapshot(self) -> MetricsSnapshot:
        histograms = {name: histogram.distribution() for name, histogram in self._histograms.items()}
        return MetricsSnapshot(counters=dict(self._counters), histograms=histograms)

    def write(self, event: Event) -> None:
        """Counts events by name, operations and errors by kind; adds up tokens and bytes; measures times and losses.

        Names: `operation.finished`, `forward_backward.count`, `forward_backward.wall_s`, `forward_backward.tokens`, …
        """
        self.increment(event.name)
        if event.name == "operation.started":
            return
        subject = str(event.fields.get("operation", event.name))
        if subject != event.name:
            self.increment(f"{subject}.{'errors' if event.name == 'operation.failed' else 'count'}")
        if (kind := event.fields.get("error_type")) is not None:
            self.increment(f"error.{kind}")
        for key, value in event.fields.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if key in _SUMMED:
                self.increment(f"{subject}.{key}", value)
            elif key in _MEASURED:
                self.observe(f"{subject}.{key}", float(value))

    def close(self) -> None:
        """What was counted stays readable."""
