"""The progress of a run on a terminal: one live line, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinsmith.observe.rows import StepRow

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_EVERY_S = 5.0
"""Without a terminal: at most one line in this time, beside the first and the last."""


class ProgressLine:
    """A `RunObserver` that draws `training ━━━━ 12/80 loss 1.234 ▇▅▃▁ 3,400 tokens/s 0:12 left`."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._title = ""
        self._num_steps = 0
        self._rows: list[StepRow] = []
        self._steps_before = 0
        self._started_at = 0.0
        self._printed_at = float("-inf")

    def started(self, *, title: str, first_step: int, num_steps: int) -> None:
        self._title, self._num_steps, self._steps_before = title, num_steps, first_step - 1
        self._rows, self._started_at = [], self._clock()
        if self._console.is_terminal:
            self._live = Live(self._line(), console=self._console, auto_refresh=False)
            self._live.start()

    def stepped(self, row: StepRow) -> None:
        self._rows.append(row)
        if self._live is not None:
            self._live.update(self._line(), refresh=True)
        elif row.step == self._num_steps or self._clock() - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = self._clock()
            self._console.print(
                f"step {row.step}/{self._num_steps}  loss {row.loss:.4f}  {row.tokens_per_s:,.0f} tokens/s  "
                f"{_minutes(self._seconds_left())} left",
                highlight=False,
            )

    def noted(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def ended(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self) -> Table:
        step = self._rows[-1].step if self._rows else self._steps_before
        line = Table.grid(padding=(0, 2, 0, 0))
        cells: list[RenderableType] = [
            Text(self._title, style="bold"),
            ProgressBar(total=self._num_steps, completed=step, width=24),
            Text(f"{step}/{self._num_steps}"),
        ]
        if self._rows:
            row = self._rows[-1]
            cells += [
                Text.assemble("loss ", (f"{row.loss:.4f}", "bold green")),
                Text(sparkline([past.loss for past in self._rows], width=16), style="green"),
                Text(f"{row.tokens_per_s:,.0f} tokens/s"),
                Text(f"{_minutes(self._seconds_left())} left", style="dim"),
            ]
        line.add_row(*cells)
        return line

    def _seconds_left(self) -> float:
        done = self._rows[-1].step - self._steps_before
        return (self._clock() - self._started_at) / done * (self._num_steps - self._rows[-1].step)


def sparkline(values: Sequence[float], *, width: int) -> str:
    """A curve of at most `width` characters, from the smallest value (lowest block) to the largest."""
    num_cells = min(width, len(values))
    edges = [len(values) * cell // num_cells for cell in range(num_cells + 1)] if num_cells else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
