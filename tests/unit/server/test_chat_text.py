"""Text from tokens, one at a time: whole characters, stop texts, tool calls."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.server.chat_server import VOCAB, tiny_card
from tinsmith.server.chat.text import GrowingText, SequenceText, StopText
from tinsmith.server.chat.tokens import ModelText, load_model_text
from tinsmith.server.chat.tool_calls import ToolCall, ToolCallText

TEXT: ModelText = load_model_text(tiny_card())
LETTERS = "".join


def spelled(tokens: list[int]) -> str:
    """A decoder whose tokens are single bytes, as byte-level tokenizers have them."""
    return bytes(tokens).decode("utf-8", "replace")


def byte_fallback(tokens: list[int]) -> str:
    """As SentencePiece models decode byte tokens: a run of them is text as a whole or not at all."""
    try:
        return bytes(tokens).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(tokens)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=60), st.integers(0, 20))
def test_pieces_join_to_the_text_of_all_tokens(tokens: list[int], split: int) -> None:
    before, drawn = tokens[:split], tokens[split:]
    growing = GrowingText(TEXT.decode, before)
    pieces = [growing.add(token) for token in drawn] + [growing.end()]
    assert "".join(pieces) == GrowingText(TEXT.decode, before).all_at_once(drawn)
    if not before:
        assert "".join(pieces) == TEXT.decode(drawn)


@pytest.mark.parametrize("decode", [spelled, byte_fallback])
def test_a_character_is_told_when_it_is_whole(decode: object) -> None:
    growing = GrowingText(decode)  # type: ignore[arg-type]
    pieces = [growing.add(byte) for byte in "aé😀你好".encode()]
    assert [piece for piece in pieces if piece] == list("aé😀你好")
    assert growing.end() == ""


def test_bytes_that_never_become_a_character_are_told_at_the_end() -> None:
    growing = GrowingText(spelled)
    assert [growing.add(byte) for byte in [0x41, 0xE4, 0xBD]] == ["A", "", ""]
    assert growing.end() == "\ufffd"


def test_the_text_of_a_long_sequence_costs_no_more_per_token_than_that_of_a_short_one() -> None:
    widths: list[int] = []

    def decode(tokens: object) -> str:
        widths.append(len(list(tokens)))  # type: ignore[call-overload]
        return TEXT.decode(tokens)  # type: ignore[arg-type]

    growing = GrowingText(decode)
    for token in TEXT.encode("The quick brown fox jumps over the lazy dog. ") * 20:
        growing.add(token)
    assert max(widths) < 20


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_part_of_a_stop_text_is_told(text: str, stops: list[str]) -> None:
    """The sequence ends with the first piece that completes a stop text, as an engine would end it."""
    stop, told = StopText(stops), ""
    for at in range(len(text)):
        sofar = text[: at + 1]
        if any(s in sofar for s in stops):
            told += stop.end(text[at], search=True)
            first = min(sofar.find(s) for s in stops if s in sofar)
            assert told == sofar[:first]
            assert sofar.startswith(str(stop.matched), first)
            return
        told += stop.add(text[at])
        assert sofar.startswith(told)
    assert told + stop.end("", search=False) == text
    assert stop.matched is None


def test_a_stop_text_can_be_kept() -> None:
    stop = StopText(["END"], keep=True)
    assert stop.add("one E") + stop.end("ND two", search=True) == "one END"


def test_a_stop_token_leaves_the_text_alone() -> None:
    tokens = [*TEXT.encode("one two"), 2]
    writer = SequenceText(TEXT.decode, stops=[" tw"], stop_tokens=[2])
    assert writer.whole(tokens, stopped=True) == "one two"
    assert writer.matched_stop is None


def call_text(name: str = "f", **arguments: object) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def read(text: str, *, seed: int | None = None) -> list[str | ToolCall]:
    """The parts of a text that comes whole or in random pieces; neighbouring texts joined."""
    reader, pieces, rng = ToolCallText(), [text], random.Random(seed)
    if seed is not None:
        cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), 12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parts: list[str | ToolCall] = []
    for part in [part for piece in pieces for part in reader.add(piece)] + reader.end():
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_tool_calls_are_found_however_the_text_is_cut(seed: int | None) -> None:
    text = f"Let me look.\n{call_text('look', where='there')}\n{call_text('wait')}\nDone."
    assert read(text, seed=seed) == [
        "Let me look.",
        ToolCall(name="look", arguments={"where": "there"}),
        ToolCall(name="wait", arguments={}),
        "Done.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "no call at all ",
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": "f"',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "text"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}, "more": 1}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"half": "\\ud83d"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        f'<tool_call>{{"name": "f", "arguments": {{"x": {10**30}}}}}</tool_call>',
        f'<tool_call>{{"name": "f", "arguments": {"[" * 3000}{"]" * 3000}}}</tool_call>',
        "</tool_call> before <tool_call",
        "2 < 3 <too",
    ],
)
def test_what_is_no_tool_call_stays_text(text: str) -> None:
    for seed in [None, *range(5)]:
        assert read(text, seed=seed) == [text]


def test_the_bytes_of_a_token_are_those_it_adds_to_the_text() -> None:
    tokens = TEXT.encode("naïve 😀 text\n")
    assert bytes(byte for token in tokens for byte in TEXT.token_bytes(token)).decode() == "naïve 😀 text\n"
    assert bytes(TEXT.token_bytes(2)) == b"<|im_end|>"
