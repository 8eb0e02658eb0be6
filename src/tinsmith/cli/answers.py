"""What the commands about a server have in common: which server, and how answers are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

if TYPE_CHECKING:
    from tinsmith.client import RestClient

T = TypeVar("T")

BaseUrl: TypeAlias = Annotated[
    str | None,
    typer.Option("--base-url", help="Server to ask. Default: TINKER_BASE_URL, or else the one embedded here."),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]
Limit: TypeAlias = Annotated[int, typer.Option("--limit", min=0, help="At most so many, newest first; 0 for all.")]
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

PAGE = 500
UNBOUNDED = 1000


@contextmanager
def rest_client(base_url: str | None) -> Iterator[RestClient]:
    """A client that gives up soon: somebody waits at a terminal."""
    from tinsmith.client import RestClient, Timing

    timing = Timing(startup_give_up=5.0, submit_give_up=15.0)
    with RestClient.with_timing(timing, base_url=base_url) as client:
        yield client


def pages(fetch: Callable[[int, int], Sequence[T]], limit: int) -> list[T]:
    """`fetch(limit, offset)` until there are `limit` things, or no more; 0 for all."""
    found: list[T] = []
    while not limit or len(found) < limit:
        wanted = min(PAGE, limit - len(found)) if limit else PAGE
        page = fetch(wanted, len(found))
        found += page
        if len(page) < wanted:
            break
    return found


def show(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, as_json: bool, empty: str) -> None:
    """Rows as JSON, whole, or as a table of `columns` (field to heading).

    Where a terminal is too narrow for the table each row is a paragraph: a path that is cut off names nothing.
    """
    if as_json:
        typer.echo(json.dumps(list(rows), default=str, ensure_ascii=False))
        return
    if not rows:
        typer.echo(empty)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns.values(), box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell(row.get(field))) for field in columns))
    console = Console()
    if not console.is_terminal:
        console.width = UNBOUNDED  # whoever reads this is a program, or pages by itself
    if Measurement.get(console, console.options.update(width=UNBOUNDED), table).maximum <= console.width:
        console.print(table)
        return
    for row in rows:
        _show_paragraph([(heading, cell(row.get(field))) for field, heading in columns.items()])


def _show_paragraph(cells: Sequence[tuple[str, str]]) -> None:
    (_, first), *rest = cells
    typer.echo(first)
    for heading, text in rest:
        if text:
            typer.echo(f"  {heading:<{max(len(heading) for heading, _ in rest)}}  {text}")


def show_one(row: Mapping[str, Any], *, as_json: bool) -> None:
    """One thing: JSON, or a line per field that is known."""
    if as_json:
        typer.echo(json.dumps(dict(row), default=str, ensure_ascii=False))
        return
    known = {key: value for key, value in row.items() if value not in (None, {}, [])}
    width = max((len(key) for key in known), default=0)
    for key, value in known.items():
        typer.echo(f"{key:<{width}}  {cell(value)}")


def done(words: str, *, as_json: bool = False, **fields: Any) -> None:
    typer.echo(json.dumps(fields, default=str) if as_json else words)


def confirm(question: str, *, yes: bool) -> None:
    """Ends the command with 1 if the answer is no."""
    if not yes:
        typer.confirm(question, abort=True)


def cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        case dict():
            return ", ".join(f"{key}={item}" for key, item in value.items())
        case list():
            return ", ".join(str(item) for item in value)
    return str(value)


def size(num_bytes: int | None) -> str | None:
    if num_bytes is None:
        return None
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
