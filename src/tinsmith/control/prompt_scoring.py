"""Checks of what a sampling request wants to know of its prompt.

Every error names the field, the position and the value.
"""

# N prompt token, K target per position

from __future__ import annotations

import numpy as np

from tinsmith.control.requests import DrawSamples
from tinsmith.types.errors import InvalidInput
from tinsmith.types.operations import BaseModelCard
from tinsmith.types.tensor import TensorData

MAX_TOPK_LOGPROBS = 128
MAX_ALT_TOKENS = 128
MAX_TARGETS_PER_POSITION = 1024
"""Bound on K of `(N, K)` targets."""


def check_prompt_scoring(request: DrawSamples, prompt_length: int, card: BaseModelCard) -> None:
    """Raises `InvalidInput`."""
    check_count("topk_prompt_logprobs", request.topk_prompt_logprobs, 0, most_alternatives(card))
    check_count("prompt_alt_tokens_k", request.prompt_alt_tokens_k, 0, MAX_ALT_TOKENS)
    _check_last_n(request, prompt_length)
    if request.target_prompt_logprobs is not None:
        _check_targets(request.target_prompt_logprobs, prompt_length, card)


def most_alternatives(card: BaseModelCard) -> int:
    """Bound on K of `topk_…`."""
    return min(MAX_TOPK_LOGPROBS, card.vocab_size)


def check_count(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidInput(f"{name} must be {low}..{high}, not {value!r}")


def _check_last_n(request: DrawSamples, prompt_length: int) -> None:
    last_n = request.prompt_logprobs_last_n
    if last_n is None:
        return
    if not request.prompt_logprobs:
        raise InvalidInput(f"prompt_logprobs_last_n {last_n!r} needs prompt_logprobs to be true")
    if not 1 <= last_n <= prompt_length - 1:
        raise InvalidInput(
            f"prompt_logprobs_last_n {last_n!r} is outside 1..{prompt_length - 1}; prompt has {prompt_length} tokens"
        )


def _check_targets(targets: TensorData, prompt_length: int, card: BaseModelCard) -> None:
    where, shape = "target_prompt_logprobs", targets.shape
    if targets.dtype != "int64":
        raise InvalidInput(f"{where}.dtype is {targets.dtype!r}; token ids must be 'int64'")
    if shape is None or len(shape) != 2:
        raise InvalidInput(f"{where}.shape is {shape!r}; it must be [len(prompt) - 1, K]")
    if shape[0] != prompt_length - 1:
        raise InvalidInput(
            f"{where}.shape is {shape!r}; it must have {prompt_length - 1} rows, one less than prompt has tokens"
        )
    if not 1 <= shape[1] <= MAX_TARGETS_PER_POSITION:
        raise InvalidInput(f"{where}.shape is {shape!r}; K must be 1..{MAX_TARGETS_PER_POSITION}")
    ids = targets.flat
    wrong = np.flatnonzero((ids < -1) | (ids >= card.vocab_size))
    if wrong.size:
        raise InvalidInput(
            f"{where}.data[{int(wrong[0])}] is {int(ids[wrong[0]])}; it must be a token of {card.name!r}, "
            f"0..{card.vocab_size - 1}, or -1 for none"
        )
    if not (ids >= 0).any():
        raise InvalidInput(f"{where} names no token; leave it out instead")
