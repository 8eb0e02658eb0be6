"""`tinsmith runs`: what runs came to, side by side."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Action(StrEnum):
    compare = "compare"


def runs(
    action: Annotated[Action, typer.Argument(metavar="compare", help="Put runs side by side.")],
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Output folders of runs.")],
) -> None:
    """Compare runs: `tinsmith runs compare runs/supervised-001 runs/supervised-002`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tinsmith.kitchen.comparison import compare

    table = Table("", box=None, pad_edge=False)
    for folder in folders:
        table.add_column(Text(str(folder)), overflow="fold")
    for name, values in compare(folders):
        table.add_row(Text(name, style="bold"), *map(Text, values))
    Console().print(table)
