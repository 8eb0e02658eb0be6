"""From conversations to tokens and training weights, through the chat template that the tokenizer carries.

The template decides every token; this module only finds out which of them belong to which message. It renders the
conversation twice: once as it is, and once with a placeholder in place of each message's content. The text between the
placeholders is the template's, the rest is the messages'. Invariants, checked and not assumed:

* The tokens equal `tokenizer.apply_chat_template(messages)`, token for token.
* Except where a message holds the text of a special token (`<|im_end|>`): there the template alone would let a user end
  a turn. Such text stays text: it is encoded as ordinary characters.
* What is trained of an assistant's turn begins where the generation prompt ends and ends with the end-of-turn token.
* A template that drops, repeats or rewrites content is refused, not guessed at. Trimming white space is no rewriting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from tinsmith.data.answers import ParsedAnswer, read_tagged
from tinsmith.data.conversations import Conversation, Message, Tool
from tinsmith.data.errors import RenderError
from tinsmith.data.rendering import RenderedConversation, SegmentRenderer, TrainOn, chosen_weights
from tinsmith.data.segments import Segment, Span, added_tokens
from tinsmith.data.tokenizers import ChatTokenizer

__all__ = ["ChatTemplateRenderer", "RenderedConversation", "TrainOn"]

CALL_ENDS: Final = ("<|call|>", "<|eom_id|>")
"""Special tokens that end a turn which calls a tool, where that is another than ends an answer."""

_THOUGHT_TAGS: Final = ("<think>", "</think>")
"""Tokens in some vocabularies, but no turn markers: templates themselves read them in contents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One rendered text and what lies where in it."""

    text: str
    contents: Mapping[int, Span]
    """Where each message's content is. A message that only calls tools has none."""
    literal: tuple[Span, ...]
    """Contents, and marker texts within thoughts, arguments and tools; in order."""


