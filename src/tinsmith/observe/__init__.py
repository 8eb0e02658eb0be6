"""What a run reports, and where it goes: rows, files, the terminal, pictures."""

from tinsmith.observe.aggregate import Distribution, MetricsAggregate, MetricsSnapshot
from tinsmith.observe.console import ProgressLine, sparkline
from tinsmith.observe.jsonl import JsonlSink, keep_rows, read_jsonl
from tinsmith.observe.observer import RunObserver
from tinsmith.observe.plots import plot_loss
from tinsmith.observe.rows import StepRow

__all__ = [
    "Distribution",
    "JsonlSink",
    "MetricsAggregate",
    "MetricsSnapshot",
    "ProgressLine",
    "RunObserver",
    "StepRow",
    "keep_rows",
    "plot_loss",
    "read_jsonl",
    "sparkline",
]
