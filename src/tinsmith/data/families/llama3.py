"""Llama 3 (`dated=False`) and Llama 3.1 to 3.3, whose system message begins with dates and which call tools.

The templates of 3.2 and 3.3 write the day on which they run; pass that day as `date` to train on another one's text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from tinsmith.data.answers import CallFault, ParsedAnswer, read_call
from tinsmith.data.conversations import Conversation, Message
from tinsmith.data.families.base import FamilyRenderer, Pieces
from tinsmith.data.segments import Segment
from tinsmith.data.tokenizers import ChatTokenizer

_BEGIN: Final = "<|begin_of_text|>"
_END: Final = "<|eot_id|>"
_CALL_END: Final = "<|eom_id|>"
_TOOLS_BEFORE: Final = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.Do not use variables.\n\n"
)


class Llama3Renderer(FamilyRenderer):
    name = "llama3"
    markers: ClassVar[tuple[str, ...]] = (
        _BEGIN, "<|start_header_id|>", "<|end_header_id|>", _END, _CALL_END, "<|python_tag|>",
    )  # fmt: skip
    requires: ClassVar[tuple[str, ...]] = (_BEGIN, "<|start_header_id|>", "<|end_header_id|>", _END)

    def __init__(
        self, tokenizer: ChatTokenizer, *, dated: bool = True, date: str = "26 Jul 2024", verify: bool = True
    ) -> None:
        self._dated = dated
        self._date = date
        super().__init__(tokenizer, verify=verify)

    @property
    def stop(self) -> list[int]:
        ids = self._encoder.marker_ids
        return [ids[end] for end in (_END, _CALL_END) if end in ids]

    @property
    def template_options(self) -> Mapping[str, Any]:
        return {"date_string": self._date} if self._dated else {}

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        self._no_images(conversation)
        if not self._dated:
            self._no_tools(conversation)
        pieces, first = Pieces(), 0
        pieces.frame(_BEGIN)
        if self._dated:
            first = self._write_system(pieces, conversation)
        if conversation.tools:
            first = self._write_tools(pieces, conversation, first)
        for index, message in enumerate(conversation.messages[first:], start=first):
            if message.thinking:
                raise self.refuse(conversation, index, "a thought has no place")
            if message.tool_calls:
                self._write_call(pieces, conversation, index)
            elif message.role == "tool":
                _write_result(pieces, message, index, self._dated)
            else:
                _write_header(pieces, message.role, index)
                pieces.said(message.content.strip(), index)
                pieces.end(_END, index)
        if generation:
            _write_header(pieces, "assistant", None)
        return pieces.segments

    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        answer = list(tokens)
        ended = bool(answer) and answer[-1] in self.stop
        text = self._encoder.decode(answer[:-1] if ended else answer)
        body = text.strip().removeprefix("<|python_tag|>")
        if not (body.startswith('{"name"') and '"parameters"' in body):
            return ParsedAnswer(message=Message(role="assistant", content=text), ended=ended)
        try:
            call = read_call(body, arguments_key="parameters")
        except CallFault as fault:
            message = Message(role="assistant", content=text)
            return ParsedAnswer(message=message, ended=ended, faults=(f"{fault}: {body[:80]!r}",))
        return ParsedAnswer(message=Message(role="assistant", content="", tool_calls=(call,)), ended=ended)

    def _write_system(self, pieces: Pieces, conversation: Conversation) -> int:
        """Returns the index of the first message that is still to be written."""
        first = conversation.messages[0]
        is_given = first.role == "system"
        _write_header(pieces, "system", 0 if is_given else None)
        pieces.frame("Environment: ipython\n" if conversation.tools else "")
        pieces.frame("Cutting Knowledge Date: December 2023\nToday Date: ")
        pieces.quoted(self._date)
        pieces.frame("\n\n")
        if is_given:
            pieces.said(first.content.strip(), 0)
            pieces.end(_END, 0)
        else:
            pieces.frame(_END)
        return int(is_given)

    def _write_tools(self, pieces: Pieces, conversation: Conversation, index: int) -> int:
        """Tools stand in the first message of the user."""
        messages = conversation.messages
        if index >= len(messages) or messages[index].role != "user":
            raise self.refuse(conversation, index, "tools need a user's message to stand in")
        _write_header(pieces, "user", index)
        pieces.frame(_TOOLS_BEFORE, index)
        for tool in conversation.tools:
            pieces.quoted(json.dumps(tool.as_dict(), ensure_ascii=False, indent=4), index)
            pieces.frame("\n\n", index)
        pieces.said(messages[index].content.strip(), index)
        pieces.end(_END, index)
        return index + 1

    def _write_call(self, pieces: Pieces, conversation: Conversation, index: int) -> None:
        message = conversation.messages[index]
        if not self._dated:
            raise self.refuse(conversation, index, "a tool call has no place")
        if len(message.tool_calls) != 1:
            raise self.refuse(conversation, index, "a message calls one tool at once")
        if message.content:
            raise self.refuse(conversation, index, f"beside a tool call there is no place for {message.content[:40]!r}")
        call = message.tool_calls[0]
        _write_header(pieces, "assistant", index)
        pieces.end('{"name": "', index)
        pieces.said(call.name, index)
        pieces.end('", "parameters": ', index)
        pieces.said(call.arguments_json, index)
        pieces.end("}" + _END, index)


def _write_header(pieces: Pieces, role: str, index: int | None) -> None:
    pieces.frame(f"<|start_header_id|>{role}<|end_header_id|>\n\n", index)


def _write_result(pieces: Pieces, message: Message, index: int, dated: bool) -> None:
    """From 3.1 on, the template writes what a tool returned as JSON text."""
    _write_header(pieces, "ipython" if dated else "tool", index)
    pieces.said(json.dumps(message.content, ensure_ascii=False) if dated else message.content.strip(), index)
    pieces.end(_END, index)
