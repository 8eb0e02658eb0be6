"""When a sequence ends by its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_CONTEXT_TOKENS = 8
"""Tokens decoded beyond a stop string's length: the string may begin inside a token or after one without text."""


class Decoder(Protocol):
    def decode(self, token_ids: list[int]) -> str: ...


class StopStrings:
    """Texts that end a sequence. What matched stays part of it."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        # every token but a special one has at least one byte of text, so such a tail holds any string just completed
        self.tail_tokens = max((len(string.encode()) for string in strings), default=0) + _CONTEXT_TOKENS

    def completed_by(self, tail: list[int], decoder: Decoder) -> bool:
        """Whether a string ends in the last token of `tail`, the newest `tail_tokens` of the sequence or all it has."""
        text = decoder.decode(tail)
        return any(string in text for string in self._strings)
