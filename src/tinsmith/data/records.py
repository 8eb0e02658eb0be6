"""From one decoded record, of whatever file, to one conversation.

A record is an object in one of four forms:

    {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "response": "…"}
    {"input": "…", "output": "…"}

Messages and tools are those of the OpenAI API: content as text or as parts of text and pictures, calls of tools,
results. Other keys beside a form (an id, a source) are not read. Keys that would change what is trained, and every
unknown key of a message, are errors.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final, Literal

from tinsmith.data.conversations import Conversation, Image, Message, Tool, ToolCall
from tinsmith.data.errors import DataError

PAIR_FORMS: Final[tuple[tuple[str, str], ...]] = (
    ("prompt", "completion"),
    ("instruction", "response"),
    ("input", "output"),
)
"""Forms of one question and one answer, by their keys."""

_FORMS: Final = (("messages",), *PAIR_FORMS)

REFUSED_KEYS: Final = ("functions", "chosen", "rejected", "images", "system")
"""Keys that mean something to other trainers; leaving them out would train on another conversation."""

MESSAGE_KEYS: Final = (
    "role", "content", "train", "weight", "thinking", "reasoning_content", "tool_calls", "tool_call_id", "name",
)  # fmt: skip
FORM_KEYS: Final = frozenset({"tools"} | {key for form in _FORMS for key in form})
FORMS_TEXT: Final = '"messages", or ' + ", or ".join(f'"{first}" and "{second}"' for first, second in PAIR_FORMS)


def conversation_from_record(record: Mapping[str, Any], *, source: str) -> Conversation:
    """Turn one decoded line into a conversation. Raises `DataError`."""
    form = _form_of(record, source)
    if form == ("messages",):
        return _from_messages(record["messages"], source, tools=_tools(record.get("tools"), source))
    if record.get("tools"):
        raise DataError(f"{source}: field 'tools' needs 'messages'; it holds {shown(record['tools'])}")
    question, answer = form
    return Conversation(
        messages=(
            Message(role="user", content=_text(record[question], source, question)),
            Message(role="assistant", content=_text(record[answer], source, answer)),
        ),
        source=source,
    )


def _form_of(record: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """The keys of the one form that this record is in."""
    for key in record:
        _text(key, source, key)
    for key in REFUSED_KEYS:
        if key in record:
            raise DataError(f"{source}: field {key!r} is not supported; it holds {shown(record[key])}")
    whole = [form for form in _FORMS if all(key in record for key in form)]
    if len(whole) > 1:
        raise DataError(f"{source}: the line is in two forms at once, {whole[0]!r} and {whole[1]!r}; keep one")
    if not whole:
        raise DataError(f"{source}: {_why_no_form(record)}")
    for key in (key for form in _FORMS for key in form if key not in whole[0]):
        if record.get(key):
            raise DataError(
                f"{source}: field {key!r} stands beside {whole[0]!r} and would be lost; "
                f"it holds {shown(record[key])}. Write the line as messages"
            )
    return whole[0]


def _why_no_form(record: Mapping[str, Any]) -> str:
    for form in PAIR_FORMS:
        for missing, present in (form, form[::-1]):
            if present in record:
                return f"field {missing!r} is missing beside {present!r}"
    near = next((f"; did you mean {match!r}?" for key in record if (match := _nearest(str(key), FORM_KEYS))), "")
    return f"no known form; expected {FORMS_TEXT}, found the keys {sorted(record)!r}{near}"


def _from_messages(value: Any, source: str, *, tools: tuple[Tool, ...]) -> Conversation:
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: field 'messages' must be a list of messages, not {shown(value)}")
    return Conversation(
        messages=tuple(_message(item, source, f"messages[{index}]") for index, item in enumerate(value)),
        source=source,
        tools=tools,
    )


def _message(item: Any, source: str, place: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{source}: field {place!r} must be an object with role and content, not {shown(item)}")
    for key in item:
        if key not in MESSAGE_KEYS:
            near = _nearest(str(key), MESSAGE_KEYS)
            hint = f"did you mean {near!r}? " if near else ""
            raise DataError(
                f"{source}: field '{place}.{key}' is not supported; it holds {shown(item[key])}. {hint}"
                f"A message has {', '.join(MESSAGE_KEYS)}"
            )
    calls = _tool_calls(item.get("tool_calls"), source, f"{place}.tool_calls")
    for key in ("role", *(() if calls else ("content",))):
        if key not in item:
            raise DataError(f"{source}: field '{place}.{key}' is missing in {shown(item)}")
    content, images = _content(item.get("content"), source, f"{place}.content", may_be_null=bool(calls))
    try:
        return Message(
            role=item["role"],
            content=content,
            train=_flag(item.get("train"), source, f"{place}.train"),
            weight=_number(item.get("weight"), source, f"{place}.weight"),
            thinking=_thinking(item, source, place),
            tool_calls=calls,
            tool_call_id=_text_or_none(item.get("tool_call_id"), source, f"{place}.tool_call_id"),
            name=_text_or_none(item.get("name"), source, f"{place}.name"),
            images=images,
        )
    except ValueError as error:
        raise DataError(f"{source}: field '{place}{_culprit(str(error))}': {error}") from error


def _culprit(complaint: str) -> str:
    word = complaint.split(" ")[0]
    return f".{word}" if word in MESSAGE_KEYS else ""


def _content(value: Any, source: str, place: str, *, may_be_null: bool) -> tuple[str, tuple[Image, ...]]:
    """Text and the pictures within it."""
    if value is None and may_be_null:
        return "", ()
    if not isinstance(value, list):
        return _text(value, source, place), ()
    text, images = "", []
    for index, part in enumerate(value):
        where = f"{place}[{index}]"
        match part:
            case {"type": "text", "text": words}:
                text += _text(words, source, f"{where}.text")
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                images.append(_picture(url, len(text), source, where))
            case _:
                raise DataError(
                    f"{source}: field {where!r} must be a part of type 'text' or 'image_url', not {shown(part)}"
                )
    return text, tuple(images)


def _picture(url: str, at: int, source: str, place: str) -> Image:
    head, found, encoded = url.partition(";base64,")
    kinds: dict[str, Literal["png", "jpeg"]] = {"data:image/png": "png", "data:image/jpeg": "jpeg"}
    if not found or head not in kinds:
        raise DataError(
            f"{source}: field {place!r} must hold a picture as a data URL of image/png or image/jpeg, not {shown(url)}"
        )
    try:
        return Image(data=base64.b64decode(encoded, validate=True), format=kinds[head], at=at)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{source}: field {place!r} holds no base64: {error}") from error


def _thinking(item: Mapping[str, Any], source: str, place: str) -> str | None:
    names = [name for name in ("thinking", "reasoning_content") if item.get(name) is not None]
    if len(names) == 2 and item["thinking"] != item["reasoning_content"]:
        raise DataError(f"{source}: field '{place}.thinking' differs from 'reasoning_content'; keep one")
    return _text(item[names[0]], source, f"{place}.{names[0]}") if names else None


def _tool_calls(value: Any, source: str, place: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{source}: field {place!r} must be a list of calls, not {shown(value)}")
    return tuple(_tool_call(item, source, f"{place}[{index}]") for index, item in enumerate(value))


def _tool_call(item: Any, source: str, place: str) -> ToolCall:
    """Of the OpenAI form, whose arguments are JSON text, or the same with the arguments as an object."""
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise DataError(f"{source}: field {place!r} must be a call with 'function': name, arguments; not {shown(item)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise DataError(f"{source}: field '{place}.function.arguments' is no JSON: {error}") from error
    try:
        call_id = _text_or_none(item.get("id"), source, f"{place}.id")
        return ToolCall(name=function["name"], arguments=arguments, id=call_id)
    except ValueError as error:
        raise DataError(f"{source}: field {place!r}: {error}") from error


def _tools(value: Any, source: str) -> tuple[Tool, ...]:
    if value is None:
        return ()
    if isinstance(value, str):  # tables often keep what has no fixed form as JSON text
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{source}: field 'tools' is no JSON: {error}") from error
    if not isinstance(value, list):
        raise DataError(f"{source}: field 'tools' must be a list of functions, not {shown(value)}")
    tools = []
    for index, item in enumerate(value):
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{source}: field 'tools[{index}]' must be a function with a name, not {shown(item)}")
        try:
            tools.append(Tool(function=function))
        except ValueError as error:
            raise DataError(f"{source}: field 'tools[{index}]': {error}") from error
    return tuple(tools)


def _flag(value: Any, source: str, place: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{source}: field {place!r} must be true or false, not {shown(value)}")
    return value


def _number(value: Any, source: str, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{source}: field {place!r} must be a number, not {shown(value)}")
    return float(value)


def _text_or_none(value: Any, source: str, place: str) -> str | None:
    return None if value is None else _text(value, source, place)


def _text(value: Any, source: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{source}: field {place!r} must be a string, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: field {place!r} is not valid Unicode at character {error.start}") from error
    return value


def _nearest(name: str, valid: Any) -> str | None:
    found = get_close_matches(name, sorted(valid), n=1, cutoff=0.7)
    return found[0] if found else None


def shown(value: Any) -> str:
    """`value` as an error shows it: one short line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
