"""Conversations from files: JSON lines (`.jsonl`, or any other name) and Parquet (`.parquet`).

Each line or row is one record; `records` says what a record may be. `ConversationFile.ignored_keys` counts the keys
that were not read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinsmith.data.conversations import Conversation
from tinsmith.data.errors import DataError
from tinsmith.data.records import FORM_KEYS, FORMS_TEXT, conversation_from_record, shown
from tinsmith.data.tables import parquet_records

__all__ = ["ConversationFile", "conversation_from_record", "conversations_of", "read_conversations", "read_records"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationFile:
    path: Path
    conversations: tuple[Conversation, ...]
    sha256: str
    """Of the file's bytes, in hexadecimal."""
    ignored_keys: Mapping[str, int] = field(default_factory=dict)
    """Keys beside the form, and how many lines had each."""


def read_conversations(path: Path | str) -> ConversationFile:
    """Read a whole file; blank lines are skipped.

    Raises `DataError` naming file, line (or row), field and value at the first that cannot be read, and for a file that
    is missing or holds no conversation.
    """
    path = Path(path)
    records, sha256 = read_records(path)
    return conversations_of(path, records, sha256=sha256)


def read_records(path: Path) -> tuple[list[tuple[dict[str, Any], str]], str]:
    """The record and the source of each line that is not blank (or each row), and the SHA-256 of the file.

    A source is `FILE:LINE`, or `FILE:row N`. Raises `DataError` naming it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the data file {str(path)!r}: {error.strerror}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if path.suffix == ".parquet":
        return parquet_records(content, path), sha256
    lines = [(line, f"{path}:{number}") for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    return [(_parse_line(line, source), source) for line, source in lines], sha256


def conversations_of(path: Path, records: Iterable[tuple[Mapping[str, Any], str]], *, sha256: str) -> ConversationFile:
    """The conversations of records and their sources. Raises `DataError`; also if there are none."""
    ignored: Counter[str] = Counter()
    conversations = []
    for record, source in records:
        conversations.append(conversation_from_record(record, source=source))
        ignored.update(record.keys() - FORM_KEYS)
    if not conversations:
        raise DataError(f"{path} holds no conversation; expected one JSON object per line with {FORMS_TEXT}")
    return ConversationFile(path=path, conversations=tuple(conversations), sha256=sha256, ignored_keys=dict(ignored))


def _parse_line(line: bytes, source: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON: {error.msg} at column {error.colno}: {shown(line.decode())}") from error
    except RecursionError as error:
        raise DataError(f"{source}: the JSON is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{source}: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{source}: expected a JSON object, not {shown(record)}")
    return record
