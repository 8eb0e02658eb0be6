"""Calls of tools in the text that Qwen and Hermes models write: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

What is not exactly that stays text: nothing a model said is lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

from tinsmith.server.chat.text import held_length

OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Any]

    @property
    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)


Part: TypeAlias = str | ToolCall


class ToolCallText:
    """Text in, text and calls out. White space around calls is the template's and is dropped."""

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False
        self.num_calls = 0

    def add(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while (end := self._held.find(CLOSING, max(0, self._held.find(OPENING)))) >= 0 and OPENING in self._held:
            end += len(CLOSING)
            parts += self._split(self._held[:end])
            self._held = self._held[end:]
        hold = held_length(self._held, OPENING)
        shown = self._held[: len(self._held) - hold].rstrip()
        parts += self._text(shown)
        self._held = self._held[len(shown) :]
        return parts

    def end(self) -> list[Part]:
        """What was begun and is no call."""
        held, self._held = self._held, ""
        return self._text("" if self._after_call and not held.strip() else held)

    def _split(self, text: str) -> list[Part]:
        """`text` ends with the first closing tag after an opening one."""
        before, _, body = text.partition(OPENING)
        call = _parse(body.removesuffix(CLOSING))
        if call is None:
            return self._text(text)
        parts = self._text(before.rstrip())
        self._after_call = True
        self.num_calls += 1
        return [*parts, call]

    def _text(self, text: str) -> list[Part]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._after_call = False
        return [text]


def _parse(body: str) -> ToolCall | None:
    try:
        orjson.loads(body)  # no NaN
        value = json.loads(body)
        orjson.dumps(value)  # no half of a surrogate pair, no number beyond 64 bits: no answer can hold those
    except (ValueError, TypeError, RecursionError):
        return None
    match value:
        case {"name": str(name), **rest} if name:
            arguments = rest.get("arguments", {})
            if isinstance(arguments, dict) and rest.keys() <= {"arguments"}:
                return ToolCall(name=name, arguments=arguments)
    return None
