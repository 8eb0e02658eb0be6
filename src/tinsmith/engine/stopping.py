"""When a sequence ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tinsmith.types.results import StopReason

_CONTEXT_TOKENS = 8
"""Tokens decoded beyond a stop string's length: the string may begin inside a token or after one without text."""


class Decoder(Protocol):
    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class StopRule:
    token_ids: frozenset[int]
    strings: tuple[str, ...]
    max_tokens: int

    def reason(self, tokens: list[int], decoder: Decoder) -> StopReason | None:
        """Why a sequence that just got its last token is over, if it is. What matched stays part of it."""
        if tokens[-1] in self.token_ids or self._completes_string(tokens, decoder):
            return "stop"
        return "length" if len(tokens) >= self.max_tokens else None

    def _completes_string(self, tokens: list[int], decoder: Decoder) -> bool:
        if not self.strings:
            return False
        # every token but a special one has at least one byte of text, so this tail holds any string just completed
        longest = max(len(string.encode()) for string in self.strings)
        text = decoder.decode(tokens[-(longest + _CONTEXT_TOKENS) :])
        return any(string in text for string in self.strings)
