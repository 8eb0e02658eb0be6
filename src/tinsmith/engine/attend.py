"""Attention proper, of queries over keys that are already laid side by side.

softmax(q k^T * scale + mask) v
"""

# B sequence, L query position, S key position, H query head, K key head, G query heads per key head, D head size

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """What an architecture does to attention scores."""

    scale: float | None = None
    """`None`: 1 / sqrt(D)."""
    window: int | None = None
    """A query sees this many newest positions, its own included; `None`: all."""


def attend(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, rule: ScoreRule) -> Tensor:
    """Causal attention of sequences to themselves -> `[B, H, L, D]`."""
    length = q_BHLD.shape[2]
    mask = _window_mask(length, rule.window, q_BHLD.device) if rule.window and rule.window < length else None
    return nn.functional.scaled_dot_product_attention(
        q_BHLD,
        k_BKLD,
        v_BKLD,
        attn_mask=mask,
        is_causal=mask is None,
        scale=rule.scale,
        enable_gqa=q_BHLD.shape[1] != k_BKLD.shape[1],
    )


def attend_grouped(q_BHD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_BS: Tensor, rule: ScoreRule) -> Tensor:
    """One query per sequence over S keys of which `mask` tells the visible -> `[B, H, D]`.

    The query heads of one key head stand in for query positions, so that keys need not be repeated.
    """
    num_sequences, num_heads, head_size = q_BHD.shape
    q_BKGD = q_BHD.reshape(num_sequences, k_BKSD.shape[1], -1, head_size)
    out_BKGD = nn.functional.scaled_dot_product_attention(
        q_BKGD, k_BKSD, v_BKSD, attn_mask=mask_BS[:, None, None, :], scale=rule.scale
    )
    return out_BKGD.reshape(num_sequences, num_heads, -1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    at_L = torch.arange(length, device=device)
    distance_LL = at_L[:, None] - at_L[None, :]
    return (distance_LL >= 0) & (distance_LL < window)
