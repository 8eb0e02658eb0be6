"""Sampled answers read back: thoughts, calls of tools, and what is malformed in them.

Two notations are shared by several formats: `<think>…</think>` before an answer, and
`<tool_call>{"name": …, "arguments": {…}}</tool_call>` after it. What is not exactly a call stays content, and the
answer says what is wrong with it: nothing a model said is lost.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tinsmith.data.conversations import Message, ToolCall

_THOUGHT_END = "</think>"
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedAnswer:
    message: Message
    ended: bool
    """Whether the model ended its turn; otherwise it was cut off."""
    faults: tuple[str, ...] = ()
    """What was begun and is malformed: a call that is no JSON, a thought without an end."""


class CallFault(ValueError):
    """Why a text is no call."""


def read_call(text: str, *, arguments_key: str = "arguments", call_id: str | None = None) -> ToolCall:
    """A call written as one JSON object of `name` and arguments. Raises `CallFault`."""
    value = _json_object(text)
    unknown = value.keys() - {"name", arguments_key}
    if unknown:
        raise CallFault(f"a tool call has the keys 'name' and {arguments_key!r}, not {sorted(unknown)[0]!r}")
    return make_call(value.get("name"), value.get(arguments_key, {}), call_id=call_id)


def read_arguments(name: str, text: str, *, call_id: str | None = None) -> ToolCall:
    """A call whose arguments alone are JSON. Raises `CallFault`."""
    return make_call(name, _json_object(text), call_id=call_id)


def make_call(name: object, arguments: object, *, call_id: str | None = None) -> ToolCall:
    """Raises `CallFault`."""
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise CallFault(f"a tool call needs a name and an object of arguments, not {name!r} and {arguments!r}")
    try:
        return ToolCall(name=name, arguments=arguments, id=call_id)
    except ValueError as error:
        raise CallFault(str(error)) from error


def split_thinking(text: str) -> tuple[str | None, str]:
    """Thought and rest of `<think>…</think>…`; the opening tag may be missing, as where the prompt wrote it.

    White space between them is the format's. Without a closing tag there is no thought.
    """
    before, end, after = text.partition(_THOUGHT_END)
    if not end:
        return None, text
    return before.strip("\n").removeprefix("<think>").strip("\n"), after.lstrip("\n")


def read_tagged(text: str, *, ended: bool, thinks: bool) -> ParsedAnswer:
    """An answer in the two shared notations. `thinks`: the prompt already opened a thought."""
    faults = []
    thinking, rest = split_thinking(text)
    if thinking is None and (thinks or text.lstrip().startswith("<think>")):
        faults.append("the thought has no end")
        thinking, rest = text.lstrip("\n").removeprefix("<think>").strip("\n"), ""
    calls = []
    kept, position = [], 0
    for found in _TOOL_CALL.finditer(rest):
        try:
            calls.append(read_call(found[1]))
        except CallFault as fault:
            faults.append(f"{fault}: {found[1][:80]!r}")
            continue
        kept.append(rest[position : found.start()])
        position = found.end()
    kept.append(rest[position:])
    content = "".join(piece.rstrip("\n") for piece in kept) if calls else rest
    if "<tool_call>" in content and not faults:
        faults.append("a tool call has no end")
    message = Message(role="assistant", content=content, thinking=thinking or None, tool_calls=tuple(calls))
    return ParsedAnswer(message=message, ended=ended, faults=tuple(faults))


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallFault(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CallFault("not a JSON object")
    return value
