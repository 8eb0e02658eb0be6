"""What every renderer does, whatever its format: tokens, weights, prompts, and answers read back.

A format's own part is `segments`: the text of a conversation in pieces, each with its owner. The rest follows from it.
"""

# N token

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeAlias

from tinsmith.data.answers import ParsedAnswer
from tinsmith.data.conversations import Conversation, Image, Message, Tool
from tinsmith.data.errors import RenderError
from tinsmith.data.segments import Segment, SegmentEncoder
from tinsmith.data.tokenizers import ChatTokenizer
from tinsmith.types import EncodedTextChunk, ImageChunk, ModelInput

TrainOn: TypeAlias = Literal[
    "last_assistant_message",
    "all_assistant_messages",
    "all_messages",
    "all_user_and_system_messages",
    "all_tokens",
    "customized",
]
"""Which turns get weight 1. `customized` takes each message's own `weight`, or its `train` flag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedImage:
    index: int
    """Of the token that stands for it."""
    image: Image


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedConversation:
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    """How much token i is to be learned: 1, 0, or a message's own weight."""
    source: str
    images: tuple[PlacedImage, ...] = ()

    @property
    def num_trained(self) -> int:
        """Tokens that contribute to a loss; the first never does, because nothing predicts it."""
        return sum(1 for weight in self.weights[1:] if weight)

    def require_text(self) -> Self:
        """Itself. Raises `RenderError` if pictures are in it: for callers that read its tokens alone."""
        if self.images:
            raise RenderError(f"{self.source}: {len(self.images)} pictures, but this trains on text alone")
        return self

    def model_input(self) -> ModelInput:
        """Tokens and pictures in order; a picture takes the place of its token."""
        return model_input(self.tokens, self.images)


class Renderer(Protocol):
    """What workflows, environments and evaluators need of a format. All renderers here are picklable."""

    @property
    def stop(self) -> list[int] | list[str]:
        """What ends an assistant's turn; give it to `SamplingParams.stop`."""

    def render(self, conversation: Conversation, train_on: TrainOn) -> RenderedConversation:
        """Tokens and weights of a whole conversation. Raises `RenderError`; also if `train_on` selects no message."""

    def generation_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), source: str = "the prompt"
    ) -> list[int]:
        """Tokens after which the model writes the next assistant turn. Raises `RenderError`."""

    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        """What sampled tokens say: thoughts, content, calls of tools. Never raises; faults are told in the answer."""


class SegmentRenderer(ABC):
    """A renderer by its format's segments."""

    def __init__(self, tokenizer: ChatTokenizer, markers: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._encoder = SegmentEncoder(tokenizer, markers)

    @property
    @abstractmethod
    def stop(self) -> list[int] | list[str]:
        """What ends an assistant's turn; give it to `SamplingParams.stop`."""

    @abstractmethod
    def segments(self, conversation: Conversation, *, generation: bool = False) -> list[Segment]:
        """The conversation's text in pieces. `generation`: with the beginning of the next assistant turn.

        Raises `RenderError` for what the format has no place for.
        """

    @abstractmethod
    def parse_answer(self, tokens: Sequence[int]) -> ParsedAnswer:
        """What sampled tokens say: thoughts, content, calls of tools. Never raises; faults are told in the answer."""

    def parse_response(self, tokens: Sequence[int]) -> Message:
        """The message alone of `parse_answer`."""
        return self.parse_answer(tokens).message

    def text(self, conversation: Conversation, *, generation: bool = False) -> str:
        return "".join(segment.text for segment in self.segments(conversation, generation=generation))

    def render(self, conversation: Conversation, train_on: TrainOn) -> RenderedConversation:
        """Tokens and weights of a whole conversation. Raises `RenderError`; also if `train_on` selects no message."""
        segments = self.segments(conversation)
        encoding = self._encoder.encode(segments, conversation.source)
        if train_on == "all_tokens":
            weights = [1.0] * len(encoding.tokens)
        else:
            chosen = chosen_weights(conversation, train_on)
            of_segment = [_weight(segment, chosen) for segment in segments]
            weights = [of_segment[owner] for owner in encoding.owners]
        return RenderedConversation(
            tokens=encoding.tokens,
            weights=tuple(weights),
            source=conversation.source,
            images=_placed(segments, encoding.owners),
        )

    def generation_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), source: str = "the prompt"
    ) -> list[int]:
        """Tokens after which the model writes the next assistant turn. Raises `RenderError`; also for pictures."""
        conversation = Conversation(messages=tuple(messages), tools=tuple(tools), source=source)
        segments = self.segments(conversation, generation=True)
        if any(segment.image is not None for segment in segments):
            raise RenderError(f"{source}: tokens alone cannot hold its pictures; use generation_input")
        return list(self._encoder.encode(segments, source).tokens)

    def generation_input(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), source: str = "the prompt"
    ) -> ModelInput:
        """As `generation_prompt`, with pictures in the places of their tokens."""
        conversation = Conversation(messages=tuple(messages), tools=tuple(tools), source=source)
        segments = self.segments(conversation, generation=True)
        encoding = self._encoder.encode(segments, source)
        return model_input(encoding.tokens, _placed(segments, encoding.owners))


