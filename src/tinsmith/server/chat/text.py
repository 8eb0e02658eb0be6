"""From drawn tokens to text, one at a time: never half a character, never a part of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

_BROKEN = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""

_CONTEXT_TOKENS = 8

Decode: TypeAlias = Callable[[Sequence[int]], str]


class GrowingText:
    """The text of a sequence as it grows. All that was returned, joined, is the text of all tokens.

    A token may end inside a character; such text is held back until the character is whole. Only the newest tokens are
    decoded again: those since the last but one place where the text ended with a whole character.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        """`before`: the tokens that the sequence follows; what a token reads like may depend on them."""
        self._decode = decode
        self._window = list(before[-_CONTEXT_TOKENS:])
        self._num_context = len(self._window)
        """Tokens of the window up to the last such place."""
        self._num_told = len(decode(self._window).rstrip(_BROKEN)) if self._window else 0
        """Characters of the window's text that were returned."""

    def add(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        whole = text.rstrip(_BROKEN)
        new = whole[self._num_told :]
        self._num_told = max(self._num_told, len(whole))
        if len(whole) == len(text):
            self._slide(len(text))
        return new

    def end(self) -> str:
        """What was held back and will not become a character any more."""
        return self._decode(self._window)[self._num_told :]

    def all_at_once(self, tokens: Sequence[int]) -> str:
        """What `add` of each and `end` would return together, if nothing was added yet."""
        return self._decode([*self._window, *tokens])[self._num_told :]

    def _slide(self, length: int) -> None:
        recent = self._window[self._num_context :]
        context = self._decode(recent)
        if context:  # a token without text is no context: some decoders trim what comes first
            self._window, self._num_told = recent, len(context)
        else:
            self._num_told = length
        self._num_context = len(self._window)


class StopText:
    """Holds back what may be the beginning of a stop text, and cuts the text where one begins."""

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        """`keep`: the stop text itself is part of the answer."""
        self._stops = tuple(stops)
        self._keep = keep
        self._held = ""
        self.matched: str | None = None
        """The stop text that ended the sequence."""

    def add(self, text: str) -> str:
        """Text that is safe to show; the sequence goes on."""
        held = self._held + text
        safe = len(held) - self._num_to_hold(held)
        self._held = held[safe:]
        return held[:safe]

    def end(self, text: str, *, search: bool) -> str:
        """The last of it. `search`: the sequence ended because of a stop text."""
        held, self._held = self._held + text, ""
        found = [(held.find(stop), stop) for stop in self._stops if stop in held] if search else []
        if not found:
            return held
        at, self.matched = min(found)
        return held[: at + len(self.matched)] if self._keep else held[:at]

    def _num_to_hold(self, text: str) -> int:
        return max((held_length(text, stop) for stop in self._stops), default=0)


def held_length(text: str, mark: str) -> int:
    """Characters at the end of `text` that may be the beginning of `mark`; all from `mark` on if it is there."""
    if mark in text:
        return len(text) - text.find(mark)
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


class SequenceText:
    """One drawn sequence as the text of an answer."""

    def __init__(
        self,
        decode: Decode,
        *,
        before: Sequence[int] = (),
        stops: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        keep_stop: bool = False,
    ) -> None:
        self._growing = GrowingText(decode, before)
        self._stop = StopText(stops, keep=keep_stop)
        self._stop_tokens = frozenset(stop_tokens)

    @property
    def matched_stop(self) -> str | None:
        return self._stop.matched

    def add(self, token: int) -> str:
        return self._stop.add(self._growing.add(token))

    def add_last(self, token: int, *, stopped: bool) -> str:
        """`stopped`: by a stop text or token, not by its length."""
        text = self._growing.add(token) + self._growing.end()
        return self._stop.end(text, search=stopped and token not in self._stop_tokens)

    def whole(self, tokens: Sequence[int], *, stopped: bool) -> str:
        """As `add` and `add_last` over all tokens."""
        if not tokens:
            return ""
        text = self._growing.all_at_once(tokens)
        return self._stop.end(text, search=stopped and tokens[-1] not in self._stop_tokens)