class ChatTemplateRenderer(SegmentRenderer):
    """Renders under one tokenizer; `template_options` go to its template (`enable_thinking=False`).

    Raises `RenderError` at once if the tokenizer has no chat template, if the template has no end-of-turn token, or if
    a training example under it would not begin with the prompt that sampling uses.
    """

    def __init__(self, tokenizer: ChatTokenizer, **template_options: Any) -> None:
        if not tokenizer.chat_template:
            raise RenderError("the tokenizer has no chat template; conversations cannot be rendered with it")
        if not tokenizer.is_fast:
            raise RenderError("the tokenizer is a slow one; character offsets, which rendering needs, are unknown")
        self._options = template_options
        super().__init__(tokenizer, _turn_markers(tokenizer, template_options))
        self._template_text = str(tokenizer.chat_template)
        self._end_of_turn = self._probe()

    @property
    def stop(self) -> list[int]:
        """Token ids that end an assistant's turn; give them to `SamplingParams.stop`."""
        ends = [self._end_of_turn, *(end for end in CALL_ENDS if end in self._template_text)]
        return [self._encoder.marker_ids[end] for end in ends if end in self._encoder.marker_ids]

    def render(self, conversation: Conversation, train_on: TrainOn) -> RenderedConversation:
        """Tokens and weights of a whole conversation. Raises `RenderError`; also if `train_on` selects no message."""
        if train_on == "all_tokens":
            return super().render(conversation, train_on)
        chosen = chosen_weights(conversation, train_on)
        layout = self._layout(conversation)
        spans = {index: self._trained_span(conversation, index, layout) for index in chosen}
        segments = _cut(layout, spans)
        encoding = self._encoder.encode(segments, conversation.source)
        weights = [_segment_weight(segment, chosen) for segment in segments]
        return RenderedConversation(
            tokens=encoding.tokens,
            weights=tuple(weights[owner] for owner in encoding.owners),
            source=conversation.source,
        )

    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        """Without marks of what is trained, which `render` finds for the messages that it trains."""
        return _cut(self._layout(conversation, generation=generation), {})

    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        """The assistant message that sampled tokens spell; an end-of-turn token at the end is not part of it.

        Thoughts and calls of tools are told apart where the template itself writes `<think>` and `<tool_call>`.
        """
        answer = list(tokens)
        ended = bool(answer) and answer[-1] in self.stop
        text = self._encoder.decode(answer[:-1] if ended else answer)
        if not any(tag in self._template_text for tag in ("<think>", "</think>", "<tool_call>")):
            return ParsedAnswer(message=Message(role="assistant", content=text), ended=ended)
        return read_tagged(text, ended=ended, thinks=self._prompt_thinks)

    def _probe(self) -> str:
        """The end-of-turn token's text. Compares this renderer with the tokenizer's own rendering on the way."""
        probe = Conversation.of(("user", "1"), ("assistant", "2"))
        layout = self._layout(probe)
        if (end := self._leading_marker(layout, 1)) is None:
            after = layout.text[layout.contents[1][1] :]
            raise RenderError(f"the chat template ends an assistant's turn with {after!r}, not with a special token")
        prompt = self._template(probe.messages[:1], probe.source, generation=True)
        self._prompt_thinks = prompt.rstrip().endswith("<think>")
        if not layout.text.startswith(prompt):
            raise RenderError(
                f"the chat template prompts with {prompt!r}, but a finished turn reads {layout.text!r}; "
                "the model would be trained after another prompt than it answers to"
            )
        ours = list(self._encoder.encode(_cut(layout, {}), probe.source).tokens)
        theirs = self._tokenizer.apply_chat_template([m.as_dict() for m in probe.messages], **self._options)
        theirs = list(theirs["input_ids"] if isinstance(theirs, Mapping) else theirs)
        if ours != theirs:
            raise RenderError(f"the tokenizer renders a probe as {theirs!r}, this renderer as {ours!r}")
        return layout.text[slice(*end)]

    # -- text ---------------------------------------------------------------------------------------------------------

    def _template(
        self, messages: Sequence[Message], source: str, *, generation: bool, tools: Sequence[Tool] = ()
    ) -> str:
        return self._run_template(
            lambda as_text: [message.as_dict(json_arguments=as_text) for message in messages],
            [tool.as_dict() for tool in tools],
            source,
            generation=generation,
        )

    def _run_template(
        self, messages: Callable[[bool], list[Any]], tools: list[Any], source: str, *, generation: bool
    ) -> str:
        """`messages(True)` has arguments of calls as text: some templates cannot take them as objects."""
        from jinja2.exceptions import TemplateError

        def run(as_text: bool) -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    messages(as_text),
                    tools=tools or None,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self._options,
                )
            )

        try:
            try:
                return run(False)
            except TypeError:
                return run(True)
        except (TemplateError, TypeError) as error:
            raise RenderError(f"{source}: the chat template refuses this conversation: {error}") from error

    def _layout(self, conversation: Conversation, *, generation: bool = False) -> _Layout:
        messages, source = conversation.messages, conversation.source
        self._check_places(conversation)
        anchored = [index for index, message in enumerate(messages) if _is_anchored(message)]
        placeholders = _placeholders(messages, anchored)
        disguise = _Disguise(self._encoder.marker_ids)

        def hollow(as_text: bool) -> list[Any]:
            values: list[Any] = disguise.put_on([message.as_dict(json_arguments=as_text) for message in messages])
            for index, placeholder in placeholders.items():
                values[index]["content"] = placeholder
            return values

        tools = [tool.as_dict() for tool in conversation.tools]
        disguised = self._run_template(hollow, disguise.put_on(tools), source, generation=generation)
        pieces = _split(disguised, placeholders, source)
        text = self._template(messages, source, generation=generation, tools=conversation.tools)
        contents = _find_contents(
            text,
            {index: messages[index] for index in anchored},
            [disguise.take_off(piece) for piece in pieces],
            source,
        )
        frames = [0, *(edge for span in contents.values() for edge in span)][::2]
        hidden = [
            (start + found.start(), start + found.end())
            for start, piece in zip(frames, pieces, strict=True)
            for found in disguise.pattern.finditer(piece)
        ]
        return _Layout(text=text, contents=contents, literal=tuple(sorted([*contents.values(), *hidden])))

    def _check_places(self, conversation: Conversation) -> None:
        """Raises `RenderError` for parts of a conversation that the template never reads."""
        messages = conversation.messages
        wanted = {
            "tools": (bool(conversation.tools), ("tools",)),
            "tool calls": (any(message.tool_calls for message in messages), ("tool_calls",)),
            "thoughts": (any(message.thinking for message in messages), ("reasoning_content", "thinking")),
        }
        for what, (needed, names) in wanted.items():
            if needed and not any(name in self._template_text for name in names):
                raise RenderError(f"{conversation.source}: the chat template has no place for {what}")
        for number, message in enumerate(messages, start=1):
            if message.images:
                raise RenderError(
                    f"{conversation.source}: message {number} holds an image, which this renderer cannot place; "
                    "use 'qwen3_vl'"
                )

    def _leading_marker(self, layout: _Layout, index: int) -> Span | None:
        """The special token right after the content of message `index`, white space aside."""
        start = layout.contents[index][1]
        end = min((span[0] for later, span in layout.contents.items() if later > index), default=len(layout.text))
        found = self._encoder.first_marker(layout.text, start, end)
        return found if found and not layout.text[start : found[0]].strip() else None

    # -- what is trained ----------------------------------------------------------------------------------------------

    def _trained_span(self, conversation: Conversation, index: int, layout: _Layout) -> Span:
        """From the end of the prompt to the end of the turn. A token belongs to the text in which it begins."""
        message, source = conversation.messages[index], conversation.source
        content = layout.contents.get(index)
        if message.role != "assistant":
            if content is None:
                return 0, 0  # empty instructions: nothing to learn
            marker = self._leading_marker(layout, index)
            return content[0], content[1] if marker is None else marker[1]
        start = self._end_of_prompt(conversation, index, layout)
        if content is None and start is None:
            raise RenderError(f"{source}: the template does not continue its prompt with message {index + 1}")
        begin = content[0] if start is None and content else start or 0
        end = self._end_of(message, index, begin, layout)
        if end is None:
            raise RenderError(f"{source}: the template does not end message {index + 1} with {self._end_of_turn!r}")
        return begin, end

    def _end_of(self, message: Message, index: int, begin: int, layout: _Layout) -> int | None:
        if not message.tool_calls:
            marker = self._leading_marker(layout, index)
            return marker[1] if marker and layout.text[slice(*marker)] == self._end_of_turn else None
        position = layout.contents[index][1] if index in layout.contents else begin
        while found := self._encoder.first_marker(layout.text, position):
            is_literal = any(start <= found[0] and found[1] <= end for start, end in layout.literal)
            if not is_literal and layout.text[slice(*found)] in (self._end_of_turn, *CALL_ENDS):
                return found[1]
            position = found[1]
        return None

    def _end_of_prompt(self, conversation: Conversation, index: int, layout: _Layout) -> int | None:
        """Where the prompt for message `index` ends; `None` if the whole text does not begin with that prompt."""
        if index == 0:
            return None
        before = conversation.messages[:index]
        prompt = self._template(before, conversation.source, generation=True, tools=conversation.tools)
        content = layout.contents.get(index)
        fits = content is None or len(prompt) <= content[0]
        return len(prompt) if fits and layout.text.startswith(prompt) else None


