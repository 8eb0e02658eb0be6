"""Attention proper, of queries over keys that are already laid side by side.

softmax(cap(q k^T * scale) + mask) v,   cap(x) = softcap * tanh(x / softcap)

An attention sink is one more key whose score is a constant of the query head and whose value is zero.
"""

# B sequence, L query position, S key position, H query head, K key head, G query heads per key head, D head size

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_SCORES_AT_ONCE = 2**24
"""Scores held at once where they must be held: 64 MB in fp32."""
_HEAD_SIZE_STEP = 8
"""Fast kernels want head sizes that are multiples of this."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRule:
    """What an architecture does to attention scores."""

    scale: float | None = None
    """`None`: 1 / sqrt(D)."""
    window: int | None = None
    """A query sees this many newest positions, its own included; `None`: all."""
    softcap: float | None = None
    """Scores are squeezed into ± this."""
    sinks_H: Tensor | None = None
    """The score of each query head's sink."""

    @property
    def is_plain(self) -> bool:
        """Scores are only scaled and masked."""
        return self.softcap is None and self.sinks_H is None


def attend(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, rule: ScoreRule) -> Tensor:
    """Causal attention of sequences to themselves -> `[B, H, L, D]`."""
    length, head_size = q_BHLD.shape[2], v_BKLD.shape[3]
    mask = _window_mask(length, rule.window, q_BHLD.device) if rule.window and rule.window < length else None
    if rule.softcap is not None:
        return _capped(q_BHLD, k_BKLD, v_BKLD, mask, rule)
    scale = _scale(rule, q_BHLD)
    if rule.sinks_H is not None:
        q_BHLD, k_BKLD, v_BKLD = _with_sinks(q_BHLD, k_BKLD, v_BKLD, rule.sinks_H, scale)
        # query i must see the sink in front and keys 0..i: a causal mask over one more query in front gives just that
        q_BHLD = nn.functional.pad(q_BHLD, (0, 0, 1, 0))
        mask = None if mask is None else _see_sinks(nn.functional.pad(mask, (0, 0, 1, 0)))
    out_BHLD = nn.functional.scaled_dot_product_attention(
        q_BHLD,
        k_BKLD,
        v_BKLD,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_BHLD.shape[1] != k_BKLD.shape[1],
    )
    return out_BHLD if rule.sinks_H is None else out_BHLD[:, :, 1:, :head_size]


def attend_grouped(q_BHD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, hidden_BS: Tensor, rule: ScoreRule) -> Tensor:
    """One query per sequence over S keys, of which `hidden` is -inf for those not visible, else 0 -> `[B, H, D]`.

    The query heads of one key head stand in for query positions, so that keys need not be repeated.
    """
    num_sequences, num_heads, head_size = q_BHD.shape
    num_key_heads, value_size = k_BKSD.shape[1], v_BKSD.shape[3]
    q_BKGD = q_BHD.reshape(num_sequences, num_key_heads, -1, head_size)
    hidden = hidden_BS[:, None, None, :]
    scale = _scale(rule, q_BHD)
    if rule.softcap is not None:
        out_BKGD = _eager(q_BKGD, k_BKSD, v_BKSD, hidden == 0, scale, rule.softcap)
    else:
        if rule.sinks_H is not None:
            sinks_KG = rule.sinks_H.view(num_key_heads, -1)
            q_BKGD, k_BKSD, v_BKSD = _with_sinks(q_BKGD, k_BKSD, v_BKSD, sinks_KG, scale)
            hidden = nn.functional.pad(hidden, (1, 0))  # visible to all
        out_BKGD = nn.functional.scaled_dot_product_attention(q_BKGD, k_BKSD, v_BKSD, attn_mask=hidden, scale=scale)
    return out_BKGD[..., :value_size].reshape(num_sequences, num_heads, -1)


