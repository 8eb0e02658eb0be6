"""Qwen3: ChatML with thoughts in `<think>` and calls of tools in `<tool_call>`.

`hybrid`        the models of April 2025: think unless told otherwise
`no_thinking`   the same models, told otherwise: the prompt ends with an empty thought
`thinking`      the 2507 models that always think: the prompt opens the thought
`instruct`      the 2507 models that never do

Thoughts before the last user message are left out, as the models' own templates do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal, TypeAlias

from tinsmith.data.answers import ParsedAnswer, read_tagged
from tinsmith.data.conversations import Conversation, Message
from tinsmith.data.families.base import FamilyRenderer, Pieces
from tinsmith.data.segments import Segment
from tinsmith.data.tokenizers import ChatTokenizer

Qwen3Mode: TypeAlias = Literal["hybrid", "no_thinking", "thinking", "instruct"]

_END: Final = "<|im_end|>"
_EMPTY_THOUGHT: Final = "<think>\n\n</think>\n\n"
_IMAGE: Final = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_TOOLS_BEFORE: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER: Final = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


class Qwen3Renderer(FamilyRenderer):
    """`images`: the tokenizer is that of a Qwen3-VL model, whose prompts have pictures in them."""

    markers: ClassVar[tuple[str, ...]] = ("<|im_start|>", _END, *_IMAGE)
    requires: ClassVar[tuple[str, ...]] = ("<|im_start|>", _END)

    def __init__(
        self, tokenizer: ChatTokenizer, mode: Qwen3Mode = "hybrid", *, images: bool = False, verify: bool = True
    ) -> None:
        if mode not in ("hybrid", "no_thinking", "thinking", "instruct"):
            raise ValueError(f"mode {mode!r} is none of hybrid, no_thinking, thinking, instruct")
        self._mode = mode
        self._images = images
        self.name = f"qwen3 ({mode})"
        super().__init__(tokenizer, verify=verify)
        if images:
            self._encoder.mark_id(_IMAGE[1])

    @property
    def stop(self) -> list[int]:
        return [self._encoder.mark_id(_END)]

    @property
    def template_options(self) -> Mapping[str, Any]:
        return {"enable_thinking": False} if self._mode == "no_thinking" else {}

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        if not self._images:
            self._no_images(conversation)
        pieces = Pieces()
        messages = conversation.messages
        self._write_system(pieces, conversation)
        last_query = _last_query(messages)
        for index, message in enumerate(messages):
            match message.role:
                case "system" if index == 0:
                    pass
                case "user" | "system":
                    self._write_turn(pieces, message, index)
                case "assistant":
                    self._write_answer(pieces, conversation, index, is_recent=index > last_query)
                case "tool":
                    _write_result(pieces, messages, index)
                case _:
                    raise self.refuse(conversation, index, f"role {message.role!r} has no place")
        if generation:
            pieces.frame("<|im_start|>assistant\n" + self._prompt_end)
        return pieces.segments

    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        answer = list(tokens)
        ended = bool(answer) and answer[-1] in self.stop
        text = self._encoder.decode(answer[:-1] if ended else answer)
        return read_tagged(text, ended=ended, thinks=self._mode == "thinking")

    @property
    def _prompt_end(self) -> str:
        return {"no_thinking": _EMPTY_THOUGHT, "thinking": "<think>\n"}.get(self._mode, "")

    def _write_system(self, pieces: Pieces, conversation: Conversation) -> None:
        first = conversation.messages[0]
        if conversation.tools:
            pieces.frame("<|im_start|>system\n")
            if first.role == "system":
                self._write_content(pieces, first, 0)
                pieces.frame("\n\n")
            pieces.frame(_TOOLS_BEFORE)
            for tool in conversation.tools:
                pieces.frame("\n")
                pieces.quoted(json.dumps(tool.as_dict(), ensure_ascii=False))
            pieces.frame(_TOOLS_AFTER)
            pieces.frame(f"{_END}\n")
        elif first.role == "system":
            self._write_turn(pieces, first, 0)

    def _write_turn(self, pieces: Pieces, message: Message, index: int) -> None:
        pieces.frame(f"<|im_start|>{message.role}\n", index)
        self._write_content(pieces, message, index)
        pieces.end(_END, index)
        pieces.frame("\n")

    def _write_content(self, pieces: Pieces, message: Message, index: int) -> None:
        start = 0
        for image in message.images:
            pieces.said(message.content[start : image.at], index)
            pieces.frame(_IMAGE[0], index)
            pieces.picture(_IMAGE[1], image, index)
            pieces.frame(_IMAGE[2], index)
            start = image.at
        pieces.said(message.content[start:], index)

    def _write_answer(self, pieces: Pieces, conversation: Conversation, index: int, *, is_recent: bool) -> None:
        message = conversation.messages[index]
        is_last = index == len(conversation.messages) - 1
        if self._mode == "instruct":
            if message.thinking:
                raise self.refuse(conversation, index, "a thought has no place")
            thinking, content = None, message.content
        else:
            message = _with_thinking(message)
            thinking, content = message.thinking or "", message.content
        pieces.frame("<|im_start|>assistant\n", index)
        if thinking is not None and is_recent and (is_last or thinking):
            thinking, content = thinking.strip("\n"), content.lstrip("\n")
            self._write_thought(pieces, thinking, index)
        pieces.said(content, index)
        for number, call in enumerate(message.tool_calls):
            # the models' own templates ask whether there was content before its first newlines were stripped
            pieces.end("\n" if message.content or number else "", index)
            pieces.end('<tool_call>\n{"name": "', index)
            pieces.said(call.name, index)
            pieces.end('", "arguments": ', index)
            pieces.said(call.arguments_json, index)
            pieces.end("}\n</tool_call>", index)
        pieces.end(_END, index)
        pieces.frame("\n")

    def _write_thought(self, pieces: Pieces, thinking: str, index: int) -> None:
        if not thinking and self._mode == "no_thinking":
            pieces.frame(_EMPTY_THOUGHT, index)
            return
        if self._mode == "thinking":
            pieces.frame("<think>\n", index)
        else:
            pieces.end("<think>\n", index)
        pieces.said(thinking, index)
        pieces.end("\n</think>\n\n", index)


def _last_query(messages: Sequence[Message]) -> int:
    """The last message of a user that is no result of a tool; the last message if there is none."""
    for index in range(len(messages) - 1, -1, -1):
        content = messages[index].content
        is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[index].role == "user" and (messages[index].images or not is_result):
            return index
    return len(messages) - 1


def _with_thinking(message: Message) -> Message:
    """A thought written into the content, told apart from it."""
    if message.thinking is not None or "</think>" not in message.content:
        return message
    thought, _, _ = message.content.partition("</think>")
    thinking = thought.rstrip("\n").split("<think>")[-1].lstrip("\n")
    return replace(message, thinking=thinking, content=message.content.split("</think>")[-1].lstrip("\n"))


def _write_result(pieces: Pieces, messages: Sequence[Message], index: int) -> None:
    """Results of tools in a row make one turn of the user."""
    if index == 0 or messages[index - 1].role != "tool":
        pieces.frame("<|im_start|>user", index)
    pieces.frame("\n<tool_response>\n", index)
    pieces.said(messages[index].content, index)
    pieces.frame("\n</tool_response>", index)
    if index == len(messages) - 1 or messages[index + 1].role != "tool":
        pieces.frame(f"{_END}\n", index)