class _Disguise:
    """Marker texts, wherever they stand in values of a conversation, as long as private-use characters instead."""

    def __init__(self, markers: Mapping[str, int]) -> None:
        self._stand_in = {text: _private(number, len(text)) for number, text in enumerate(markers)}
        self._original = {stand_in: text for text, stand_in in self._stand_in.items()}
        self._marker = _any_of(self._stand_in)
        self.pattern = _any_of(self._original)

    def put_on(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marker.sub(lambda found: self._stand_in[found[0]], value)
        if isinstance(value, Mapping):
            return {self.put_on(key): self.put_on(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.put_on(item) for item in value]
        return value

    def take_off(self, text: str) -> str:
        return self.pattern.sub(lambda found: self._original[found[0]], text)


def _private(number: int, length: int) -> str:
    """Of a plane that text does not use; differs from that of every other marker, and is as long as its own."""
    digits = f"{number:x}".rjust(max(length - 1, 1), "0")[-max(length - 1, 1) :]
    return (chr(0x10F000) + "".join(chr(0x10F100 + int(digit, 16)) for digit in digits))[:length]


def _turn_markers(tokenizer: ChatTokenizer, options: Mapping[str, Any]) -> list[str]:
    """Added tokens that the template writes around plain turns: markers, flagged as special or not."""
    from jinja2.exceptions import TemplateError

    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options))
    except (TemplateError, TypeError):
        return []
    added = (str(token.content) for token in added_tokens(tokenizer).values())
    return [marker for marker in added if marker in text and marker not in _THOUGHT_TAGS]


