"""Data and files: where examples come from and where bytes are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tinsmith.data.batches import epoch_order
from tinsmith.data.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One example as it was written down."""

    values: Mapping[str, Any]
    source: str
    """`FILE:LINE`, as errors name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Records in order. Every change gives another dataset."""

    name: str
    records: tuple[Record, ...]
    sha256: str
    """Of the bytes it was read from, or of the records where there are none."""
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Split names to indices of `records`."""

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def get_split(self, split: str) -> Dataset:
        """Raises `DataError` for a split it does not have."""
        if split not in self.splits:
            known = ", ".join(map(repr, self.splits)) or "none"
            raise DataError(f"dataset {self.name!r} has no split {split!r}; it has {known}")
        return self.select(self.splits[split])

    def shuffle(self, seed: int) -> Dataset:
        """The same order for the same seed, on every machine."""
        return self.select(epoch_order(len(self.records), seed=seed, epoch=0))

    def take(self, count: int) -> Dataset:
        return self.select(range(min(count, len(self.records))))

    def skip(self, count: int) -> Dataset:
        return self.select(range(min(count, len(self.records)), len(self.records)))

    def select(self, indices: Sequence[int]) -> Dataset:
        """Raises `DataError` for an index outside."""
        for index in indices:
            if not 0 <= index < len(self.records):
                raise DataError(f"index {index} is outside the {len(self.records)} records of {self.name!r}")
        return replace(self, records=tuple(self.records[index] for index in indices), splits={})

    def to_list(self) -> list[dict[str, Any]]:
        return [dict(record.values) for record in self.records]


def dataset_of(name: str, rows: Sequence[Mapping[str, Any]], *, sha256: str | None = None) -> Dataset:
    """A dataset of rows in memory, each known as `NAME:NUMBER` (from 1)."""
    records = tuple(Record(values=row, source=f"{name}:{number}") for number, row in enumerate(rows, start=1))
    digest = sha256 or hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()
    return Dataset(name=name, records=records, sha256=digest)


class DatasetStore(Protocol):
    """Datasets by name: a path, an id of a hub, whatever the store knows."""

    def load_dataset(self, name: str) -> Dataset:
        """Raises `DataError` if there is none, or naming file, line and fault if it cannot be read."""


class BlobStore(Protocol):
    """Bytes under keys of the form `a/b/c`. What `write` has returned for is there after a crash."""

    def read(self, key: str) -> bytes:
        """Raises `NotFound`."""

    def stream(self, key: str, *, chunk_size: int = 1 << 20) -> Iterator[bytes]:
        """Raises `NotFound` before the first chunk."""

    def write(self, key: str, data: bytes) -> None:
        """Whole or not at all; replaces what was there."""

    def exists(self, key: str) -> bool: ...
