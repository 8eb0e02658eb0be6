"""What the families share: pieces of text by message, and the check against the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

from tinsmith.data.conversations import Conversation, Image, Message, Tool, ToolCall
from tinsmith.data.errors import RenderError
from tinsmith.data.rendering import SegmentRenderer
from tinsmith.data.segments import Segment
from tinsmith.data.tokenizers import ChatTokenizer

_CALL: Final = ToolCall(name="look", arguments={"at": "a kettle", "n": 2}, id="functions.look:0")
_PLAIN: Final = Conversation.of(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
_SYSTEM: Final = Conversation.of(("system", "Be brief."), ("user", "q1"), ("assistant", "a1"))
_THOUGHT: Final = Conversation(
    messages=(
        Message(role="user", content="q1"),
        Message(role="assistant", content="a1", thinking="t1"),
        Message(role="user", content="q2"),
        Message(role="assistant", content="a2", thinking="t2"),
    )
)
_CALLING: Final = Conversation(
    messages=(
        Message(role="user", content="q1"),
        Message(role="assistant", content="", tool_calls=(_CALL,)),
        Message(role="tool", content="blue", tool_call_id="functions.look:0", name="look"),
        Message(role="assistant", content="a1"),
        Message(role="user", content="q2"),
    )
)
_TOOLED: Final = Conversation(
    messages=_SYSTEM.messages,
    tools=(
        Tool.of(
            "look",
            "Look at a thing.",
            {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
        ),
    ),
)
PROBES: Final = (_PLAIN, _SYSTEM, _THOUGHT, _CALLING, _TOOLED)
"""Conversations on which a format is compared with a template."""


class Pieces:
    """Segments in the making."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def frame(self, text: str, message: int | None = None) -> None:
        """Written by the format, and not learned: headers, prompts, what follows a turn."""
        self.segments.append(Segment(text=text, message=message))

    def end(self, text: str, message: int) -> None:
        """Written by the format, and learned with its message."""
        self.segments.append(Segment(text=text, message=message, trained=True))

    def said(self, text: str, message: int) -> None:
        """Written by whoever speaks, and learned with its message."""
        self.segments.append(Segment(text=text, message=message, trained=True, literal=True))

    def quoted(self, text: str, message: int | None = None) -> None:
        """Written by people, but not learned: descriptions of tools, a thought that a prompt holds."""
        self.segments.append(Segment(text=text, message=message, literal=True))

    def picture(self, token: str, image: Image, message: int) -> None:
        self.segments.append(Segment(text=token, message=message, image=image))


class FamilyRenderer(SegmentRenderer):
    """A format written down in code.

    If the tokenizer has a chat template, the two are compared on probes at once; `RenderError` tells the first
    difference. `verify=False` leaves that out: for a tokenizer whose template is known to be another.
    """

    name: str
    """As messages name the format."""
    markers: ClassVar[tuple[str, ...]] = ()
    """Tokens that the format needs and protects."""
    drops_last_thought: ClassVar[bool] = False
    """Whether templates of this family drop even the last thought, which this renderer keeps."""
    json_arguments: ClassVar[bool] = False
    """Whether templates of this family take arguments as text."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Of the markers: those without which there is no such format."""

    def __init__(self, tokenizer: ChatTokenizer, *, verify: bool = True) -> None:
        super().__init__(tokenizer, self.markers)
        for marker in self.requires:
            self._encoder.mark_id(marker)
        if verify and tokenizer.chat_template:
            for probe in PROBES:
                self._compare(probe)

    @property
    def template_options(self) -> Mapping[str, Any]:
        """Variables under which the tokenizer's template writes this renderer's format."""
        return {}

    def template_text(self, conversation: Conversation, *, generation: bool = False) -> str:
        """What the tokenizer's own template makes of a conversation. Raises what the template raises."""
        return str(
            self._tokenizer.apply_chat_template(
                [message.as_dict(json_arguments=self.json_arguments) for message in conversation.messages],
                tools=[tool.as_dict() for tool in conversation.tools] or None,
                tokenize=False,
                add_generation_prompt=generation,
                **self.template_options,
            )
        )

    def refuse(self, conversation: Conversation, index: int, why: str) -> RenderError:
        return RenderError(f"{conversation.source}: message {index + 1}: {why} (format {self.name})")

    def _compare(self, probe: Conversation) -> None:
        from jinja2.exceptions import TemplateError

        last = probe.messages[-1]
        if self.drops_last_thought and last.thinking:
            probe = replace(probe, messages=(*probe.messages[:-1], replace(last, thinking=None)))
        for generation in (False, True):
            turns = probe.messages[:-1] if generation and last.role == "assistant" else probe.messages
            conversation = replace(probe, messages=turns)
            try:
                ours = self.text(conversation, generation=generation)
            except RenderError:
                continue  # what the format has no place for cannot be compared
            try:
                theirs = self.template_text(conversation, generation=generation)
            except (TemplateError, TypeError) as error:
                raise RenderError(f"the tokenizer's chat template refuses a probe of {self.name}: {error}") from error
            if ours != theirs:
                raise RenderError(f"the tokenizer's chat template is not {self.name}: {_difference(ours, theirs)}")

    def _no_images(self, conversation: Conversation) -> None:
        for index, message in enumerate(conversation.messages):
            if message.images:
                raise self.refuse(conversation, index, "an image has no place")

    def _no_tools(self, conversation: Conversation) -> None:
        if conversation.tools:
            raise RenderError(
                f"{conversation.source}: the format {self.name} has no place for descriptions of tools; "
                "describe them in the system message"
            )


def is_last_assistant(messages: Sequence[Message], index: int) -> bool:
    return index == len(messages) - 1 and messages[index].role == "assistant"


def _difference(ours: str, theirs: str) -> str:
    """Where two texts part, with what stands there in each."""
    at = next(
        (place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    start = max(at - 20, 0)
    return f"at character {at} it writes {theirs[start : at + 40]!r}, the format {ours[start : at + 40]!r}"
