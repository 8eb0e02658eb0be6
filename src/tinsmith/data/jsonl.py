"""Read conversations from JSON lines.

A line is one JSON object in one of four forms:

    {"messages": [{"role": "user", "content": "…"}, …]}
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "response": "…"}
    {"input": "…", "output": "…"}

Other keys beside a form (an id, a source) are not read; `ConversationFile.ignored_keys` counts them. Keys that would
change what is trained, and every unknown key of a message, are errors.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tinsmith.data.conversations import Conversation, Message
from tinsmith.data.errors import DataError

PAIR_FORMS: Final[tuple[tuple[str, str], ...]] = (
    ("prompt", "completion"),
    ("instruction", "response"),
    ("input", "output"),
)
"""Forms of one question and one answer, by their keys."""

_FORMS: Final = (("messages",), *PAIR_FORMS)

REFUSED_KEYS: Final = ("tools", "functions", "chosen", "rejected", "images", "system")
"""Keys that mean something to other trainers; leaving them out would train on another conversation."""

MESSAGE_KEYS: Final = ("role", "content", "train")
_FORM_KEYS: Final = {key for form in _FORMS for key in form}
_FORMS_TEXT: Final = '"messages", or ' + ", or ".join(f'"{first}" and "{second}"' for first, second in PAIR_FORMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationFile:
    path: Path
    conversations: tuple[Conversation, ...]
    sha256: str
    """Of the file's bytes, in hexadecimal."""
    ignored_keys: Mapping[str, int] = field(default_factory=dict)
    """Keys beside the form, and how many lines had each."""


def read_conversations(path: Path | str) -> ConversationFile:
    """Read a whole JSONL file; blank lines are skipped.

    Raises `DataError` naming file, line, field and value at the first line that cannot be read, and for a file that is
    missing or holds no conversation.
    """
    path = Path(path)
    records, sha256 = read_records(path)
    return conversations_of(path, records, sha256=sha256)


def read_records(path: Path) -> tuple[list[tuple[dict[str, Any], str]], str]:
    """The JSON object and the source `FILE:LINE` of each line that is not blank, and the SHA-256 of the file.

    Raises `DataError` naming file and line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the data file {str(path)!r}: {error.strerror}") from error
    lines = [(line, f"{path}:{number}") for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    return [(_parse_line(line, source), source) for line, source in lines], hashlib.sha256(content).hexdigest()


def conversations_of(path: Path, records: Iterable[tuple[Mapping[str, Any], str]], *, sha256: str) -> ConversationFile:
    """The conversations of records and their sources. Raises `DataError`; also if there are none."""
    ignored: Counter[str] = Counter()
    conversations = []
    for record, source in records:
        conversations.append(conversation_from_record(record, source=source))
        ignored.update(record.keys() - _FORM_KEYS)
    if not conversations:
        raise DataError(f"{path} holds no conversation; expected one JSON object per line with {_FORMS_TEXT}")
    return ConversationFile(path=path, conversations=tuple(conversations), sha256=sha256, ignored_keys=dict(ignored))


def conversation_from_record(record: Mapping[str, Any], *, source: str) -> Conversation:
    """Turn one decoded line into a conversation. Raises `DataError`."""
    form = _form_of(record, source)
    if form == ("messages",):
        return _from_messages(record["messages"], source)
    question, answer = form
    return Conversation(
        messages=(
            Message(role="user", content=_text(record[question], source, question)),
            Message(role="assistant", content=_text(record[answer], source, answer)),
        ),
        source=source,
    )


def _parse_line(line: bytes, source: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON: {error.msg} at column {error.colno}: {_shown(line.decode())}") from error
    except RecursionError as error:
        raise DataError(f"{source}: the JSON is nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(f"{source}: expected a JSON object, not {_shown(record)}")
    return record


def _form_of(record: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """The keys of the one form that this record is in."""
    for key in REFUSED_KEYS:
        if key in record:
            raise DataError(f"{source}: field {key!r} is not supported; it holds {_shown(record[key])}")
    whole = [form for form in _FORMS if all(key in record for key in form)]
    if len(whole) > 1:
        raise DataError(f"{source}: the line is in two forms at once, {whole[0]!r} and {whole[1]!r}; keep one")
    if not whole:
        raise DataError(f"{source}: {_why_no_form(record)}")
    for key in (key for form in _FORMS for key in form if key not in whole[0]):
        if record.get(key):
            raise DataError(
                f"{source}: field {key!r} stands beside {whole[0]!r} and would be lost; "
                f"it holds {_shown(record[key])}. Write the line as messages"
            )
    return whole[0]


def _why_no_form(record: Mapping[str, Any]) -> str:
    for form in PAIR_FORMS:
        for missing, present in (form, form[::-1]):
            if present in record:
                return f"field {missing!r} is missing beside {present!r}"
    return f"no known form; expected {_FORMS_TEXT}, found the keys {sorted(record)!r}"


def _from_messages(value: Any, source: str) -> Conversation:
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: field 'messages' must be a list of messages, not {_shown(value)}")
    return Conversation(
        messages=tuple(_message(item, source, f"messages[{index}]") for index, item in enumerate(value)), source=source
    )


def _message(item: Any, source: str, place: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{source}: field {place!r} must be an object with role and content, not {_shown(item)}")
    for key in ("role", "content"):
        if key not in item:
            raise DataError(f"{source}: field '{place}.{key}' is missing in {_shown(item)}")
    for key in item:
        if key not in MESSAGE_KEYS:
            raise DataError(
                f"{source}: field '{place}.{key}' is not supported; it holds {_shown(item[key])}. "
                f"A message has {', '.join(MESSAGE_KEYS)}"
            )
    train = item.get("train")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{source}: field '{place}.train' must be true or false, not {_shown(train)}")
    content = _text(item["content"], source, f"{place}.content")
    try:
        return Message(role=item["role"], content=content, train=train)
    except ValueError as error:
        raise DataError(f"{source}: field '{place}.role': {error}") from error


def _text(value: Any, source: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{source}: field {place!r} must be a string, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: field {place!r} is not valid Unicode at character {error.start}") from error
    return value


def _shown(value: Any) -> str:
    """`value` as an error shows it: one short line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
