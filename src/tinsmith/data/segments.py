"""Text in pieces that know whose they are, and how they become tokens.

A conversation is rendered as segments: some written by the format (turn markers, headers), some by people and models
(contents, thoughts, arguments). The second kind is *literal*: whatever it says, it never becomes a turn marker.

Without such text the tokens are those of the joined text, as `apply_chat_template` would encode it. With it the
format's own markers are encoded one by one, and the runs between them as plain text.
"""

# N token

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

from tinsmith.data.conversations import Image
from tinsmith.data.errors import RenderError
from tinsmith.data.tokenizers import ChatTokenizer

Span: TypeAlias = tuple[int, int]
"""First and one past the last, in characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    text: str
    message: int | None = None
    """The message it is a part of, from 0; `None` for what frames the conversation."""
    literal: bool = False
    """Written by a person or a model, not by the format."""
    trained: bool = False
    """Whether its tokens are learned when its message is; headers and prompts are not."""
    image: Image | None = None
    """The picture that its one token stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    tokens: tuple[int, ...]
    owners: tuple[int, ...]
    """Of each token: the index of the segment in which it begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """One special token among an answer's tokens."""

    text: str


class SegmentEncoder:
    """Encodes under one tokenizer.

    `markers`: texts of added tokens that are not flagged as special and yet mark turns; the special ones are always
    protected. Texts that are no token of this tokenizer are left out.
    """

    def __init__(self, tokenizer: ChatTokenizer, markers: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = {str(token.content): (token_id, token.special) for token_id, token in added_tokens(tokenizer).items()}
        wanted = set(markers)
        self.marker_ids = {text: number for text, (number, special) in added.items() if special or text in wanted}
        """Token ids of all protected markers, by their text."""
        self._marker_texts = {number: text for text, number in self.marker_ids.items()}
        self._marker = _any_of(self.marker_ids)
        self._stubborn = _any_of(text for text in self.marker_ids if not added[text][1])
        """Markers that the tokenizer finds in text even when told not to split at special tokens."""

    def first_marker(self, text: str, start: int = 0, end: int | None = None) -> Span | None:
        found = self._marker.search(text, start, len(text) if end is None else end)
        return found.span() if found else None

    def mark_id(self, text: str) -> int:
        """The token of a marker. Raises `RenderError` if the tokenizer has none."""
        if text not in self.marker_ids:
            raise RenderError(f"the tokenizer has no special token {text!r}, which this format needs")
        return self.marker_ids[text]

    def encode(self, segments: Sequence[Segment], source: str) -> Encoding:
        """Raises `RenderError` if text of a marker inside literal segments cannot be written as plain text."""
        text = "".join(segment.text for segment in segments)
        edges = [0, *accumulate(len(segment.text) for segment in segments)]
        frames = [
            (start, end)
            for segment, (start, end) in zip(segments, pairwise(edges), strict=True)
            if not segment.literal and end > start
        ]
        frames = _merged(frames)
        if self._tokenizer.is_fast and not self._is_forged(text, frames):
            tokens, offsets = self._encode_text(text)
        else:
            self._check_plain(text, frames, source)
            tokens, offsets = self._encode_by_pieces(text, frames)
        starts, owners = _owners(edges)
        return Encoding(
            tokens=tuple(tokens), owners=tuple(owners[bisect_right(starts, start) - 1] for start, _ in offsets)
        )

    def split(self, tokens: Sequence[int]) -> list[Marker | str]:
        """Markers and the text between them. Text that only spells a marker stays text."""
        parts: list[Marker | str] = []
        run: list[int] = []
        for token in tokens:
            if token in self._marker_texts:
                parts += [self.decode(run)] if run else []
                parts.append(Marker(text=self._marker_texts[token]))
                run = []
            else:
                run.append(token)
        return [*parts, self.decode(run)] if run else parts

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _is_forged(self, text: str, frames: Sequence[Span]) -> bool:
        """Whether a marker's text touches a literal segment."""
        return any(
            not any(start <= found.start() and found.end() <= end for start, end in frames)
            for found in self._marker.finditer(text)
        )

    def _check_plain(self, text: str, frames: Sequence[Span], source: str) -> None:
        """Encode by pieces and as a whole must agree where nothing is forged: here with dashes for the forged."""
        if not self._tokenizer.is_fast:
            return
        harmless, position = "", 0
        for start, end in [*frames, (len(text), len(text))]:
            harmless += self._marker.sub(lambda found: "-" * len(found[0]), text[position:start]) + text[start:end]
            position = end
        harmless = self._without_straddlers(harmless, frames)
        if self._encode_by_pieces(harmless, frames)[0] != self._encode_text(harmless)[0]:
            raise RenderError(
                f"{source}: a message holds the text of a special token ({', '.join(self.marker_ids)}), "
                "and this tokenizer cannot encode it as plain text; take it out of the data"
            )

    def _without_straddlers(self, text: str, frames: Sequence[Span]) -> str:
        """Markers that are half a frame's and half a message's; a frame's own markers stay."""
        for found in list(self._marker.finditer(text)):
            if not any(start <= found.start() and found.end() <= end for start, end in frames):
                text = text[: found.start()] + "-" * len(found[0]) + text[found.end() :]
        return text

    def _encode_text(self, text: str, **options: Any) -> tuple[list[int], list[Span]]:
        output = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
        return list(output["input_ids"]), [(int(a), int(b)) for a, b in output["offset_mapping"]]

    def _encode_by_pieces(self, text: str, frames: Sequence[Span]) -> tuple[list[int], list[Span]]:
        marks = [found.span() for start, end in frames for found in self._marker.finditer(text, start, end)]
        tokens: list[int] = []
        offsets: list[Span] = []
        for (_, start), (end, after) in pairwise([(0, 0), *marks, (len(text), len(text))]):
            for first, last in self._plain_runs(text, start, end):
                run_tokens, run_offsets = self._encode_plain(text[first:last])
                tokens += run_tokens
                offsets += [(first + a, first + b) for a, b in run_offsets]
            if after > end:
                tokens.append(self.marker_ids[text[end:after]])
                offsets.append((end, after))
        return tokens, offsets

    def _plain_runs(self, text: str, start: int, end: int) -> list[Span]:
        """A run cut within every marker that the tokenizer would find in it; such halves are only text."""
        pattern = self._stubborn if self._tokenizer.is_fast else self._marker
        cuts = [found.start() + 1 for found in pattern.finditer(text, start, end)]
        return [span for span in pairwise([start, *cuts, end]) if span[1] > span[0]]

    def _encode_plain(self, text: str) -> tuple[list[int], list[Span]]:
        if self._tokenizer.is_fast:
            return self._encode_text(text, split_special_tokens=True)
        tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokens, self._slow_offsets(text, tokens)

    def _slow_offsets(self, text: str, tokens: Sequence[int]) -> list[Span]:
        """Where each token begins, from decoding ever longer beginnings: a slow tokenizer tells no offsets."""
        edges = [min(len(self.decode(tokens[:count]).rstrip("\ufffd")), len(text)) for count in range(len(tokens))]
        return list(pairwise([*edges, len(text)]))


def added_tokens(tokenizer: ChatTokenizer) -> Mapping[int, Any]:
    """Tokens beside the vocabulary proper, by id; each has `content` and `special`."""
    return tokenizer.added_tokens_decoder


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Neighbours joined: a marker may lie across two segments of the format."""
    merged: list[Span] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _owners(edges: Sequence[int]) -> tuple[list[int], list[int]]:
    """Starts of the segments that have text, and which segments they are."""
    filled = [(start, index) for index, (start, end) in enumerate(pairwise(edges)) if end > start]
    return [start for start, _ in filled], [index for _, index in filled]
