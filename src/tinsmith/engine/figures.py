"""Where an engine's time goes, and how full its passes are. One thread counts; any thread may look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tinsmith.types.pulse import PHASES


class Figures:
    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._slice_began: float | None = None
        self._present: tuple[str, float] | None = None
        """The phase that goes on, and since when."""
        self.num_slices = 0
        self.num_training_passes = 0
        self.num_decode_passes = 0
        self.num_decode_rows = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`'s, one of `PHASES`; not nested."""
        start = time.perf_counter()
        self._present = name, start
        try:
            yield
        finally:
            self._present = None
            self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def slice(self) -> Iterator[None]:
        self._slice_began = time.perf_counter()
        try:
            yield
        finally:
            self._slice_began = None
            self.num_slices += 1

    def sampling_pass(self, seconds: float, *, prompt_rows: int, drawing_rows: int) -> None:
        """Prompts and drawing sequences share a pass; its time is divided by rows."""
        share = prompt_rows / max(1, prompt_rows + drawing_rows)
        self._seconds["prefill"] += seconds * share
        self._seconds["decode"] += seconds * (1 - share)
        if drawing_rows:
            self.num_decode_passes += 1
            self.num_decode_rows += drawing_rows

    @property
    def slice_s(self) -> float:
        began = self._slice_began
        return 0.0 if began is None else time.perf_counter() - began

    def phase_s(self) -> dict[str, float]:
        """Seconds since the start by phase; they add up to all of it."""
        seconds, present, now = dict(self._seconds), self._present, time.perf_counter()
        if present is not None:
            seconds[present[0]] += now - present[1]
        seconds["other"] = max(0.0, now - self._since - sum(seconds.values()))
        return seconds
