"""Dataset stores: files by their ending, folders, Hugging Face datasets, and rows in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinsmith.data import DataError
from tinsmith.data.jsonl import read_records
from tinsmith.data.tables import present_values
from tinsmith.kitchen.ports import Dataset, DatasetStore, Record, dataset_of


class FileDatasets(DatasetStore):
    """`.jsonl` and `.json` lines, `.parquet`, and folders.

    A folder's files are its splits, each by its stem; one of `.txt` files gives a record `{"text", "path"}` each.
    """

    def load_dataset(self, name: str) -> Dataset:
        path = Path(name)
        if path.is_dir():
            return self._folder(path)
        records, sha256 = read_records(path)
        return Dataset(
            name=str(path), records=tuple(Record(values=row, source=source) for row, source in records), sha256=sha256
        )

    def _folder(self, path: Path) -> Dataset:
        texts = sorted(path.glob("*.txt"))
        parts = [
            self.load_dataset(str(file)) for file in sorted(path.iterdir()) if file.suffix in (".jsonl", ".parquet")
        ]
        if bool(texts) == bool(parts):
            what = "both text and data files" if texts else "neither .jsonl, .parquet nor .txt files"
            raise DataError(f"folder {str(path)!r} holds {what}")
        if texts:
            return dataset_of(str(path), [{"text": _text(file), "path": file.name} for file in texts])
        return _joined(str(path), parts)


@dataclass(slots=True)
class HubDatasets(DatasetStore):
    """Datasets of the package `datasets`: `ID`, `ID/CONFIG` is not read; splits as the dataset has them."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """For `datasets.load_dataset`."""

    def load_dataset(self, name: str) -> Dataset:
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"loading {name!r} needs the package datasets; install it, or give a file") from error
        try:
            found = datasets.load_dataset(name, **self.options)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot load the dataset {name!r}: {error}") from error
        if not isinstance(found, dict):
            return dataset_of(name, [present_values(row) for row in found])
        parts = [dataset_of(f"{name}[{split}]", [present_values(row) for row in rows]) for split, rows in found.items()]
        return _joined(name, parts, names=list(found))


@dataclass(slots=True)
class MemoryDatasets(DatasetStore):
    """Rows by name, for tests and notebooks."""

    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    default_data: str | None = None
    """What a recipe takes whose config names no data."""

    def load_dataset(self, name: str) -> Dataset:
        if name not in self.rows:
            raise DataError(f"no dataset {name!r}; there are {', '.join(map(repr, self.rows)) or 'none'}")
        return dataset_of(name, self.rows[name])


def _joined(name: str, parts: Sequence[Dataset], names: Sequence[str] = ()) -> Dataset:
    """One dataset of several, each of them a split."""
    splits, start = {}, 0
    for number, part in enumerate(parts):
        split = names[number] if names else Path(part.name).stem
        splits[split] = tuple(range(start, start + len(part)))
        start += len(part)
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    records = tuple(record for part in parts for record in part)
    return Dataset(name=name, records=records, sha256=digest, splits=splits)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(file)!r}: {error}") from error
