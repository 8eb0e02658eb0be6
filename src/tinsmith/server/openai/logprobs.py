"""Log-probabilities in the two forms of the dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinsmith.server.chat.asks import Target
from tinsmith.server.chat.text import GrowingText
from tinsmith.server.chat.tokens import ModelText
from tinsmith.types.results import DrawnToken, SampledSequence, SampleResponse

LEAST = -9999.0
"""Stands for anything less likely, which JSON cannot always write."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One token of a prompt or an answer."""

    token: int
    logprob: float | None
    """`None` for the first token of a prompt."""
    top: Sequence[tuple[int, float]] = ()
    """Best first."""


def scored_token(drawn: DrawnToken) -> Scored:
    return Scored(drawn.token, _same(drawn.token, drawn.logprob, drawn.topk), drawn.topk)


def scored_sequence(sequence: SampledSequence) -> list[Scored]:
    tokens, logprobs = sequence.tokens, sequence.logprobs or []
    top = sequence.topk_logprobs or [None] * len(tokens)
    rows = zip(tokens, logprobs, top, strict=True)
    return [Scored(token, _same(token, logprob, row or ()), row or ()) for token, logprob, row in rows]


def scored_prompt(prompt: Sequence[int], response: SampleResponse) -> list[Scored]:
    logprobs = response.prompt_logprobs or [None] * len(prompt)
    top = response.topk_prompt_logprobs or [None] * len(prompt)
    rows = zip(prompt, logprobs, top, strict=True)
    return [
        Scored(token, None if logprob is None else _same(token, logprob, row or ()), row or ())
        for token, logprob, row in rows
    ]


def _same(token: int, logprob: float, top: Sequence[tuple[int, float]]) -> float:
    """A token's value as it stands among the likely ones: two computations may differ in the last digit, and
    evaluation harnesses compare the two."""
    return next((value for other, value in top if other == token), logprob)


def token_name(text: ModelText, as_ids: bool) -> Callable[[int], str]:
    return (lambda token: f"token_id:{token}") if as_ids else text.token_text


def chat_logprobs(target: Target, scored: Sequence[Scored], *, num_top: int, as_ids: bool) -> dict[str, Any]:
    name = token_name(target.text, as_ids)

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        assert logprob is not None
        return {"token": name(token), "logprob": max(logprob, LEAST), "bytes": target.text.token_bytes(token)}

    content = [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top[:num_top]]} for one in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    target: Target, scored: Sequence[Scored], *, num_top: int, as_ids: bool, text_start: int = 0
) -> dict[str, Any]:
    """`text_start`: characters of the choice's text before the first of these tokens."""
    name = token_name(target.text, as_ids)
    growing, offsets, at = GrowingText(target.text.decode_with_special), [], text_start
    for one in scored:
        offsets.append(at)
        at += len(growing.add(one.token))
    return {
        "tokens": [name(one.token) for one in scored],
        "token_logprobs": [None if one.logprob is None else max(one.logprob, LEAST) for one in scored],
        "top_logprobs": [_top(one, name) for one in scored] if num_top else None,
        "text_offset": offsets,
    }


def _top(one: Scored, name: Callable[[int], str]) -> dict[str, float] | None:
    """The likely tokens, and the token itself. Of tokens with the same text the likeliest counts."""
    if one.logprob is None:
        return None
    named: dict[str, float] = {}
    for token, logprob in [*one.top, (one.token, one.logprob)]:
        named.setdefault(name(token), max(logprob, LEAST))
    return named