def model_input(tokens_N: Sequence[int], images: Sequence[PlacedImage]) -> ModelInput:
    """Chunks of text and pictures in order."""
    chunks: list[EncodedTextChunk | ImageChunk] = []
    start = 0
    for placed in images:
        image = placed.image
        if placed.index > start:
            chunks.append(EncodedTextChunk(tokens=list(tokens_N[start : placed.index])))
        chunks.append(ImageChunk(data=image.data, format=image.format, expected_tokens=image.expected_tokens))
        start = placed.index + 1
    if start < len(tokens_N):
        chunks.append(EncodedTextChunk(tokens=list(tokens_N[start:])))
    return ModelInput(chunks=list(chunks))


def chosen_weights(conversation: Conversation, train_on: TrainOn) -> Mapping[int, float]:
    """The weight of each message that is trained on. Raises `RenderError` if there is none."""
    messages = conversation.messages
    assistants = [index for index, message in enumerate(messages) if message.role == "assistant"]
    match train_on:
        case "last_assistant_message":
            chosen = dict.fromkeys(assistants[-1:], 1.0)
        case "all_assistant_messages":
            chosen = dict.fromkeys(assistants, 1.0)
        case "all_messages":
            chosen = dict.fromkeys(range(len(messages)), 1.0)
        case "all_user_and_system_messages":
            chosen = {index: 1.0 for index, message in enumerate(messages) if message.role not in ("assistant", "tool")}
        case "customized":
            chosen = _own_weights(conversation)
        case _:
            raise ValueError(f"train_on {train_on!r} names no known choice of messages")
    if not chosen:
        raise RenderError(f"{conversation.source}: no message to train on under train_on={train_on!r}")
    return chosen


def _own_weights(conversation: Conversation) -> dict[int, float]:
    weights = [_own_weight(message) for message in conversation.messages]
    unmarked = [str(index + 1) for index, weight in enumerate(weights) if weight is None]
    if unmarked:
        raise RenderError(
            f'{conversation.source}: train_on=\'customized\' needs "train": true or false (or a "weight") on every '
            f"message; it is missing on message {', '.join(unmarked)}"
        )
    return {index: weight for index, weight in enumerate(weights) if weight}


def _own_weight(message: Message) -> float | None:
    if message.weight is not None:
        return message.weight
    return None if message.train is None else float(message.train)


def _weight(segment: Segment, chosen: Mapping[int, float]) -> float:
    return chosen.get(segment.message, 0.0) if segment.trained and segment.message is not None else 0.0


def _placed(segments: Sequence[Segment], owners: Sequence[int]) -> tuple[PlacedImage, ...]:
    return tuple(
        PlacedImage(index=index, image=image)
        for index, owner in enumerate(owners)
        if (image := segments[owner].image) is not None
    )
