"""A training set: conversations rendered, fitted to a length, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tinsmith.data.conversations import Conversation
from tinsmith.data.datum import to_datum
from tinsmith.data.errors import DataError
from tinsmith.data.rendering import RenderedConversation, Renderer, TrainOn
from tinsmith.types import Datum

TooLong: TypeAlias = Literal["error", "truncate", "skip"]
"""What becomes of a conversation with more tokens than allowed; truncation drops tokens at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationDataset:
    examples: tuple[RenderedConversation, ...]
    num_truncated: int = 0
    num_skipped: int = 0
    """Too long, or nothing left to learn after truncation."""

    @property
    def num_tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)

    @property
    def num_trained_tokens(self) -> int:
        return sum(example.num_trained for example in self.examples)

    def data(self, indices: Sequence[int]) -> tuple[list[Datum], int]:
        """Datums of one batch and the number of tokens T they train.

        Weights are divided by T. A loss is a sum over tokens, so the batch's loss is then the mean per trained token,
        and the gradient that of this mean, whatever the lengths of the conversations.
        """
        examples = [self.examples[index] for index in indices]
        num_trained = sum(example.num_trained for example in examples)
        scale = 1.0 / num_trained
        data = [to_datum(example.tokens, [weight * scale for weight in example.weights]) for example in examples]
        return data, num_trained


def build_dataset(
    conversations: Iterable[Conversation],
    renderer: Renderer,
    *,
    train_on: TrainOn,
    max_length: int | None,
    too_long: TooLong = "error",
    max_context: int | None = None,
) -> ConversationDataset:
    """Render every conversation. Raises `RenderError`, and `DataError` for one that is too long or if none is left.

    `max_context` is what the model takes, where that is known: nothing may be longer, whatever `too_long` says.
    """
    examples, num_truncated, num_skipped = [], 0, 0
    for conversation in conversations:
        example = renderer.render(conversation, train_on).require_text()
        if max_length is not None and len(example.tokens) > max_length:
            if too_long == "error":
                raise DataError(
                    f"{example.source}: {len(example.tokens)} tokens are more than max_length {max_length}; "
                    "raise max_length, or set too_long to 'truncate' or 'skip'"
                )
            example = _truncated(example, max_length if too_long == "truncate" else 0)
            num_truncated += 1 if example.num_trained else 0
        _check_context(example, max_context)
        if example.num_trained:
            examples.append(example)
        else:
            num_skipped += 1
    if not examples:
        raise DataError(
            f"no conversation is left to train on: {num_skipped} were skipped under max_length {max_length}"
        )
    return ConversationDataset(examples=tuple(examples), num_truncated=num_truncated, num_skipped=num_skipped)


def _check_context(example: RenderedConversation, max_context: int | None) -> None:
    """The last token is a target only, so one more than the model takes fits."""
    if max_context is not None and len(example.tokens) > max_context + 1:
        raise DataError(
            f"{example.source}: {len(example.tokens)} tokens are more than the model's context of {max_context}; "
            f"set max_length={max_context}, and too_long to 'truncate' or 'skip'"
        )


def _truncated(example: RenderedConversation, length: int) -> RenderedConversation:
    return RenderedConversation(tokens=example.tokens[:length], weights=example.weights[:length], source=example.source)
