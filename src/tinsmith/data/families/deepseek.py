"""DeepSeek V3 and V3.1: `<｜User｜>…<｜Assistant｜></think>…<｜end▁of▁sentence｜>`.

With `thinking` the prompt opens a thought. The models' own template drops every thought of a finished turn, so a
conversation to train on would lose what is to be learned: here the thought of the last message is kept, as the model
itself would have written it. Everything else is the template's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from tinsmith.data.answers import CallFault, ParsedAnswer, read_arguments
from tinsmith.data.conversations import Conversation, Message, ToolCall
from tinsmith.data.families.base import FamilyRenderer, Pieces, is_last_assistant
from tinsmith.data.segments import Marker, Segment
from tinsmith.data.tokenizers import ChatTokenizer

_BEGIN: Final = "<｜begin▁of▁sentence｜>"
_END: Final = "<｜end▁of▁sentence｜>"
_USER: Final = "<｜User｜>"
_ASSISTANT: Final = "<｜Assistant｜>"
_CALLS_BEGIN: Final = "<｜tool▁calls▁begin｜>"
_CALLS_END: Final = "<｜tool▁calls▁end｜>"
_CALL_BEGIN: Final = "<｜tool▁call▁begin｜>"
_CALL_END: Final = "<｜tool▁call▁end｜>"
_SEP: Final = "<｜tool▁sep｜>"
_OUTPUT_BEGIN: Final = "<｜tool▁output▁begin｜>"
_OUTPUT_END: Final = "<｜tool▁output▁end｜>"


class DeepSeekRenderer(FamilyRenderer):
    name = "deepseek_v3"
    markers: ClassVar[tuple[str, ...]] = (
        _BEGIN, _END, _USER, _ASSISTANT, _CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEP, _OUTPUT_BEGIN,
        _OUTPUT_END,
    )  # fmt: skip
    requires: ClassVar[tuple[str, ...]] = (_BEGIN, _END, _USER, _ASSISTANT)
    drops_last_thought: ClassVar[bool] = True
    json_arguments: ClassVar[bool] = True

    def __init__(self, tokenizer: ChatTokenizer, *, thinking: bool = False, verify: bool = True) -> None:
        self._thinking = thinking
        super().__init__(tokenizer, verify=verify)

    @property
    def stop(self) -> list[int]:
        return [self._encoder.mark_id(_END)]

    @property
    def template_options(self) -> Mapping[str, Any]:
        return {"thinking": self._thinking}

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        self._no_images(conversation)
        self._no_tools(conversation)
        pieces = Pieces()
        messages = conversation.messages
        pieces.frame(_BEGIN)
        _write_system(pieces, messages)
        before = ""  # the role of the message before, systems aside: the format writes no header after a tool's output
        for index, message in enumerate(messages):
            match message.role:
                case "system":
                    continue
                case "user":
                    pieces.frame(_USER, index)
                    pieces.said(message.content, index)
                case "assistant":
                    self._write_answer(pieces, conversation, index, before)
                case "tool":
                    pieces.frame(_OUTPUT_BEGIN, index)
                    pieces.said(message.content, index)
                    pieces.frame(_OUTPUT_END, index)
                case _:
                    raise self.refuse(conversation, index, f"role {message.role!r} has no place")
            before = message.role
        if generation and before == "user":
            pieces.frame(_ASSISTANT)
            pieces.frame("<think>" if self._thinking else "</think>")
        return pieces.segments

    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        parts = self._encoder.split(tokens)
        ended = bool(parts) and parts[-1] == Marker(text=_END)
        text = "".join(part.text if isinstance(part, Marker) else part for part in (parts[:-1] if ended else parts))
        calls: list[ToolCall] = []
        faults: list[str] = []
        if Marker(text=_CALLS_BEGIN) in parts:
            spoken, _, listed = text.partition(_CALLS_BEGIN)
            calls, faults = _read_calls(listed)
            text = text if faults else spoken
        thinking, content = _split_thought(text) if self._thinking else (None, text)
        if self._thinking and thinking is None:
            faults.append("the thought has no end")
            thinking, content = text, ""
        message = Message(
            role="assistant", content=content, thinking=thinking or None, tool_calls=() if faults else tuple(calls)
        )
        return ParsedAnswer(message=message, ended=ended, faults=tuple(faults))

    def _write_answer(self, pieces: Pieces, conversation: Conversation, index: int, before: str) -> None:
        message = conversation.messages[index]
        content, thinking = message.content, None
        if not message.tool_calls and before != "tool" and "</think>" in content:
            content = content.split("</think>", 1)[1]
        if is_last_assistant(conversation.messages, index):
            if message.thinking and not self._thinking:
                raise self.refuse(conversation, index, "a thought has no place; deepseek_v3_thinking has one")
            thinking = message.thinking or "" if self._thinking else None
        if before == "user":
            pieces.frame(_ASSISTANT, index)
            if thinking is None:
                pieces.frame("</think>", index)
            else:
                pieces.frame("<think>", index)
                pieces.said(thinking, index)
                pieces.end("</think>", index)
        elif message.thinking:
            raise self.refuse(conversation, index, "after a tool's output there is no place for a thought")
        pieces.said(content, index)
        for number, call in enumerate(message.tool_calls):
            pieces.end(_CALL_BEGIN if number else _CALLS_BEGIN + _CALL_BEGIN, index)
            pieces.said(call.name, index)
            pieces.end(_SEP, index)
            pieces.said(call.arguments_json, index)
            pieces.end(_CALL_END, index)
        pieces.end(_CALLS_END + _END if message.tool_calls else _END, index)

    def _compare(self, probe: Conversation) -> None:
        """A finished turn of a thinking model is not the template's by design; prompts are."""
        if self._thinking and probe.messages[-1].role == "assistant":
            return
        super()._compare(probe)


def _write_system(pieces: Pieces, messages: Sequence[Message]) -> None:
    """All system messages stand in front, wherever they are in the conversation."""
    systems = [(index, message.content) for index, message in enumerate(messages) if message.role == "system"]
    for number, (index, content) in enumerate(systems):
        pieces.frame("\n\n" if number else "")
        pieces.said(content, index)


def _split_thought(text: str) -> tuple[str | None, str]:
    thinking, end, content = text.partition("</think>")
    return (thinking.removeprefix("<think>"), content) if end else (None, text)


def _read_calls(listed: str) -> tuple[list[ToolCall], list[str]]:
    calls: list[ToolCall] = []
    body, end, _ = listed.partition(_CALLS_END)
    faults = [] if end else ["the tool calls have no end"]
    for item in body.split(_CALL_BEGIN)[1:]:
        name, _, arguments = item.removesuffix(_CALL_END).partition(_SEP)
        try:
            calls.append(read_arguments(name, arguments))
        except CallFault as fault:
            faults.append(f"{fault}: {item[:80]!r}")
    return calls, faults
