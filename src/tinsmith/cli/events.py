"""`tinsmith events …`: what clients recorded about themselves, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tinsmith.cli.answers import AsJson, done, show

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Recorded telemetry: files written by `ServiceClient(telemetry=…)`.",
)

_COLUMNS = {
    "event": "event",
    "run_id": "run",
    "seq_id": "seq",
    "operation": "operation",
    "loss": "loss",
    "wall_s": "seconds",
}
Source = Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl, .db or .sqlite file of events.")]


@contextmanager
def _usage() -> Iterator[None]:
    """A file that cannot be read or written as its name says, or a package that is missing, is no bug."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command("show")
def show_events(
    source: Source,
    run_id: Annotated[str | None, typer.Option(help="Only of this run.")] = None,
    name: Annotated[str | None, typer.Option(help="Only events of this name.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Only the last so many; 0 for all.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the last events of a file."""
    from tinsmith.observe.event_sinks import read_events

    with _usage():
        rows = read_events(source, run_id=run_id, name=name)
    show(rows[-limit:] if limit else rows, _COLUMNS, as_json=as_json, empty="no such events")


@app.command()
def export(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="TABLE", help="A .csv or .parquet file to write.")],
    run_id: Annotated[str | None, typer.Option(help="Only of this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a file of events as a table, one column per field."""
    from tinsmith.observe.event_sinks import export_events

    with _usage():
        rows = export_events(source, target, run_id=run_id)
    done(f"{target}: {rows} rows", as_json=as_json, file=target, rows=rows)
