"""`tinsmith experiment`: a recipe under several conditions, repeated, with a table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tinsmith.kitchen.experiments import DeadTrial, Trial, Values


def experiment(
    spec: Annotated[Path, typer.Argument(metavar="FILE", help="TOML, YAML or JSON: recipe, repeats, conditions.")],
    output: Annotated[Path | None, typer.Option(help="Folder for all runs; runs/NAME without.")] = None,
) -> None:
    """Compare conditions: `tinsmith experiment rates.toml`. What was finished before is not run again."""
    from rich.console import Console

    from tinsmith.kitchen.experiments import read_spec, run_experiment

    console = Console()
    read = read_spec(spec)
    result = run_experiment(read, output or Path("runs") / read.name, hooks=_Progress(console))
    console.print(result.table(), markup=False, highlight=False, soft_wrap=True)
    if result.dead:
        raise typer.Exit(1)


class _Progress:
    def __init__(self, console: Console) -> None:
        self._console = console

    def started(self, trial: Trial, attempt: int) -> None:
        again = f", attempt {attempt + 1}" if attempt else ""
        self._say(f"{trial.condition} {trial.repeat}{again}")

    def finished(self, trial: Trial, values: Values) -> None:
        self._say(f"{trial.condition} {trial.repeat}: loss {values.get('loss', float('nan')):.4f}")

    def died(self, dead: DeadTrial) -> None:
        self._say(f"{dead.trial.condition} {dead.trial.repeat} failed {dead.attempts} times: {dead.error}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
