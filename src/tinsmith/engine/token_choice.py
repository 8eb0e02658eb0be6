"""From logits to drawn tokens: temperature, top-k, top-p, one random number per token.

The random number of a token depends on nothing but the request's seed, the sample's index and the token's position, so
the company a sequence keeps in its batch never changes what it draws.
"""

# B row (a sequence, or a prompt position), V vocabulary, K alternative or candidate, W token of a stretch

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_STRETCH = 128
"""Drawing adds up stretches of this many weights first, then looks inside one."""
_CANDIDATES = 1024
"""Truncated drawing sorts this many likely tokens; only rows whose top-p needs more sort the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class ChoiceRules:
    """How each row draws. `temperature` 0 takes the most likely token; `top_k` -1 and `top_p` 1 keep all."""

    temperature_B: np.ndarray
    top_k_B: np.ndarray
    top_p_B: np.ndarray

    @classmethod
    def same(cls, num_rows: int, temperature: float, top_k: int = -1, top_p: float = 1.0) -> ChoiceRules:
        return cls(np.full(num_rows, temperature), np.full(num_rows, top_k), np.full(num_rows, top_p))

    def __getitem__(self, rows: slice | np.ndarray) -> ChoiceRules:
        return ChoiceRules(self.temperature_B[rows], self.top_k_B[rows], self.top_p_B[rows])


@dataclass(frozen=True, slots=True)
class Choices:
    tokens_B: np.ndarray
    logprobs_B: np.ndarray
    """fp32, full vocabulary, at the temperature drawn with (at 0: unscaled)."""
    finite_B: np.ndarray
    """False where the logits are not finite: the row's other values mean nothing."""
    topk_ids_BK: np.ndarray | None = None
    topk_logprobs_BK: np.ndarray | None = None


