from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.data import Conversation, DataError, conversation_from_record, read_conversations

PAIR = (("user", "How?"), ("assistant", "So."))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]},
        {"prompt": "How?", "completion": "So."},
        {"instruction": "How?", "response": "So."},
        {"input": "How?", "output": "So."},
        {"instruction": "", "input": "How?", "output": "So."},
    ],
)
def test_every_form_gives_the_same_conversation(record: dict[str, Any]) -> None:
    assert conversation_from_record(record, source="a conversation") == Conversation.of(*PAIR)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"messages": ', r"data.jsonl:2: not JSON: Expecting value at column 14: '\{\"messages\": '"),
        ("[1, 2]", r"data.jsonl:2: expected a JSON object, not \[1, 2\]"),
        ("{}", r'data.jsonl:2: no known form; expected "messages", or "prompt" .*, found the keys \[\]'),
        ('{"text": "x"}', r"data.jsonl:2: no known form; .*found the keys \['text'\]"),
        ('{"prompt": "x"}', "data.jsonl:2: field 'completion' is missing beside 'prompt'"),
        ('{"output": "x"}', "data.jsonl:2: field 'input' is missing beside 'output'"),
        ('{"prompt": "x", "completion": 3}', "data.jsonl:2: field 'completion' must be a string, not 3"),
        ('{"prompt": "x", "completion": "y", "input": "a", "output": "b"}', "data.jsonl:2: .* two forms at once"),
        (
            '{"instruction": "Do", "input": "x", "output": "y"}',
            r"data.jsonl:2: field 'instruction' stands beside \('input', 'output'\) and would be lost; it holds 'Do'",
        ),
        ('{"messages": "hi"}', "data.jsonl:2: field 'messages' must be a list of messages, not 'hi'"),
        ('{"messages": []}', r"data.jsonl:2: field 'messages' must be a list of messages, not \[\]"),
        ('{"messages": [1]}', r"data.jsonl:2: field 'messages\[0\]' must be an object with role and content, not 1"),
        ('{"messages": [{"role": "user"}]}', r"data.jsonl:2: field 'messages\[0\].content' is missing in"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            r"data.jsonl:2: field 'messages\[0\].content' must be a string, not None",
        ),
        (
            '{"messages": [{"role": "bot", "content": "x"}]}',
            r"data.jsonl:2: field 'messages\[0\].role': role 'bot' is none of system, developer, user, assistant, tool",
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "tool_calls": []}]}',
            r"data.jsonl:2: field 'messages\[0\].tool_calls' is not supported; it holds \[\]",
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "train": 1}]}',
            r"data.jsonl:2: field 'messages\[0\].train' must be true or false, not 1",
        ),
        (
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            r"data.jsonl:2: field 'messages\[0\].content' is not valid Unicode at character 0",
        ),
        ('{"messages": [], "tools": [1]}', r"data.jsonl:2: field 'tools' is not supported; it holds \[1\]"),
    ],
)
def test_a_bad_line_is_named_with_its_field_and_value(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=complaint):
        read_conversations(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"data.jsonl:2: not UTF-8 at byte 12 of the line"):
        read_conversations(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"data.jsonl holds no conversation"):
        read_conversations(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*none.jsonl.*No such file"):
        read_conversations(tmp_path / "none.jsonl")


def test_keys_beside_the_form_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "id": 1}\r\n\n{"input": "a", "output": "b", "id": 2, "x": 3}')
    file = read_conversations(path)
    assert file.ignored_keys == {"id": 2, "x": 1}
    assert [conversation.source for conversation in file.conversations] == [f"{path}:1", f"{path}:3"]
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c", "completion": "d"}, ensure_ascii=False), encoding="utf-8")
    assert read_conversations(path).conversations[0].messages[0].content == "a\u2028b\x85c"


LEAF = st.none() | st.booleans() | st.integers(2, 9) | st.text(max_size=5)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "bot"])},
    optional={"content": LEAF, "train": LEAF, "x": LEAF},
)
VALUE = LEAF | st.lists(LEAF | MESSAGE, max_size=3)


@given(record=st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "tools", "y"]), VALUE, max_size=4))
def test_any_record_becomes_a_conversation_or_a_data_error(record: dict[str, Any]) -> None:
    with nullcontext() if _is_readable(record) else pytest.raises(DataError, match="f:1: "):
        assert conversation_from_record(record, source="f:1").messages


def _is_readable(record: dict[str, Any]) -> bool:
    """The rules again, written down as plainly as possible."""
    if "tools" in record:
        return False
    pair = (record.get("prompt"), record.get("completion"))
    if "messages" not in record:
        return all(isinstance(text, str) for text in pair)
    messages = record["messages"]
    return (
        not any(pair) and not {"prompt", "completion"} <= record.keys() and bool(messages) and _are_messages(messages)
    )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and isinstance(item.get("content"), str)
        and item.get("role") in ("user", "assistant")
        and item.keys() <= {"role", "content", "train"}
        and item.get("train") in (None, True, False)
        for item in value
    )
