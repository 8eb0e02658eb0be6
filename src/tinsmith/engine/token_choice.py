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
_TEMPERATURES = (1e-30, 1e30)
"""Beyond these nothing changes any more, but fp32 would overflow."""
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


def uniforms(stream_B: np.ndarray, position_B: np.ndarray | int) -> np.ndarray:
    """Numbers in [0, 1) by counter: SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) over seed, sample and position."""
    return (_absorb(stream_B, position_B) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def stream(seed: np.ndarray | int, sample: np.ndarray | int) -> np.ndarray:
    """What of the numbers of a sequence does not depend on the position; uint64, broadcast."""
    return _absorb(np.asarray(seed, dtype=np.uint64), sample)


def _absorb(state: np.ndarray, part: np.ndarray | int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return _mix(state ^ _mix(np.asarray(part, dtype=np.uint64) + np.uint64(0x632BE59BD9B4E019)))


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def choose(logits_BV: Tensor, rules: ChoiceRules, uniforms_B: np.ndarray, *, topk: int = 0) -> Choices:
    """Draw one token per row. `topk` > 0 also returns the most likely alternatives of every row."""
    distribution = Distribution(logits_BV, rules.temperature_B)
    tokens_B = distribution.choose(rules, uniforms_B)
    ids_BK, topk_logprobs_BK = distribution.topk(topk) if topk else (None, None)
    return Choices(tokens_B, distribution.logprobs_of(tokens_B), distribution.finite_B, ids_BK, topk_logprobs_BK)


class Distribution:
    """What rows of logits say of the next token at their temperatures (0 counts as 1).

    The device passes over the vocabulary; the little that is left is decided in numpy.
    """

    def __init__(self, logits_BV: Tensor, temperature_B: np.ndarray) -> None:
        scaled_BV = logits_BV.float()
        scale_B = np.where(temperature_B == 0, 1.0, temperature_B.clip(*_TEMPERATURES))
        if (scale_B != 1).any():
            scaled_BV = scaled_BV / torch.from_numpy(scale_B.astype(np.float32)).to(logits_BV.device)[:, None]
        low_B, high_B = scaled_BV.amin(dim=-1), scaled_BV.amax(dim=-1)  # aminmax does both, six times slower
        self._scaled_BV = scaled_BV
        self._weights_BV = (scaled_BV - high_B[:, None]).exp_()
        self._sums_BS = _stretch_sums(self._weights_BV).cpu().numpy()
        self._total_B = self._sums_BS[:, -1]
        high = high_B.cpu().numpy()
        self.finite_B: np.ndarray = np.isfinite(high) & np.isfinite(low_B.cpu().numpy())
        with np.errstate(invalid="ignore", divide="ignore"):
            self._normalizer_B = high + np.log(self._total_B).astype(np.float32)

    def logprobs_of(self, tokens_B: np.ndarray) -> np.ndarray:
        """fp32 `[B]`, over the full vocabulary."""
        return _pick(self._scaled_BV, tokens_B[:, None])[:, 0] - self._normalizer_B

    def topk(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities `[B, k]` of the most likely tokens."""
        top = self._scaled_BV.topk(k, dim=-1)
        return top.indices.cpu().numpy(), top.values.cpu().numpy() - self._normalizer_B[:, None]

    def choose(self, rules: ChoiceRules, uniforms_B: np.ndarray) -> np.ndarray:
        """One token per row by its rule, int64 `[B]`."""
        greedy_B = rules.temperature_B == 0
        truncated_B = ~greedy_B & ((rules.top_k_B > 0) | (rules.top_p_B < 1))
        if greedy_B.all():
            return self._most_likely(slice(None))
        tokens_B = self.draw(uniforms_B)
        if greedy_B.any():
            tokens_B[greedy_B] = self._most_likely(np.flatnonzero(greedy_B))
        if (rows := np.flatnonzero(truncated_B)).size:
            tokens_B[rows] = self._draw_truncated(rows, uniforms_B[rows], rules[rows])
        return tokens_B

    def draw(self, uniforms_B: np.ndarray) -> np.ndarray:
        """One token per row from the whole distribution: the first whose cumulative weight exceeds u of the total."""
        rows_B, vocab_size = np.arange(len(uniforms_B)), self._scaled_BV.shape[1]
        target_B = uniforms_B * self._total_B
        stretch_B = np.minimum((self._sums_BS <= target_B[:, None]).sum(axis=1), self._sums_BS.shape[1] - 1)
        before_B = np.where(stretch_B > 0, self._sums_BS[rows_B, stretch_B - 1], 0.0)
        at_BW = stretch_B[:, None] * _STRETCH + np.arange(_STRETCH)
        inside_BW = _pick(self._weights_BV, np.minimum(at_BW, vocab_size - 1)) * (at_BW < vocab_size)
        return stretch_B * _STRETCH + _first_beyond(inside_BW, target_B - before_B)

    def _most_likely(self, rows: slice | np.ndarray) -> np.ndarray:
        tokens: np.ndarray = self._scaled_BV[rows].argmax(dim=-1).cpu().numpy()
        return tokens

    def _draw_truncated(self, rows: np.ndarray, uniforms_B: np.ndarray, rules: ChoiceRules) -> np.ndarray:
        weights_BV, total_B = self._weights_BV[rows], self._total_B[rows]
        vocab_size = weights_BV.shape[1]
        top_k_B = np.where(rules.top_k_B > 0, rules.top_k_B, vocab_size)
        num_candidates = min(vocab_size, max(_CANDIDATES, int(rules.top_k_B.max())))
        top = weights_BV.topk(num_candidates, dim=-1)
        top_BK = top.values.cpu().numpy()
        # few candidates suffice where top-k takes no more, or where they reach the share that top-p keeps
        enough_B = top_BK.sum(axis=1, dtype=np.float64) >= rules.top_p_B * total_B
        enough_B |= (top_k_B <= num_candidates) | (num_candidates == vocab_size)
        tokens_B = _draw_sorted(top_BK, top.indices.cpu().numpy(), uniforms_B, top_k_B, rules.top_p_B, total_B)
        if (more := np.flatnonzero(~enough_B)).size:
            values, indices = (x.cpu().numpy() for x in weights_BV[more].sort(dim=-1, descending=True))
            tokens_B[more] = _draw_sorted(
                values, indices, uniforms_B[more], top_k_B[more], rules.top_p_B[more], total_B[more]
            )
        return tokens_B


def _stretch_sums(weights_BV: Tensor) -> Tensor:
    """Cumulative fp64 sums of stretches of `_STRETCH` weights `[B, S]`; the last one is the row's total."""
    whole = weights_BV.shape[1] // _STRETCH * _STRETCH
    sums_BS = weights_BV[:, :whole].unflatten(1, (whole // _STRETCH, _STRETCH)).sum(dim=-1)
    if whole < weights_BV.shape[1]:
        sums_BS = torch.cat([sums_BS, weights_BV[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    return sums_BS.cumsum(dim=-1, dtype=torch.float64)


def _pick(values_BV: Tensor, at_BK: np.ndarray) -> np.ndarray:
    picked: np.ndarray = values_BV.gather(1, torch.from_numpy(at_BK).to(values_BV.device)).cpu().numpy()
    return picked


def _draw_sorted(
    weights_BK: np.ndarray,
    ids_BK: np.ndarray,
    uniforms_B: np.ndarray,
    top_k_B: np.ndarray,
    top_p_B: np.ndarray,
    total_B: np.ndarray,
) -> np.ndarray:
    """Draw among the most likely tokens, given in descending order: top-k first, then top-p of what it left."""
    rank_K = np.arange(weights_BK.shape[1])
    weights_BK = weights_BK.astype(np.float64) * (rank_K < top_k_B[:, None])
    cumulative_BK = weights_BK.cumsum(axis=1)
    left_B = np.where(top_k_B <= weights_BK.shape[1], cumulative_BK[:, -1], total_B)
    # keep a token if those before it do not reach the share yet
    is_kept_BK = cumulative_BK - weights_BK < (top_p_B * left_B)[:, None]
    weights_BK *= is_kept_BK | (top_p_B >= 1)[:, None]
    return ids_BK[np.arange(len(ids_BK)), _first_beyond(weights_BK, uniforms_B * weights_BK.sum(axis=1))]


def _first_beyond(weights_BK: np.ndarray, target_B: np.ndarray) -> np.ndarray:
    """The first index whose cumulative weight exceeds the target; never one of weight 0 (unless all are)."""
    index_B = (weights_BK.cumsum(axis=1, dtype=np.float64) <= target_B[:, None]).sum(axis=1)
    last_positive_B = weights_BK.shape[1] - 1 - np.argmax(weights_BK[:, ::-1] > 0, axis=1)
    return np.minimum(index_B, last_positive_B)
