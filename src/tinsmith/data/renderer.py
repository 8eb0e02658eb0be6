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

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from tinsmith.data.conversations import Conversation, Message
from tinsmith.data.errors import RenderError
from tinsmith.data.tokenizers import ChatTokenizer

TrainOn: TypeAlias = Literal[
    "last_assistant_message",
    "all_assistant_messages",
    "all_messages",
    "all_user_and_system_messages",
    "all_tokens",
    "customized",
]
"""Which turns get weight 1. `customized` takes each message's own `train` flag."""

Span: TypeAlias = tuple[int, int]
"""First and one past the last, in characters of the rendered text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedConversation:
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    """1 where token i is to be learned, else 0."""
    source: str

    @property
    def num_trained(self) -> int:
        """Tokens that contribute to a loss; the first never does, because nothing predicts it."""
        return sum(1 for weight in self.weights[1:] if weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One rendered text and where each message's content lies in it."""

    text: str
    contents: tuple[Span, ...]

    @property
    def template_spans(self) -> list[Span]:
        """What the template wrote: before, between and after the contents."""
        edges = [0, *(edge for span in self.contents for edge in span), len(self.text)]
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoding:
    tokens: list[int]
    offsets: list[Span]


class ChatTemplateRenderer:
    """Renders under one tokenizer; `template_options` go to its template (`enable_thinking=False`).

    Raises `RenderError` at once if the tokenizer has no chat template, if the template has no end-of-turn token, or if
    a training example under it would not begin with the prompt that sampling uses.
    """

    def __init__(self, tokenizer: ChatTokenizer, **template_options: Any) -> None:
        if not tokenizer.chat_template:
            raise RenderError("the tokenizer has no chat template; conversations cannot be rendered with it")
        if not tokenizer.is_fast:
            raise RenderError("the tokenizer is a slow one; character offsets, which rendering needs, are unknown")
        self._tokenizer = tokenizer
        self._options = template_options
        self._special_ids = {
            str(token.content): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._special = re.compile("|".join(map(re.escape, sorted(self._special_ids, key=len, reverse=True))) or "(?!)")
        self._end_of_turn = self._probe()

    @property
    def stop(self) -> list[int]:
        """Token ids that end an assistant's turn; give them to `SamplingParams.stop`."""
        return [self._special_ids[self._end_of_turn]]

    def render(self, conversation: Conversation, train_on: TrainOn) -> RenderedConversation:
        """Tokens and weights of a whole conversation. Raises `RenderError`; also if `train_on` selects no message."""
        layout = self._layout(conversation)
        encoding = self._encode(layout, conversation.source)
        if train_on == "all_tokens":
            weights = [1.0] * len(encoding.tokens)
        else:
            weights = self._weights(conversation, train_on, layout, encoding)
        return RenderedConversation(tokens=tuple(encoding.tokens), weights=tuple(weights), source=conversation.source)

    def generation_prompt(self, messages: Sequence[Message], *, source: str = "the prompt") -> list[int]:
        """Tokens after which the model writes the next assistant turn."""
        conversation = Conversation(messages=tuple(messages), source=source)
        return self._encode(self._layout(conversation, generation=True), source).tokens

    def parse_response(self, tokens: Sequence[int]) -> Message:
        """The assistant message that sampled tokens spell; an end-of-turn token at the end is not part of it."""
        answer = list(tokens)
        if answer and answer[-1] in self.stop:
            answer.pop()
        return Message(role="assistant", content=self._tokenizer.decode(answer, skip_special_tokens=False))

    def _probe(self) -> str:
        """The end-of-turn token's text. Compares this renderer with the tokenizer's own rendering on the way."""
        probe = Conversation.of(("user", "1"), ("assistant", "2"))
        layout = self._layout(probe)
        if (end := self._leading_special(layout, 1)) is None:
            after = layout.text[layout.contents[1][1] :]
            raise RenderError(f"the chat template ends an assistant's turn with {after!r}, not with a special token")
        prompt = self._template(probe.messages[:1], probe.source, generation=True)
        if not layout.text.startswith(prompt):
            raise RenderError(
                f"the chat template prompts with {prompt!r}, but a finished turn reads {layout.text!r}; "
                "the model would be trained after another prompt than it answers to"
            )
        ours = self._encode(layout, probe.source).tokens
        theirs = self._tokenizer.apply_chat_template([m.as_dict() for m in probe.messages], **self._options)
        theirs = list(theirs["input_ids"] if isinstance(theirs, Mapping) else theirs)
        if ours != theirs:
            raise RenderError(f"the tokenizer renders a probe as {theirs!r}, this renderer as {ours!r}")
        return layout.text[slice(*end)]

    # -- text ---------------------------------------------------------------------------------------------------------

    def _template(self, messages: Iterable[Message], source: str, *, generation: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [message.as_dict() for message in messages],
                tokenize=False,
                add_generation_prompt=generation,
                **self._options,
            )
        except TemplateError as error:
            raise RenderError(f"{source}: the chat template refuses this conversation: {error}") from error
        return str(text)

    def _layout(self, conversation: Conversation, *, generation: bool = False) -> _Layout:
        messages, source = conversation.messages, conversation.source
        placeholders = _placeholders(messages)
        hollow = [
            Message(role=message.role, content=placeholder)
            for message, placeholder in zip(messages, placeholders, strict=True)
        ]
        pieces = _split(self._template(hollow, source, generation=generation), placeholders, source)
        text = self._template(messages, source, generation=generation)
        return _Layout(text=text, contents=_find_contents(text, messages, pieces, source))

    def _leading_special(self, layout: _Layout, index: int) -> Span | None:
        """The special token right after message `index`, white space aside."""
        start, end = layout.template_spans[index + 1]
        found = self._special.search(layout.text, start, end)
        return found.span() if found and not layout.text[start : found.start()].strip() else None

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _encode(self, layout: _Layout, source: str) -> _Encoding:
        """Tokens of the text, with special-token text inside contents taken literally."""
        if not self._forged(layout):
            return self._encode_text(layout.text)
        harmless = self._defused(layout)
        if self._encode_by_pieces(harmless).tokens != self._encode_text(harmless.text).tokens:
            raise RenderError(
                f"{source}: a message holds the text of a special token ({', '.join(self._special_ids)}), "
                "and this tokenizer cannot encode it as plain text; take it out of the data"
            )
        return self._encode_by_pieces(layout)

    def _forged(self, layout: _Layout) -> bool:
        """Whether a special token's text touches a message's content."""
        template_spans = layout.template_spans
        return any(
            not any(start <= found.start() and found.end() <= end for start, end in template_spans)
            for found in self._special.finditer(layout.text)
        )

    def _defused(self, layout: _Layout) -> _Layout:
        """The same text with dashes for every special token's text inside contents; lengths and places stay."""
        parts = [layout.text[slice(*span)] for span in _alternate(layout)]
        parts[1::2] = [self._special.sub(lambda found: "-" * len(found[0]), part) for part in parts[1::2]]
        return _Layout(text="".join(parts), contents=layout.contents)

    def _encode_text(self, text: str, **options: Any) -> _Encoding:
        output = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
        return _Encoding(
            tokens=list(output["input_ids"]), offsets=[(int(a), int(b)) for a, b in output["offset_mapping"]]
        )

    def _encode_by_pieces(self, layout: _Layout) -> _Encoding:
        """Encode the template's special tokens one by one and each run of text between them as plain text."""
        marks = [found.span() for span in layout.template_spans for found in self._special.finditer(layout.text, *span)]
        tokens: list[int] = []
        offsets: list[Span] = []
        for (_, start), (end, after) in pairwise([(0, 0), *marks, (len(layout.text), len(layout.text))]):
            run = self._encode_text(layout.text[start:end], split_special_tokens=True)
            tokens += run.tokens
            offsets += [(start + a, start + b) for a, b in run.offsets]
            if after > end:
                tokens.append(self._special_ids[layout.text[end:after]])
                offsets.append((end, after))
        return _Encoding(tokens=tokens, offsets=offsets)

    # -- weights ------------------------------------------------------------------------------------------------------

    def _weights(
        self, conversation: Conversation, train_on: TrainOn, layout: _Layout, encoding: _Encoding
    ) -> list[float]:
        chosen = _chosen_messages(conversation, train_on)
        if not chosen:
            raise RenderError(f"{conversation.source}: no message to train on under train_on={train_on!r}")
        spans = [self._trained_span(conversation, index, layout) for index in chosen]
        return [
            1.0 if any(first <= start < last and end > first for first, last in spans) else 0.0
            for start, end in encoding.offsets
        ]

    def _trained_span(self, conversation: Conversation, index: int, layout: _Layout) -> Span:
        """From the end of the prompt to the end of the turn. A token belongs to the text in which it begins."""
        message, source = conversation.messages[index], conversation.source
        start, end = layout.contents[index]
        special = self._leading_special(layout, index)
        if message.role != "assistant":
            return start, end if special is None else special[1]
        if special is None or layout.text[slice(*special)] != self._end_of_turn:
            raise RenderError(f"{source}: the template does not end message {index + 1} with {self._end_of_turn!r}")
        if index:
            prompt = self._template(conversation.messages[:index], source, generation=True)
            if len(prompt) <= start and layout.text.startswith(prompt):
                start = len(prompt)
        return start, special[1]


def _chosen_messages(conversation: Conversation, train_on: TrainOn) -> list[int]:
    messages = conversation.messages
    assistants = [index for index, message in enumerate(messages) if message.role == "assistant"]
    match train_on:
        case "last_assistant_message":
            return assistants[-1:]
        case "all_assistant_messages":
            return assistants
        case "all_messages":
            return list(range(len(messages)))
        case "all_user_and_system_messages":
            return [index for index in range(len(messages)) if index not in assistants]
        case "customized":
            unmarked = [str(index + 1) for index, message in enumerate(messages) if message.train is None]
            if unmarked:
                raise RenderError(
                    f"{conversation.source}: train_on='customized' needs \"train\": true or false on every message; "
                    f"it is missing on message {', '.join(unmarked)}"
                )
            return [index for index, message in enumerate(messages) if message.train]
        case _:
            raise ValueError(f"train_on {train_on!r} names no known choice of messages")


def _alternate(layout: _Layout) -> list[Span]:
    """Template, content, template, … in the order of the text."""
    template = layout.template_spans
    spans = [template[0]]
    for content, after in zip(layout.contents, template[1:], strict=True):
        spans += [content, after]
    return spans


def _placeholders(messages: Sequence[Message]) -> list[str]:
    """One text per message that occurs in no content and that no template has a reason to change."""
    stem = "tinsmith"
    while any(stem in message.content for message in messages):
        stem += "q"
    return [f"{stem}{index}content" for index in range(len(messages))]


def _split(text: str, placeholders: Sequence[str], source: str) -> list[str]:
    """What the template wrote before, between and after the placeholders."""
    pieces, position = [], 0
    for number, placeholder in enumerate(placeholders, start=1):
        if text.count(placeholder) != 1:
            raise RenderError(
                f"{source}: the chat template writes the content of message {number} "
                f"{text.count(placeholder)} times instead of once"
            )
        found = text.find(placeholder, position)
        if found < 0:
            raise RenderError(f"{source}: the chat template puts message {number} out of order")
        pieces.append(text[position:found])
        position = found + len(placeholder)
    return [*pieces, text[position:]]


def _find_contents(text: str, messages: Sequence[Message], pieces: Sequence[str], source: str) -> tuple[Span, ...]:
    """Where each content lies: the pieces and the contents, in turn, must spell `text` exactly."""
    if not text.startswith(pieces[0]):
        raise RenderError(f"{source}: the chat template writes another beginning for this conversation")
    spans, position = [], len(pieces[0])
    for number, (message, piece) in enumerate(zip(messages, pieces[1:], strict=True), start=1):
        for form in _trimmed_forms(message.content):
            if text.startswith(form + piece, position):
                break
        else:
            raise RenderError(
                f"{source}: the chat template rewrites message {number} (role {message.role!r}); "
                f"expected {message.content[:40]!r}, found {text[position : position + 40]!r}"
            )
        spans.append((position, position + len(form)))
        position += len(form) + len(piece)
    if position != len(text):
        raise RenderError(f"{source}: the chat template adds {text[position:][:40]!r} at the end")
    return tuple(spans)


def _trimmed_forms(content: str) -> list[str]:
    """`content` as templates print it: whole, or without white space or line breaks at its ends."""
    return [
        content, content.strip(), content.strip("\n"), content.lstrip(), content.lstrip("\n"), content.rstrip(),
        content.rstrip("\n"),
    ]  # fmt: skip
