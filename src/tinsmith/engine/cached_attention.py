"""New tokens attending to what the key-value cache holds of their sequences."""

# B sequence, L cached token (padded), H query head, K key head, D head size

from __future__ import annotations

from torch import Tensor

from tinsmith.engine.attend import ScoreRule, attend_grouped
from tinsmith.engine.kv_cache import CachePlan, KVCache


def decode_attention(layer: int, q_BHD: Tensor, cache: KVCache, plan: CachePlan, rule: ScoreRule) -> Tensor:
    """One query row per sequence over its cached keys `[B, H, D]` -> `[B, H, D]`."""
    k_BKLD, v_BKLD = cache.read(layer, plan)
    mask_BL = plan.valid_BL
    if rule.window:
        mask_BL = mask_BL & (plan.ages_BL < rule.window)
    return attend_grouped(q_BHD, k_BKLD, v_BKLD, mask_BL, rule)
