"""Append-only files of one JSON object per line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class JsonlSink:
    """Appends rows to a file, each on disk for other readers when `write` returns.

    A last line that a crash or a full disk cut off is dropped first: the next row must not become a part of it.

    Raises `ValueError` for numbers that JSON does not have (NaN, infinity).
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        """With `durable`, rows survive a power cut too (fsync)."""
        self._durable = durable
        _end_last_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end_last_line(path: Path) -> None:
    """Give a last line without an end one if it is a whole row, else drop it."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        start, last = 0, b""
        for line in file:
            start, last = start + len(last), line
        try:
            json.loads(last)
            file.write(b"\n")
        except ValueError:
            file.truncate(start)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a last line that a crash cut off is left out. A missing file has none.

    Raises `ValueError` naming file and line if another line is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no JSON: {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is no JSON object: {line[:80]!r}")
        rows.append(row)
    return rows


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file with the rows that `keep` accepts; whole or not at all."""
    rows = [row for row in read_jsonl(path) if keep(row)]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
