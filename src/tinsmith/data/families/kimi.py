"""Kimi K2: `<|im_user|>user<|im_middle|>…<|im_end|>`, with tool calls by id (`functions.NAME:INDEX`).

`thinking` is K2-Thinking, which writes `<think>…</think>` first. Its template drops the thought of a finished answer;
here that of the last message is kept, because it is what training is for. Everything else is the template's text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar, Final

from tinsmith.data.answers import CallFault, ParsedAnswer, read_arguments
from tinsmith.data.conversations import Conversation, Message, ToolCall
from tinsmith.data.families.base import FamilyRenderer, Pieces, is_last_assistant
from tinsmith.data.segments import Marker, Segment
from tinsmith.data.tokenizers import ChatTokenizer

_END: Final = "<|im_end|>"
_MIDDLE: Final = "<|im_middle|>"
_CALLS_BEGIN: Final = "<|tool_calls_section_begin|>"
_CALLS_END: Final = "<|tool_calls_section_end|>"
_CALL_BEGIN: Final = "<|tool_call_begin|>"
_ARGUMENTS: Final = "<|tool_call_argument_begin|>"
_CALL_END: Final = "<|tool_call_end|>"


class KimiRenderer(FamilyRenderer):
    """`system`: what the template says where a conversation has no system message.

    `compact_tools`: whether the template writes descriptions of tools without spaces.
    """

    name = "kimi_k2"
    markers: ClassVar[tuple[str, ...]] = (
        "<|im_system|>", "<|im_user|>", "<|im_assistant|>", _MIDDLE, _END, _CALLS_BEGIN, _CALLS_END, _CALL_BEGIN,
        _ARGUMENTS, _CALL_END,
    )  # fmt: skip
    requires: ClassVar[tuple[str, ...]] = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", _MIDDLE, _END)
    drops_last_thought: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        thinking: bool = False,
        system: str = "You are Kimi, an AI assistant created by Moonshot AI.",
        compact_tools: bool = True,
        verify: bool = True,
    ) -> None:
        self.name = "kimi_k2_thinking" if thinking else "kimi_k2"
        self._thinking = thinking
        self._system = system
        self._separators = (",", ":") if compact_tools else (", ", ": ")
        super().__init__(tokenizer, verify=verify)

    @property
    def stop(self) -> list[int]:
        return [self._encoder.mark_id(_END)]

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        self._no_images(conversation)
        pieces = Pieces()
        messages = conversation.messages
        if conversation.tools:
            tools = [tool.as_dict() for tool in conversation.tools]
            pieces.frame(f"<|im_system|>tool_declare{_MIDDLE}")
            pieces.quoted(json.dumps(tools, ensure_ascii=False, separators=self._separators))
            pieces.frame(_END)
        if messages[0].role != "system":
            pieces.frame(f"<|im_system|>system{_MIDDLE}{self._system}{_END}")
        finals = [i for i, message in enumerate(messages) if message.role == "assistant" and not message.tool_calls]
        last_final = finals[-1] if finals else -1
        for index, message in enumerate(messages):
            _write_header(pieces, message, index)
            if message.role == "assistant":
                self._write_answer(pieces, conversation, index, is_recent=index > last_final)
            elif message.role == "tool":
                pieces.frame("## Return of ", index)
                pieces.quoted(self._answered_id(conversation, index), index)
                pieces.frame("\n", index)
                pieces.said(message.content, index)
            else:
                pieces.said(message.content, index)
            pieces.end(_END, index)
        if generation:
            pieces.frame(f"<|im_assistant|>assistant{_MIDDLE}")
        return pieces.segments

    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        parts = self._encoder.split(tokens)
        ended = bool(parts) and parts[-1] == Marker(text=_END)
        parts = parts[:-1] if ended else parts
        begin = parts.index(Marker(text=_CALLS_BEGIN)) if Marker(text=_CALLS_BEGIN) in parts else len(parts)
        text = _joined(parts[:begin])
        calls, faults = _read_calls(parts[begin + 1 :]) if begin < len(parts) else ([], [])
        if faults:
            text, calls = _joined(parts), []
        thinking, content = None, text
        if self._thinking and text.startswith("<think>"):
            before, end, after = text.removeprefix("<think>").partition("</think>")
            thinking, content = before, after
            faults += [] if end else ["the thought has no end"]
        message = Message(role="assistant", content=content, thinking=thinking or None, tool_calls=tuple(calls))
        return ParsedAnswer(message=message, ended=ended, faults=tuple(faults))

    def _write_answer(self, pieces: Pieces, conversation: Conversation, index: int, *, is_recent: bool) -> None:
        message = conversation.messages[index]
        keeps = is_recent or is_last_assistant(conversation.messages, index)
        if self._thinking:
            pieces.end("<think>", index)
            pieces.said((message.thinking or "") if keeps else "", index)
            pieces.end("</think>", index)
        elif message.thinking and keeps:
            raise self.refuse(conversation, index, "a thought has no place")
        pieces.said(message.content, index)
        if message.tool_calls:
            pieces.end(_CALLS_BEGIN, index)
            for number, call in enumerate(message.tool_calls):
                if call.id is None:
                    raise self.refuse(
                        conversation, index, f"call {number + 1} needs an id, such as 'functions.{call.name}:{number}'"
                    )
                pieces.end(_CALL_BEGIN, index)
                pieces.said(call.id, index)
                pieces.end(_ARGUMENTS, index)
                pieces.said(call.arguments_json, index)
                pieces.end(_CALL_END, index)
            pieces.end(_CALLS_END, index)

    def _answered_id(self, conversation: Conversation, index: int) -> str:
        answered = conversation.messages[index].tool_call_id
        if answered is None:
            raise self.refuse(conversation, index, "a tool's message needs the tool_call_id that it answers")
        return answered


def _write_header(pieces: Pieces, message: Message, index: int) -> None:
    marker = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}.get(message.role, "<|im_system|>")
    pieces.frame(marker, index)
    pieces.quoted(message.name or message.role, index)
    pieces.frame(_MIDDLE, index)


def _joined(parts: Sequence[Marker | str]) -> str:
    return "".join(part.text if isinstance(part, Marker) else part for part in parts)


def _read_calls(parts: Sequence[Marker | str]) -> tuple[list[ToolCall], list[str]]:
    """`<|tool_call_begin|>ID<|tool_call_argument_begin|>JSON<|tool_call_end|>`, as often as there are calls."""
    calls: list[ToolCall] = []
    faults = [] if Marker(text=_CALLS_END) in parts else ["the tool calls have no end"]
    listed = _joined(parts).partition(_CALLS_END)[0]
    for item in listed.split(_CALL_BEGIN)[1:]:
        call_id, _, arguments = item.strip().removesuffix(_CALL_END).partition(_ARGUMENTS)
        call_id = call_id.strip()
        name = call_id.removeprefix("functions.").rpartition(":")[0] or call_id
        try:
            calls.append(read_arguments(name, arguments, call_id=call_id))
        except CallFault as fault:
            faults.append(f"{fault}: {item[:80]!r}")
    return calls, faults
