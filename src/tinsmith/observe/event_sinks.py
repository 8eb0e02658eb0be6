"""Where events go: the terminal, a JSONL file, a SQLite file; and out of those files as tables.

Every sink is an `EventSink`. Files hold one event each line or row, in order, and can be read while they are written.
Who does not close them need not: they are closed once nothing writes to them any more, at exit at the latest.
"""

from __future__ import annotations

import csv
import json
import sqlite3
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tinsmith.observe.jsonl import JsonlSink, read_jsonl
from tinsmith.types.events import Event, EventSink

KINDS = ("console", "jsonl", "sqlite", "otel")
_QUIET = ("http.request", "operation.started")
_SUFFIXES = {".jsonl": "jsonl", ".db": "sqlite", ".sqlite": "sqlite"}


class ConsoleEvents:
    """One line per event on a text stream, single requests and starts left out."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def write(self, event: Event) -> None:
        if event.name in _QUIET:
            return
        clock = time.strftime("%H:%M:%S", time.localtime(event.time))
        fields = " ".join(f"{key}={_short(value)}" for key, value in event.fields.items())
        self._stream.write(f"{clock} {event.name} {fields}\n")
        self._stream.flush()

    def close(self) -> None:
        """The stream belongs to whoever gave it."""


class JsonlEvents:
    """Appends to a file."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = JsonlSink(self._path)
        self._end = weakref.finalize(self, self._file.close)

    def __repr__(self) -> str:
        return f"JsonlEvents({str(self._path)!r})"

    def write(self, event: Event) -> None:
        if self._end.alive:
            self._file.write(event.as_row())

    def close(self) -> None:
        self._end()


class SqliteEvents:
    """Appends to the table `events`: time, name, the fields that most questions ask for, and all of them as JSON."""

    COLUMNS = ("session_id", "run_id", "seq_id", "operation", "loss", "learning_rate", "grad_norm", "tokens", "wall_s")

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._base = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._end = weakref.finalize(self, self._base.close)
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=NORMAL")
        columns = ", ".join(self.COLUMNS)
        self._base.execute(f"CREATE TABLE IF NOT EXISTS events (time REAL, event TEXT, {columns}, fields TEXT)")

    def __repr__(self) -> str:
        return f"SqliteEvents({str(self._path)!r})"

    def write(self, event: Event) -> None:
        if not self._end.alive:
            return
        values = [event.fields.get(column) for column in self.COLUMNS]
        marks = ", ".join("?" * (len(values) + 3))
        row = (event.time, event.name, *values, json.dumps(dict(event.fields)))
        self._base.execute(f"INSERT INTO events VALUES ({marks})", row)

    def close(self) -> None:
        self._end()


_SINKS: dict[str, type[JsonlEvents | SqliteEvents]] = {"jsonl": JsonlEvents, "sqlite": SqliteEvents}


def open_sinks(wanted: str) -> tuple[EventSink, ...]:
    """Sinks from a text such as `console,jsonl:run.jsonl,sqlite:runs.db,otel`. Raises `ValueError` for anything else.

    `otel` takes the address of a collector, or none where OpenTelemetry's own variables say it.
    """
    sinks: list[EventSink] = []
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        kind, _, path = part.partition(":")
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of sink; known are {', '.join(KINDS)}")
        if kind == "otel":
            sinks.append(_otel_sink(path or None))
            continue
        if (kind == "console") == bool(path):
            raise ValueError(
                f"{part!r}: {kind} takes {'no path' if kind == 'console' else 'a path, as in ' + kind + ':PATH'}"
            )
        try:
            sinks.append(_SINKS[kind](path) if path else ConsoleEvents())
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"{path!r} cannot be written: {error}") from error
    return tuple(sinks)


def _otel_sink(endpoint: str | None) -> EventSink:
    try:
        from tinsmith.observe.otel_events import OpenTelemetryEvents
    except ImportError as error:
        raise ValueError("traces need OpenTelemetry: pip install 'tinsmith[otel]'") from error
    return OpenTelemetryEvents(endpoint)


def read_events(path: Path | str, *, run_id: str | None = None, name: str | None = None) -> list[dict[str, Any]]:
    """The events of a JSONL or SQLite file as rows, in order; of one run or one name if given.

    Raises `ValueError` if the file is neither, `FileNotFoundError` if there is none.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"no events in {str(source)!r}")
    kind = _SUFFIXES.get(source.suffix)
    if kind is None:
        raise ValueError(f"{str(source)!r} is no file of events; expected one of {', '.join(_SUFFIXES)}")
    rows = read_jsonl(source) if kind == "jsonl" else list(_sqlite_rows(source))
    return [
        row
        for row in rows
        if (run_id is None or row.get("run_id") == run_id) and (name is None or row.get("event") == name)
    ]


def export_events(source: Path | str, target: Path | str, *, run_id: str | None = None) -> int:
    """Write the events of a file as a table, `.csv` or `.parquet`, one column per field; the number of rows.

    Raises `ValueError` for another ending, and `ImportError` naming the package that Parquet needs.
    """
    rows = read_events(source, run_id=run_id)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path = Path(target)
    match path.suffix:
        case ".csv":
            _write_csv(path, columns, rows)
        case ".parquet":
            _write_parquet(path, columns, rows)
        case _:
            raise ValueError(f"cannot export to {path.name!r}: the name must end in .csv or .parquet")
    return len(rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _write_parquet(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("writing Parquet needs pyarrow: pip install 'tinsmith[parquet]'") from error
    table = pyarrow.table({column: _column([row.get(column) for row in rows]) for column in columns})
    pyarrow.parquet.write_table(table, path)


def _column(values: Sequence[Any]) -> list[Any]:
    """Values of one kind, as Parquet wants them: numbers if all are numbers, else texts."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known) or all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in known
    ):
        whole = all(isinstance(value, int) for value in known)
        return [value if value is None or whole else float(value) for value in values]
    return [None if value is None else _cell(value) for value in values]


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value if value is None else str(value)


def _sqlite_rows(path: Path) -> Iterator[dict[str, Any]]:
    base = sqlite3.connect(path)
    try:
        for when, event, fields in base.execute("SELECT time, event, fields FROM events ORDER BY rowid"):
            yield {"event": event, "time": when, **json.loads(fields)}
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{str(path)!r} holds no events: {error}") from error
    finally:
        base.close()


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value) if " " in str(value) else str(value)
