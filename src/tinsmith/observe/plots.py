"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinsmith.observe.rows import StepRow

SMOOTHING_STEPS = 20
"""The smoothed curve is a running mean over at most this many steps."""


def plot_loss(rows: Sequence[StepRow], path: Path, *, title: str = "Training loss") -> None:
    """Write a PNG of the loss per trained token over the steps. Raises `ValueError` if there are no rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ValueError("no training step to plot")
    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db8d2", linewidth=1.2, marker="." if len(rows) < 60 else "", label="each step")
    window = min(SMOOTHING_STEPS, max(1, len(rows) // 15))
    if window > 1:
        label = f"mean of the last {window} steps"
        axes.plot(steps, running_mean(losses, window), color="#1f4e79", linewidth=2.0, label=label)
        axes.legend(frameon=False)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
