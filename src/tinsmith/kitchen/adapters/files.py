"""Ports kept in files of one folder each. What a call has returned for is there after a crash."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from tinsmith.data import DataError
from tinsmith.data.jsonl import read_records
from tinsmith.kitchen.adapters.noop_services import MemoryRegistry
from tinsmith.kitchen.errors import nearest
from tinsmith.kitchen.ports import BlobStore, Feedback, FeedbackClient, MetricRow, MetricsStore, RegisteredModel
from tinsmith.observe import JsonlSink, read_jsonl
from tinsmith.types.errors import InvalidInput, NotFound


@dataclass(frozen=True, slots=True)
class FolderBlobs(BlobStore):
    folder: Path

    def read(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFound(f"no blob {key!r}") from error

    def stream(self, key: str, *, chunk_size: int = 1 << 20) -> Iterator[bytes]:
        path = self._path(key)
        if not path.is_file():
            raise NotFound(f"no blob {key!r}")
        return _chunks(path, chunk_size)

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or any(part in ("..", ".") for part in parts):
            raise InvalidInput(f"blob key {key!r} must be of the form a/b/c")
        return self.folder.joinpath(*parts)


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


class JsonlMetrics(MetricsStore):
    """One row per line: `{run_id, metric, value, step, timestamp, metadata}`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def record(self, row: MetricRow) -> None:
        with JsonlSink(self._path) as sink:
            sink.write({**asdict(row), "metadata": dict(row.metadata)})

    def flush(self) -> None:
        if self._path.exists():
            with self._path.open("ab") as file:
                os.fsync(file.fileno())

    def read(self, run_id: str, metric: str | None = None) -> list[MetricRow]:
        rows = [MetricRow(**row) for row in read_jsonl(self._path)]
        return [row for row in rows if row.run_id == run_id and metric in (None, row.metric)]


class FolderRegistry(MemoryRegistry):
    """A registry in `models.jsonl` of a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "models.jsonl"
        super().__init__([RegisteredModel(**row) for row in read_jsonl(self._path)])

    def register(
        self, name: str, path: str, *, parent: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> RegisteredModel:
        made = super().register(name, path, parent=parent, metadata=metadata)
        with JsonlSink(self._path, durable=True) as sink:
            sink.write({**asdict(made), "metadata": dict(made.metadata)})
        return made


class JsonlFeedback(FeedbackClient):
    """One entry per line, written by `log` or by hand. Reading raises `DataError` naming file and line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def log(self, feedback: Feedback) -> None:
        with JsonlSink(self._path, durable=True) as sink:
            sink.write(asdict(feedback))

    def read(self, *, after: int = 0) -> list[Feedback]:
        return [_feedback(values, source) for values, source in self._records()[after:]]

    def count(self) -> int:
        return len(self._records())

    def _records(self) -> list[tuple[dict[str, Any], str]]:
        return read_records(self._path)[0] if self._path.exists() else []


def _feedback(values: Mapping[str, Any], source: str) -> Feedback:
    known = [field.name for field in fields(Feedback)]
    for key in values.keys() - set(known):
        raise DataError(f"{source}: unknown key {key!r}{nearest(key, known)}; an entry has {', '.join(known)}")
    for key in ("prompt", "response", "rating"):
        if key not in values:
            raise DataError(f"{source}: field {key!r} is missing")
    try:
        return Feedback(**values)
    except InvalidInput as error:
        raise DataError(f"{source}: {error}") from error