def uniforms(seed: np.ndarray | int, sample: np.ndarray | int, position: np.ndarray | int) -> np.ndarray:
    """Numbers in [0, 1) by counter: SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) over the three parts, broadcast."""
    with np.errstate(over="ignore"):
        state = np.asarray(seed, dtype=np.uint64)
        for part in (sample, position):
            state = _mix(state ^ _mix(np.asarray(part, dtype=np.uint64) + np.uint64(0x632BE59BD9B4E019)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def choose(logits_BV: Tensor, rules: ChoiceRules, uniforms_B: np.ndarray, *, topk: int = 0) -> Choices:
    """Draw one token per row. `topk` > 0 also returns the most likely alternatives of every row."""
    distribution = Distribution(logits_BV, rules.temperature_B)
    tokens_B = distribution.choose(rules, uniforms_B)
    logprobs_B = distribution.logprobs_of(tokens_B[:, None])[:, 0]
    ids_BK, topk_logprobs_BK = distribution.topk(topk) if topk else (None, None)
    return Choices(tokens_B.cpu().numpy(), logprobs_B.cpu().numpy(), distribution.finite_B, ids_BK, topk_logprobs_BK)


class Distribution:
    """What rows of logits say of the next token at their temperatures (0 counts as 1)."""

    def __init__(self, logits_BV: Tensor, temperature_B: np.ndarray) -> None:
        scaled_BV = logits_BV.float()
        scale_B = np.where(temperature_B == 0, 1.0, temperature_B)
        if (scale_B != 1).any():
            scaled_BV = scaled_BV / torch.from_numpy(scale_B.astype(np.float32)).to(logits_BV.device)[:, None]
        low_B, high_B = scaled_BV.amin(dim=-1), scaled_BV.amax(dim=-1)  # aminmax does both, six times slower
        self._scaled_BV = scaled_BV
        self._high_B = high_B
        self._weights_BV = (scaled_BV - high_B[:, None]).exp_()
        self._sums_BS = _stretch_sums(self._weights_BV)
        self._log_total_B = self._sums_BS[:, -1].log().float()
        self.finite_B: np.ndarray = (torch.isfinite(low_B) & torch.isfinite(high_B)).cpu().numpy()

    def logprobs_of(self, tokens_BK: Tensor) -> Tensor:
        """fp32, over the full vocabulary."""
        return self._logprobs(self._scaled_BV.gather(1, tokens_BK))

    def topk(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities `[B, k]` of the most likely tokens."""
        top = self._scaled_BV.topk(k, dim=-1)
        return top.indices.cpu().numpy(), self._logprobs(top.values).cpu().numpy()

    def choose(self, rules: ChoiceRules, uniforms_B: np.ndarray) -> Tensor:
        """One token per row by its rule, int64 `[B]`."""
        uniforms_d = torch.from_numpy(uniforms_B).to(self._scaled_BV.device)
        greedy_B = rules.temperature_B == 0
        truncated_B = ~greedy_B & ((rules.top_k_B > 0) | (rules.top_p_B < 1))
        if not (greedy_B | truncated_B).any():
            return self.draw(uniforms_d)
        if greedy_B.all():
            return self._scaled_BV.argmax(dim=-1)
        tokens_B = self.draw(uniforms_d)
        for rows, choose in ((np.flatnonzero(greedy_B), self._most_likely), (np.flatnonzero(truncated_B), self._cut)):
            if len(rows):
                at = torch.from_numpy(rows).to(tokens_B.device)
                tokens_B[at] = choose(at, uniforms_d[at], rules[rows])
        return tokens_B

    def draw(self, uniforms_B: Tensor) -> Tensor:
        """One token per row from the whole distribution: the first whose cumulative weight exceeds u of the total."""
        sums_BS, weights_BV = self._sums_BS, self._weights_BV
        target_B1 = (uniforms_B * sums_BS[:, -1])[:, None]
        stretch_B1 = torch.searchsorted(sums_BS, target_B1, right=True).clamp_(max=sums_BS.shape[1] - 1)
        before_B1 = torch.where(stretch_B1 > 0, sums_BS.gather(1, (stretch_B1 - 1).clamp(min=0)), 0.0)
        at_BW = stretch_B1 * _STRETCH + torch.arange(_STRETCH, device=weights_BV.device)
        inside_BW = weights_BV.gather(1, at_BW.clamp(max=weights_BV.shape[1] - 1)).double()
        inside_BW.masked_fill_(at_BW >= weights_BV.shape[1], 0.0)
        return stretch_B1[:, 0] * _STRETCH + _first_beyond(inside_BW, target_B1 - before_B1)

    def _most_likely(self, rows: Tensor, uniforms_B: Tensor, rules: ChoiceRules) -> Tensor:
        return self._scaled_BV[rows].argmax(dim=-1)

    def _cut(self, rows: Tensor, uniforms_B: Tensor, rules: ChoiceRules) -> Tensor:
        weights_BV, total_B1 = self._weights_BV[rows], self._sums_BS[rows, -1][:, None]
        vocab_size = weights_BV.shape[1]
        top_k_B = np.where(rules.top_k_B > 0, rules.top_k_B, vocab_size)
        num_candidates = min(vocab_size, max(_CANDIDATES, int(rules.top_k_B.max())))
        top = weights_BV.topk(num_candidates, dim=-1)
        top_p_B1 = torch.from_numpy(rules.top_p_B).to(rows.device)[:, None]
        # few candidates suffice where top-k takes no more, or where they reach the share that top-p keeps
        enough_B = (top.values.double().sum(dim=-1, keepdim=True) >= top_p_B1 * total_B1)[:, 0].cpu().numpy()
        enough_B |= (top_k_B <= num_candidates) | (num_candidates == vocab_size)
        tokens_B = _draw_sorted(top.values, top.indices, uniforms_B, top_k_B, top_p_B1, total_B1)
        if (more := np.flatnonzero(~enough_B)).size:
            at = torch.from_numpy(more).to(rows.device)
            values, indices = weights_BV[at].sort(dim=-1, descending=True)
            tokens_B[at] = _draw_sorted(values, indices, uniforms_B[at], top_k_B[more], top_p_B1[at], total_B1[at])
        return tokens_B

    def _logprobs(self, scaled_BK: Tensor) -> Tensor:
        return scaled_BK - self._high_B[:, None] - self._log_total_B[:, None]


def _stretch_sums(weights_BV: Tensor) -> Tensor:
    """Cumulative fp64 sums of stretches of `_STRETCH` weights `[B, S]`; the last one is the row's total."""
    whole = weights_BV.shape[1] // _STRETCH * _STRETCH
    sums = [weights_BV[:, :whole].unflatten(1, (-1, _STRETCH)).sum(dim=-1)] if whole else []
    if whole < weights_BV.shape[1]:
        sums.append(weights_BV[:, whole:].sum(dim=-1, keepdim=True))
    return torch.cat(sums, dim=1).cumsum(dim=-1, dtype=torch.float64)


def _draw_sorted(
    weights_BK: Tensor, ids_BK: Tensor, uniforms_B: Tensor, top_k_B: np.ndarray, top_p_B1: Tensor, total_B1: Tensor
) -> Tensor:
    """Draw among the most likely tokens, given in descending order: top-k first, then top-p of what it left."""
    weights_BK = weights_BK.double()
    rank_K = torch.arange(weights_BK.shape[1], device=weights_BK.device)
    limit_B1 = torch.from_numpy(np.ascontiguousarray(top_k_B)).to(weights_BK.device)[:, None]
    is_limited_B1 = limit_B1 <= weights_BK.shape[1]
    weights_BK = weights_BK * (rank_K < limit_B1)
    cumulative_BK = weights_BK.cumsum(dim=-1)
    left_B1 = torch.where(is_limited_B1, cumulative_BK[:, -1:], total_B1)
    # keep a token if those before it do not reach the share yet
    weights_BK = weights_BK * ((cumulative_BK - weights_BK < top_p_B1 * left_B1) | (top_p_B1 >= 1))
    target_B1 = uniforms_B[:, None] * weights_BK.sum(dim=-1, keepdim=True)
    return ids_BK.gather(1, _first_beyond(weights_BK, target_B1)[:, None])[:, 0]


def _first_beyond(weights_BK: Tensor, target_B1: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds the target; never one of weight 0 (unless all are)."""
    index_B = torch.searchsorted(weights_BK.cumsum(dim=-1), target_B1, right=True)[:, 0]
    last_positive_B = (weights_BK > 0).cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(index_B, last_positive_B)
