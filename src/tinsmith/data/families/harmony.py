"""Harmony, the format of GPT-OSS: every message has a channel, and a thought is a message of its own.

`<|start|>assistant<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`

As in the models' own template, thoughts of earlier answers are left out; so is a thought before a call once an answer
follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date as Date  # noqa: N812 - a field here is called date
from typing import Any, ClassVar, Final, Literal, TypeAlias

from tinsmith.data.answers import CallFault, ParsedAnswer, read_arguments
from tinsmith.data.conversations import Conversation, Message, ToolCall
from tinsmith.data.families.base import FamilyRenderer, Pieces
from tinsmith.data.families.typescript import tool_namespace
from tinsmith.data.segments import Marker, Segment
from tinsmith.data.tokenizers import ChatTokenizer

Effort: TypeAlias = Literal["low", "medium", "high"]

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_END, _RETURN, _CALL, _CONSTRAIN = "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"
_CHANNELS: Final = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
_TOOLS_CHANNEL: Final = "\nCalls to these tools must go to the commentary channel: 'functions'."


class HarmonyRenderer(FamilyRenderer):
    """`date` (`2025-08-05`) is what the system message calls the current date; today if `None`, as the template does.

    `gap_after_instructions`: newer templates end the developer's instructions with an empty line, older ones begin the
    tools with it.
    """

    name = "gpt_oss"
    markers: ClassVar[tuple[str, ...]] = (_START, _CHANNEL, _MESSAGE, _END, _RETURN, _CALL, _CONSTRAIN)
    requires: ClassVar[tuple[str, ...]] = (_START, _CHANNEL, _MESSAGE, _END, _RETURN, _CALL)

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        effort: Effort = "medium",
        date: str | None = None,
        identity: str = "You are ChatGPT, a large language model trained by OpenAI.",
        gap_after_instructions: bool = True,
        verify: bool = True,
    ) -> None:
        if effort not in ("low", "medium", "high"):
            raise ValueError(f"effort {effort!r} is none of low, medium, high")
        self._effort = effort
        self._date = date or Date.today().isoformat()
        self._identity = identity
        self._gap = gap_after_instructions
        super().__init__(tokenizer, verify=verify and self._date == Date.today().isoformat())

    @property
    def stop(self) -> list[int]:
        return [self._encoder.mark_id(_RETURN), self._encoder.mark_id(_CALL)]

    @property
    def template_options(self) -> Mapping[str, Any]:
        return {"reasoning_effort": self._effort, "model_identity": self._identity}

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        self._no_images(conversation)
        pieces = Pieces()
        pieces.frame(f"{_START}system{_MESSAGE}")
        pieces.quoted(self._identity)
        pieces.frame(
            f"\nKnowledge cutoff: 2024-06\nCurrent date: {self._date}\n\nReasoning: {self._effort}\n\n{_CHANNELS}"
        )
        pieces.frame((_TOOLS_CHANNEL if conversation.tools else "") + _END)
        messages = conversation.messages
        first = int(messages[0].role in ("developer", "system"))
        self._write_developer(pieces, conversation, is_given=bool(first))
        called: str | None = None
        for index, message in enumerate(messages[first:], start=first):
            match message.role:
                case "user":
                    pieces.frame(f"{_START}user{_MESSAGE}", index)
                    pieces.said(message.content, index)
                    pieces.end(_END, index)
                case "assistant" if message.tool_calls:
                    called = self._write_call(pieces, conversation, index)
                case "assistant":
                    called = None if index < len(messages) - 1 or generation else called
                    self._write_answer(pieces, message, index, is_last=index == len(messages) - 1 and not generation)
                case "tool":
                    self._write_result(pieces, conversation, index, called)
                case _:
                    raise self.refuse(conversation, index, f"role {message.role!r} has a place only at the beginning")
        if generation:
            pieces.frame(f"{_START}assistant")
        return pieces.segments

    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        parts = self._encoder.split(tokens)
        ended = bool(parts) and parts[-1] in (Marker(text=_RETURN), Marker(text=_CALL))
        thinking: list[str] = []
        content: list[str] = []
        calls: list[ToolCall] = []
        faults: list[str] = []
        for header, body, is_whole in _messages(parts):
            channel, recipient = _channel(header), _recipient(header)
            if recipient is not None:
                try:
                    calls.append(read_arguments(recipient.removeprefix("functions."), body))
                except CallFault as fault:
                    faults.append(f"{fault}: {body[:80]!r}")
                    content.append(body)
            elif channel == "analysis":
                thinking.append(body)
                faults += [] if is_whole else ["the thought has no end"]
            else:
                content.append(body)
                faults += [] if channel in ("final", "commentary") else [f"a message without a channel: {body[:80]!r}"]
        message = Message(
            role="assistant",
            content="".join(content),
            thinking="\n".join(thinking) or None,
            tool_calls=tuple(calls),
        )
        return ParsedAnswer(message=message, ended=ended, faults=tuple(faults))

    def _write_developer(self, pieces: Pieces, conversation: Conversation, *, is_given: bool) -> None:
        instructions = conversation.messages[0].content if is_given else ""
        if not instructions and not conversation.tools:
            return
        pieces.frame(f"{_START}developer{_MESSAGE}", 0 if is_given else None)
        if instructions:
            pieces.frame("# Instructions\n\n", 0)
            pieces.said(instructions, 0)
            pieces.frame("\n\n" if self._gap else "", 0)
        if conversation.tools:
            pieces.frame("# Tools\n\n" if self._gap else "\n\n# Tools\n\n")
            pieces.quoted(tool_namespace("functions", conversation.tools, conversation.source))
        if instructions and not conversation.tools:
            pieces.end(_END, 0)
        else:
            pieces.frame(_END)

    def _write_call(self, pieces: Pieces, conversation: Conversation, index: int) -> str:
        """Returns the name of the tool."""
        messages = conversation.messages
        message = messages[index]
        if len(message.tool_calls) != 1:
            raise self.refuse(conversation, index, "a message calls one tool at once")
        if message.content:
            raise self.refuse(conversation, index, "beside a tool call there is a thought, but no content")
        is_answered = any(later.role == "assistant" and not later.tool_calls for later in messages[index + 1 :])
        pieces.frame(f"{_START}assistant", index)
        if message.thinking and not is_answered:
            _write_thought(pieces, message.thinking, index)
            pieces.end(f"{_START}assistant", index)
        call = message.tool_calls[0]
        pieces.end(" to=functions.", index)
        pieces.said(call.name, index)
        pieces.end(f"{_CHANNEL}commentary json{_MESSAGE}", index)
        pieces.said(call.arguments_json, index)
        pieces.end(_CALL, index)
        return call.name

    def _write_answer(self, pieces: Pieces, message: Message, index: int, *, is_last: bool) -> None:
        pieces.frame(f"{_START}assistant", index)
        if is_last and message.thinking is not None:
            _write_thought(pieces, message.thinking, index)
            pieces.end(f"{_START}assistant", index)
        pieces.end(f"{_CHANNEL}final{_MESSAGE}", index)
        pieces.said(message.content, index)
        pieces.end(_RETURN if is_last else _END, index)

    def _write_result(self, pieces: Pieces, conversation: Conversation, index: int, called: str | None) -> None:
        if called is None:
            raise self.refuse(conversation, index, "a tool answers, but no tool was called")
        pieces.frame(f"{_START}functions.", index)
        pieces.quoted(called, index)
        pieces.frame(f" to=assistant{_CHANNEL}commentary{_MESSAGE}", index)
        pieces.said(json.dumps(conversation.messages[index].content, ensure_ascii=False), index)
        pieces.end(_END, index)


def _write_thought(pieces: Pieces, thinking: str, index: int) -> None:
    pieces.end(f"{_CHANNEL}analysis{_MESSAGE}", index)
    pieces.said(thinking, index)
    pieces.end(_END, index)


def _messages(parts: Sequence[Marker | str]) -> list[tuple[str, str, bool]]:
    """Header, text, and whether it has an end, of each message of an answer."""
    found: list[tuple[str, str, bool]] = []
    header, body, in_body = "", "", False
    for part in parts:
        text = part.text if isinstance(part, Marker) else part
        if isinstance(part, Marker) and text in (_END, _RETURN, _CALL):
            found.append((header, body, True))
            header, body, in_body = "", "", False
        elif text == _MESSAGE and isinstance(part, Marker) and not in_body:
            in_body = True
        elif in_body:
            body += text
        else:
            header += text
    if header or body:
        found.append((header, body, False) if in_body else ("", header, False))
    return found


def _channel(header: str) -> str:
    words = header.partition(_CHANNEL)[2].split()
    return words[0].partition("<")[0] if words else ""


def _recipient(header: str) -> str | None:
    _, found, rest = header.partition("to=")
    if not found:
        return None
    words = rest.replace("<|", " <|").split()
    return words[0] if words else None
