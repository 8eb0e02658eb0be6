"""From logits to drawn tokens: temperature, top-k, top-p, one random number per token.

The random number of a token depends on nothing but the request's seed, the sample's index and the token's position, so
the company a sequence keeps in its batch never changes what it draws.
"""

# B sequence, V vocabulary, K alternative

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """How one sequence draws. `temperature` 0 takes the most likely token; `top_k` -1 and `top_p` 1 keep all."""

    temperature: float
    top_k: int
    top_p: float

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1)


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) by counter: SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) over the three parts."""
    state = seed & _MASK
    for part in (sample, position):
        state = _mix(state ^ _mix(part + 0x632BE59BD9B4E019))
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True, slots=True)
class Choices:
    tokens_B: np.ndarray
    logprobs_B: np.ndarray
    """fp32, full vocabulary, at the temperature drawn with (at 0: unscaled)."""
    topk_ids_BK: np.ndarray | None
    topk_logprobs_BK: np.ndarray | None


def choose(logits_BV: Tensor, rules: Sequence[ChoiceRule], uniforms: Sequence[float], *, topk: int = 0) -> Choices:
    """Draw one token per row. `topk` > 0 also returns the most likely alternatives of every row."""
    device = logits_BV.device
    temperatures = torch.tensor([r.temperature or 1.0 for r in rules], device=device, dtype=torch.float32)
    logprobs_BV = torch.log_softmax(logits_BV.float() / temperatures[:, None], dim=-1)
    tokens_B = torch.empty(len(rules), dtype=torch.int64, device=device)
    uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=device)
    for rows, draw in (
        ([i for i, r in enumerate(rules) if r.is_greedy], _most_likely),
        ([i for i, r in enumerate(rules) if not r.is_greedy and not r.truncates], _draw),
        ([i for i, r in enumerate(rules) if r.truncates], _draw_truncated),
    ):
        if rows:
            index = torch.tensor(rows, device=device)
            tokens_B[index] = draw(logprobs_BV[index], uniforms_B[index], [rules[i] for i in rows])
    chosen_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
    top = logprobs_BV.topk(topk, dim=-1) if topk else None
    return Choices(
        tokens_B.cpu().numpy(),
        chosen_B.cpu().numpy(),
        top.indices.cpu().numpy() if top is not None else None,
        top.values.cpu().numpy() if top is not None else None,
    )


def _most_likely(logprobs_BV: Tensor, uniforms_B: Tensor, rules: Sequence[ChoiceRule]) -> Tensor:
    return logprobs_BV.argmax(dim=-1)


def _draw(logprobs_BV: Tensor, uniforms_B: Tensor, rules: Sequence[ChoiceRule]) -> Tensor:
    return _inverse_cdf(logprobs_BV.double().exp_(), uniforms_B)


def _draw_truncated(logprobs_BV: Tensor, uniforms_B: Tensor, rules: Sequence[ChoiceRule]) -> Tensor:
    vocab_size = logprobs_BV.shape[1]
    top_k = torch.tensor([r.top_k if r.top_k > 0 else vocab_size for r in rules], device=logprobs_BV.device)
    top_p = torch.tensor([r.top_p for r in rules], device=logprobs_BV.device, dtype=torch.float64)
    sorted_BV, order_BV = logprobs_BV.double().sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.exp_()
    rank_V = torch.arange(vocab_size, device=logprobs_BV.device)
    probs_BV = probs_BV * (rank_V[None] < top_k[:, None])
    before_BV = probs_BV.cumsum(dim=-1) - probs_BV
    # top-p of what top-k left: keep a token if those before it do not reach the share yet
    keep_BV = before_BV < top_p[:, None] * probs_BV.sum(dim=-1, keepdim=True)
    return order_BV.gather(1, _inverse_cdf(probs_BV * keep_BV, uniforms_B)[:, None])[:, 0]


def _inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds u of the total; never one of weight 0."""
    cumulative_BV = weights_BV.cumsum(dim=-1)
    target_B = uniforms_B * cumulative_BV[:, -1]
    index_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    last_positive_B = (weights_BV > 0).cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(index_B, last_positive_B)
