"""The newest tinker-cookbook, unmodified and offline, against a server: `make cookbook` prints a table.

Tokenizers come from the server's own hub route. A recipe passes if it ends well, takes all its steps, and what it is
meant to change changes: losses fall, accuracies rise, sampler and trainer agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from bench.run import serving

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-cookbook" / "bin" / "python"
TIMEOUT_S = 900

Series: TypeAlias = list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    metric: str
    steps: int
    holds: Callable[[Series], bool]
    words: str


def _agreement(steps: int) -> Expectation:
    return Expectation(
        metric="optim/kl_sample_train_v2",
        steps=steps,
        holds=lambda series: max(map(abs, series)) < 1e-3,
        words="sampler and trainer agree to 1e-3",
    )


EXPECTED = {
    "supervised": Expectation(
        metric="train_mean_nll", steps=16, holds=lambda s: s[-1] < 0.3 * s[0], words="loss falls by 70 %"
    ),
    "supervised resumed": Expectation(
        metric="train_mean_nll", steps=16, holds=lambda s: s[-1] < 0.3 * s[0], words="loss falls by 70 % over the stop"
    ),
    "rl synchronous": _agreement(6),
    "rl streaming": _agreement(6),
    "rl asynchronous": Expectation(
        metric="env/all/reward/total", steps=6, holds=lambda s: max(s) > 0, words="rewards are earned"
    ),
    "rl multi-turn": _agreement(3),
    "dpo": Expectation(metric="accuracy", steps=6, holds=lambda s: s[-1] > 0.9, words="accuracy above 0.9"),
    "distillation on-policy": Expectation(
        metric="teacher_kl", steps=12, holds=lambda s: s[-1] < 0.7 * s[0], words="KL to the teacher falls by 30 %"
    ),
    "distillation off-policy": Expectation(
        metric="train/loss:sum", steps=6, holds=lambda s: s[-1] < 0.8 * s[0], words="loss falls by 20 %"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    name: str
    fault: str | None
    series: Series
    seconds: float
    last_words: str = ""
    """The end of its stderr, if it failed."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cookbook", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="RECIPE", help=f"of: {', '.join(EXPECTED)}")
    names = parser.parse_args().names or list(EXPECTED)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "data", "auto") as server:
        reports = [run(name, server.url, Path(folder)) for name in names]
    show(reports)
    return 0 if all(report.fault is None for report in reports) else 1


def run(name: str, url: str, folder: Path) -> Report:
    log = folder / name.replace(" ", "-") / "run"
    log.parent.mkdir()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"{url}/hf",
        "HF_HOME": str(folder / "hf"),
        "TINKER_API_KEY": "tml-cookbook",
        "HF_HUB_OFFLINE": "0",
    }
    start = time.perf_counter()
    try:
        ended = subprocess.run(
            [str(PYTHON), str(Path(__file__).with_name("recipes.py")), name, url, str(log)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        fault = None if ended.returncode == 0 else f"exit status {ended.returncode}"
        last_words = ended.stderr.strip()[-2000:]
    except subprocess.TimeoutExpired:
        fault, last_words = f"not done after {TIMEOUT_S} s", ""
    seconds = time.perf_counter() - start
    series = series_of(log, EXPECTED[name].metric)
    fault = fault or fault_of(EXPECTED[name], series)
    return Report(name=name, fault=fault, series=series, seconds=seconds, last_words=last_words)


def series_of(log: Path, metric: str) -> Series:
    path = log / "metrics.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [float(row[metric]) for row in rows if metric in row]


def fault_of(expected: Expectation, series: Series) -> str | None:
    if len(series) != expected.steps:
        return f"{len(series)} of {expected.steps} steps gave {expected.metric}"
    return None if expected.holds(series) else f"not so: {expected.words}"


def show(reports: list[Report]) -> None:
    table = Table("recipe", "result", "figure", "first", "last", "s", title="tinker-cookbook against this server")
    for report in reports:
        first, last = (f"{report.series[i]:.3g}" if report.series else "" for i in (0, -1))
        result = "ok" if report.fault is None else report.fault
        table.add_row(report.name, result, EXPECTED[report.name].metric, first, last, f"{report.seconds:.0f}")
    Console(width=max(120, Console().width)).print(table)
    for report in reports:
        if report.fault is not None:
            print(f"\n{report.name}: {report.fault}\n{report.last_words}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
