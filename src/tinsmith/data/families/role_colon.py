r"""Plain text for models without turn markers: `User: …\n\nAssistant: …\n\n`.

The turns are told apart by their headers alone, so a content that holds one is refused: it would forge a turn. An
answer is learned together with the header of the user's next turn, which is what sampling stops at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from tinsmith.data.answers import ParsedAnswer
from tinsmith.data.conversations import Conversation, Message
from tinsmith.data.families.base import FamilyRenderer, Pieces
from tinsmith.data.segments import Segment

_HEADER: Final = re.compile(r"\n\n(System|User|Assistant):")
_STOP: Final = "\n\nUser:"


class RoleColonRenderer(FamilyRenderer):
    name = "role_colon"

    @property
    def stop(self) -> list[str]:
        return [_STOP]

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        self._no_images(conversation)
        self._no_tools(conversation)
        pieces = Pieces()
        pieces.frame(str(getattr(self._tokenizer, "bos_token", None) or ""))
        messages = conversation.messages
        for index, message in enumerate(messages):
            self._check(conversation, index)
            follows_answer = index > 0 and messages[index - 1].role == "assistant"
            if not (follows_answer and message.role == "user"):
                pieces.frame(f"{message.role.capitalize()}:", index)
            pieces.said(f" {message.content}", index)
            pieces.end("\n\n", index)
            next_role = messages[index + 1].role if index + 1 < len(messages) else "user"
            if message.role == "assistant" and next_role == "user" and not (generation and index + 1 == len(messages)):
                pieces.end("User:", index)
        if generation:
            pieces.frame("Assistant:")
        return pieces.segments

    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        text = self._encoder.decode(tokens)
        content, end, _ = text.partition(_STOP)
        if end:
            content = content.removeprefix(" ")
        else:
            content = text.removeprefix(" ")
        return ParsedAnswer(message=Message(role="assistant", content=content), ended=bool(end))

    def _check(self, conversation: Conversation, index: int) -> None:
        message = conversation.messages[index]
        if message.role not in ("system", "user", "assistant"):
            raise self.refuse(conversation, index, f"role {message.role!r} has no place")
        if message.tool_calls or message.thinking:
            raise self.refuse(conversation, index, "thoughts and tool calls have no place")
        if found := _HEADER.search(f" {message.content}\n\n"):
            raise self.refuse(conversation, index, f"its text holds {found[0]!r}, which would begin another turn")