def _cut(layout: _Layout, trained: Mapping[int, Span]) -> list[Segment]:
    """The text at every edge of a literal or trained span."""
    literal = layout.literal
    edges = sorted({0, len(layout.text), *(edge for span in [*literal, *trained.values()] for edge in span)})
    segments = []
    for start, end in pairwise(edges):
        owner = next((index for index, (first, last) in trained.items() if first <= start and end <= last), None)
        segments.append(
            Segment(
                text=layout.text[start:end],
                message=owner,
                trained=owner is not None,
                literal=any(first <= start and end <= last for first, last in literal),
            )
        )
    return segments


def _segment_weight(segment: Segment, chosen: Mapping[int, float]) -> float:
    return 0.0 if segment.message is None else chosen[segment.message]


def _is_anchored(message: Message) -> bool:
    """Whether its content can be looked for: templates leave out empty instructions, and empty text beside calls."""
    return bool(message.content) or not (message.tool_calls or message.role in ("system", "developer"))


def _placeholders(messages: Sequence[Message], anchored: Sequence[int]) -> dict[int, str]:
    """One text per message that occurs in no message and that no template has a reason to change."""
    stem, written = "tinsmith", str([message.as_dict() for message in messages])
    while stem in written:
        stem += "q"
    return {index: f"{stem}{index}content" for index in anchored}


def _split(text: str, placeholders: Mapping[int, str], source: str) -> list[str]:
    """What the template wrote before, between and after the placeholders."""
    pieces, position = [], 0
    for index, placeholder in placeholders.items():
        if text.count(placeholder) != 1:
            raise RenderError(
                f"{source}: the chat template writes the content of message {index + 1} "
                f"{text.count(placeholder)} times instead of once"
            )
        found = text.find(placeholder, position)
        if found < 0:
            raise RenderError(f"{source}: the chat template puts message {index + 1} out of order")
        pieces.append(text[position:found])
        position = found + len(placeholder)
    return [*pieces, text[position:]]


def _find_contents(text: str, messages: Mapping[int, Message], pieces: Sequence[str], source: str) -> dict[int, Span]:
    """Where each content lies: the pieces and the contents, in turn, must spell `text` exactly."""
    if not text.startswith(pieces[0]):
        raise RenderError(f"{source}: the chat template writes another beginning for this conversation")
    spans, position = {}, len(pieces[0])
    for (index, message), piece in zip(messages.items(), pieces[1:], strict=True):
        for form in _printed_forms(message):
            if text.startswith(form + piece, position):
                break
        else:
            raise RenderError(
                f"{source}: the chat template rewrites message {index + 1} (role {message.role!r}); "
                f"expected {message.content[:40]!r}, found {text[position : position + 40]!r}"
            )
        spans[index] = (position, position + len(form))
        position += len(form) + len(piece)
    if position != len(text):
        raise RenderError(f"{source}: the chat template adds {text[position:][:40]!r} at the end")
    return spans


def _printed_forms(message: Message) -> list[str]:
    """The content as templates print it: whole, or without white space or line breaks at its ends.

    Some print what a tool returned as JSON text.
    """
    content = message.content
    forms = [
        content, content.strip(), content.strip("\n"), content.lstrip(), content.lstrip("\n"), content.rstrip(),
        content.rstrip("\n"),
    ]  # fmt: skip
    return [*forms, json.dumps(content, ensure_ascii=False)[1:-1]] if message.role == "tool" else forms


def _any_of(texts: Mapping[str, Any]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
