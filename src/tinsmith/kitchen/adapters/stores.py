"""Ports kept in a SQLite file, or in object storage."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.ports import BlobStore, MetricRow, MetricsStore
from tinsmith.types.errors import InvalidInput, NotFound


class SqliteMetrics(MetricsStore):
    """The table `metrics` of one file; several programs may write to it. A row is there once `record` has returned."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with closing(self._open()) as base:
            base.execute("PRAGMA journal_mode=WAL")
            base.execute(
                "CREATE TABLE IF NOT EXISTS metrics"
                " (run_id TEXT, metric TEXT, value REAL, step INTEGER, timestamp REAL, metadata TEXT)"
            )

    def record(self, row: MetricRow) -> None:
        values = (row.run_id, row.metric, row.value, row.step, row.timestamp, json.dumps(dict(row.metadata)))
        with closing(self._open()) as base:
            base.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", values)

    def flush(self) -> None:
        """Every row is written when it is recorded."""

    def read(self, run_id: str, metric: str | None = None) -> list[MetricRow]:
        query = "SELECT * FROM metrics WHERE run_id = ? AND (? IS NULL OR metric = ?) ORDER BY rowid"
        with closing(self._open()) as base:
            rows = base.execute(query, (run_id, metric, metric)).fetchall()
        return [
            MetricRow(run_id=own, metric=name, value=value, step=step, timestamp=when, metadata=json.loads(metadata))
            for own, name, value, step, when, metadata in rows
        ]

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, isolation_level=None, timeout=30.0)


class ObjectBlobs(BlobStore):
    """Blobs in a store of the package `obstore`: S3, Google's, Azure's, or one in memory.

    `ObjectBlobs.at("s3://bucket/prefix", region="eu-west-1")` opens one by its address.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def at(cls, url: str, **options: Any) -> ObjectBlobs:
        """Raises `ConfigError` if the package is missing or the address is none of its."""
        try:
            module, errors = import_module("obstore.store"), import_module("obstore.exceptions")
        except ImportError as error:
            raise ConfigError("object storage needs a package: pip install 'tinsmith[s3]'") from error
        try:
            return cls(module.from_url(url, **options))
        except (ValueError, errors.BaseError) as error:
            raise ConfigError(f"{url!r} is no address of object storage: {error}") from error

    def read(self, key: str) -> bytes:
        try:
            return bytes(self._store.get(_checked(key)).bytes())
        except FileNotFoundError as error:
            raise NotFound(f"no blob {key!r}") from error

    def stream(self, key: str, *, chunk_size: int = 1 << 20) -> Iterator[bytes]:
        try:
            found = self._store.get(_checked(key))
        except FileNotFoundError as error:
            raise NotFound(f"no blob {key!r}") from error
        return (bytes(chunk) for chunk in found.stream(min_chunk_size=chunk_size))

    def write(self, key: str, data: bytes) -> None:
        self._store.put(_checked(key), data)

    def exists(self, key: str) -> bool:
        try:
            self._store.head(_checked(key))
        except FileNotFoundError:
            return False
        return True


def _checked(key: str) -> str:
    if not key or key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")):
        raise InvalidInput(f"blob key {key!r} must be of the form a/b/c")
    return key
