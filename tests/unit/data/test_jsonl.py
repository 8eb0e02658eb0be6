from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.data import (
    Conversation,
    DataError,
    Image,
    Message,
    Tool,
    ToolCall,
    conversation_from_record,
    load_hub_conversations,
    read_conversations,
    table_conversations,
)

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
            '{"messages": [{"role": "user", "contents": "x"}]}',
            r"data.jsonl:2: field 'messages\[0\].contents' is not supported; it holds 'x'. did you mean 'content'\?",
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]}',
            r"data.jsonl:2: field 'messages\[0\]': only an assistant's message has thinking or tool calls",
        ),
        (
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"function": 3}]}]}',
            r"data.jsonl:2: field 'messages\[0\].tool_calls\[0\]' must be a call",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
            r"data.jsonl:2: field 'messages\[0\].tool_calls\[0\].function.arguments' is no JSON",
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "weight": -1}]}',
            r"data.jsonl:2: field 'messages\[0\].weight': weight must be a number of at least 0, not -1.0",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}',
            r"data.jsonl:2: field 'messages\[0\].content\[0\]' must be a part of type 'text' or 'image_url'",
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "train": 1}]}',
            r"data.jsonl:2: field 'messages\[0\].train' must be true or false, not 1",
        ),
        (
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            r"data.jsonl:2: field 'messages\[0\].content' is not valid Unicode at character 0",
        ),
        (
            '{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}",
            "data.jsonl:2: Exceeds the limit .* for integer string conversion",
        ),
        (
            '{"prompt": "a", "completion": "b", "\\ud800": 1}',
            r"data.jsonl:2: field '\\ud800' is not valid Unicode at character 0",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "description": "\\ud800"}]}',
            r"data.jsonl:2: field 'tools\[0\]': the description of tool 'f' is not valid Unicode at character",
        ),
        ('{"messages": [], "functions": [1]}', r"data.jsonl:2: field 'functions' is not supported; it holds \[1\]"),
        ('{"messages": [], "tools": [1]}', r"data.jsonl:2: field 'tools\[0\]' must be a function with a name, not 1"),
        ('{"mesages": []}', r"data.jsonl:2: no known form; .* did you mean 'messages'\?"),
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


@given(
    record=st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "functions", "y"]), VALUE, max_size=4)
)
def test_any_record_becomes_a_conversation_or_a_data_error(record: dict[str, Any]) -> None:
    with nullcontext() if _is_readable(record) else pytest.raises(DataError, match="f:1: "):
        assert conversation_from_record(record, source="f:1").messages


def _is_readable(record: dict[str, Any]) -> bool:
    """The rules again, written down as plainly as possible."""
    if "functions" in record:
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


TALK_WITH_TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "here?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Look.",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}],
        },
        {"role": "tool", "content": "a kettle", "tool_call_id": "c1"},
        {"role": "assistant", "content": "A kettle.", "weight": 0.5},
    ],
    "tools": [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}],
}
EXPECTED = Conversation(
    messages=(
        Message(role="user", content="What is here?"),
        Message(
            role="assistant",
            content="",
            thinking="Look.",
            tool_calls=(ToolCall(name="look", arguments={"at": 1}, id="c1"),),
        ),
        Message(role="tool", content="a kettle", tool_call_id="c1"),
        Message(role="assistant", content="A kettle.", weight=0.5),
    ),
    tools=(Tool(function={"name": "look", "description": "Look.", "parameters": {}}),),
)


def test_tools_calls_thoughts_and_weights_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(TALK_WITH_TOOLS))
    file = read_conversations(path)
    assert file.conversations == (replace(EXPECTED, source=f"{path}:1"),)
    assert file.ignored_keys == {}


def test_a_picture_is_read_with_its_place(tmp_path: Path) -> None:
    url = "data:image/png;base64,aGVsbG8="
    parts = [{"type": "text", "text": "See "}, {"type": "image_url", "image_url": {"url": url}}]
    record = {"messages": [{"role": "user", "content": parts}]}
    message = conversation_from_record(record, source="f:1").messages[0]
    assert message.content == "See "
    assert message.images == (Image(data=b"hello", format="png", at=4),)
    parts[1] = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(DataError, match=r"f:1: field 'messages\[0\].content\[1\]' must hold a picture as a data URL"):
        conversation_from_record(record, source="f:1")


def test_parquet_gives_the_same_conversations_and_names_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    plain = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "id": 7}
    talk = {"messages": TALK_WITH_TOOLS["messages"][1:], "tools": json.dumps(TALK_WITH_TOOLS["tools"])}
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([talk, plain]), path)
    file = read_conversations(path)
    assert file.conversations[0] == replace(EXPECTED, messages=EXPECTED.messages[1:], source=f"{path}:row 1")
    assert file.conversations[1] == replace(
        Conversation.of(("user", "Hi"), ("assistant", "Ho")), source=f"{path}:row 2"
    )
    pq.write_table(pa.Table.from_pylist([plain, {"messages": [{"role": "bot", "content": "x"}]}]), path)
    with pytest.raises(DataError, match=r"data.parquet:row 2: field 'messages\[0\].role': role 'bot' is none of"):
        read_conversations(path)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"data.parquet is no Parquet file"):
        read_conversations(path)


def test_a_hugging_face_data_set_is_read_from_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    talks = load_hub_conversations(str(tmp_path / "set"))
    assert [message.content for talk in talks for message in talk.messages] == ["a", "b", "c", "d"]
    assert talks[1].source == f"{tmp_path / 'set'}[train]:row 2"
    with pytest.raises(DataError, match=r"rows:row 2: field 'completion' is missing beside 'prompt'"):
        table_conversations([rows[0], {"prompt": "c", "completion": None}], name="rows")