def attend_chunk(q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_BQS: Tensor, rule: ScoreRule) -> Tensor:
    """Some queries per sequence over S keys of which `mask` tells the visible -> `[B, H, Q, D]`. No gradients."""
    num_heads, num_key_heads, value_size = q_BHQD.shape[1], k_BKSD.shape[1], v_BKSD.shape[3]
    mask, scale = mask_BQS[:, None], _scale(rule, q_BHQD)
    if rule.softcap is not None:
        repeats = num_heads // num_key_heads
        k_BHSD, v_BHSD = (x.repeat_interleave(repeats, dim=1) for x in (k_BKSD, v_BKSD))
        return _eager(q_BHQD, k_BHSD, v_BHSD, mask, scale, rule.softcap)
    if rule.sinks_H is not None:
        q_BHQD, k_BKSD, v_BKSD = _with_sinks(q_BHQD, k_BKSD, v_BKSD, rule.sinks_H, scale)
        mask = _see_sinks(mask)
    out_BHQD = nn.functional.scaled_dot_product_attention(
        q_BHQD, k_BKSD, v_BKSD, attn_mask=mask, scale=scale, enable_gqa=num_heads != num_key_heads
    )
    return out_BHQD[..., :value_size]


def attend_part(
    q_BKXD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, hidden: Tensor | None, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    """X queries per key head over some of their keys -> `[B, K, X, D]` and the scores' logsumexp, fp32 `[B, K, X]`.

    `hidden` is added to the scores and broadcast; every query must see a key. Only for rules that are plain.
    """
    scale = _scale(rule, q_BKXD)
    if q_BKXD.device.type == "cpu" and q_BKXD.shape[-1] == v_BKSD.shape[-1]:
        # what `scaled_dot_product_attention` calls here; it alone tells the logsumexp
        out_BKXD, lse_BKX = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BKXD, k_BKSD, v_BKSD, attn_mask=hidden, scale=scale
        )
        return out_BKXD, lse_BKX
    scores = (q_BKXD @ k_BKSD.transpose(-1, -2)).float() * scale
    if hidden is not None:
        scores = scores + hidden
    return scores.softmax(dim=-1).to(v_BKSD.dtype) @ v_BKSD, scores.logsumexp(dim=-1)


def _scale(rule: ScoreRule, q_D: Tensor) -> float:
    return float(q_D.shape[-1] ** -0.5) if rule.scale is None else rule.scale


def _capped(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_LL: Tensor | None, rule: ScoreRule) -> Tensor:
    """No fused kernel caps scores: some queries at a time, their scores computed again in the backward pass."""
    num_sequences, num_heads, length, _ = q_BHLD.shape
    repeats = num_heads // k_BKLD.shape[1]
    k_BHLD, v_BHLD = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k_BKLD, v_BKLD))
    if mask_LL is None:
        mask_LL = _window_mask(length, length, q_BHLD.device)
    size = max(1, _SCORES_AT_ONCE // (num_sequences * num_heads * length))
    scale = _scale(rule, q_BHLD)
    outputs = []
    for q, mask in zip(q_BHLD.split(size, dim=2), mask_LL.split(size), strict=True):
        if torch.is_grad_enabled() and size < length:
            out = checkpoint(
                _eager, q, k_BHLD, v_BHLD, mask, scale, rule.softcap, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = _eager(q, k_BHLD, v_BHLD, mask, scale, rule.softcap)
        outputs.append(out)
    return torch.cat(outputs, dim=2)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A first key that scores each head's sink, by one more head dimension: q gets the sink, that key 1 / scale.

    `sinks` is `[H]`, or `[K, G]` where query heads stand in for positions. Head sizes are padded, values to the same.
    """
    size = -(-(q.shape[-1] + 1) // _HEAD_SIZE_STEP) * _HEAD_SIZE_STEP
    sink_column = sinks.to(q.dtype).view(*sinks.shape, *[1] * (3 - sinks.ndim))
    q = torch.cat([q, sink_column.expand(*q.shape[:-1], 1)], dim=-1)
    first_key = k.new_zeros(*k.shape[:2], 1, q.shape[-1])
    first_key[..., -1] = 1 / scale
    k = torch.cat([first_key, nn.functional.pad(k, (0, 1))], dim=2)
    padding = size - q.shape[-1]
    v = nn.functional.pad(v, (0, size - v.shape[-1], 1, 0))
    return nn.functional.pad(q, (0, padding)), nn.functional.pad(k, (0, padding)), v


def _see_sinks(mask: Tensor) -> Tensor:
    """One more key in front, visible to all."""
    return nn.functional.pad(mask, (1, 0), value=True)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    at_L = torch.arange(length, device=device)
    distance_LL = at_L[:, None] - at_L[None, :]
    return (distance_LL >= 0) & (distance_LL < window)
