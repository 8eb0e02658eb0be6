"""Conversations from tables: Parquet files and Hugging Face data sets.

A table gives every row every column, so a key without a value is `None` there; such keys are left out before a row is
read as a record.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from tinsmith.data.conversations import Conversation
from tinsmith.data.errors import DataError
from tinsmith.data.records import conversation_from_record


def parquet_records(content: bytes, path: Path) -> list[tuple[dict[str, Any], str]]:
    """Record and source (`FILE:row N`, from 1) of every row. Raises `DataError` for what is no Parquet."""
    try:
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"reading {path} needs the package pyarrow: pip install 'tinsmith[data]'") from error
    try:
        file = parquet.ParquetFile(io.BytesIO(content))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error
    rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
    return [(present_values(row), f"{path}:row {number}") for number, row in enumerate(rows, start=1)]


def table_conversations(rows: Iterable[Mapping[str, Any]], *, name: str) -> list[Conversation]:
    """Every row of a table that is already open, such as a `datasets.Dataset`. Raises `DataError` naming the row."""
    return [
        conversation_from_record(present_values(row), source=f"{name}:row {number}")
        for number, row in enumerate(rows, start=1)
    ]


def load_hub_conversations(
    dataset: str, *, split: str = "train", config: str | None = None, revision: str | None = None
) -> list[Conversation]:
    """All rows of one split of a Hugging Face data set, by its id or the folder it was saved to.

    Raises `DataError` if the package, the data set or the split is missing, and for a row that is no conversation.
    """
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise DataError(f"reading data set {dataset!r} needs the package: pip install 'tinsmith[data]'") from error
    try:
        if Path(dataset).is_dir() and (Path(dataset) / "dataset_dict.json").exists():
            table = datasets.load_from_disk(dataset)[split]
        elif Path(dataset).is_dir() and (Path(dataset) / "state.json").exists():
            table = datasets.load_from_disk(dataset)
        else:
            table = datasets.load_dataset(dataset, config, split=split, revision=revision)
    except KeyError as error:
        raise DataError(f"data set {dataset!r} has no split {split!r}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read split {split!r} of data set {dataset!r}: {error}") from error
    return table_conversations(table, name=f"{dataset}[{split}]")


def present_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that have no value, in the row, its messages and their calls; arguments stay as they are."""
    kept = {key: value for key, value in row.items() if value is not None}
    messages = kept.get("messages")
    if isinstance(messages, list):
        kept["messages"] = [_present_message(message) if isinstance(message, dict) else message for message in messages]
    return kept


def _present_message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if value is not None}
    for key in ("tool_calls", "content"):
        if isinstance(kept.get(key), list):
            kept[key] = [
                {name: value for name, value in item.items() if value is not None} if isinstance(item, dict) else item
                for item in kept[key]
            ]
    if kept.get("tool_calls") == []:
        del kept["tool_calls"]
    return kept
