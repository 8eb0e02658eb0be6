"""Attention over packed rows, registered with transformers so that any architecture calls it.

A pass is described by a `PassLayout`, which travels through the model as a keyword; the model hands over queries, keys
and values of one packed row `[1, heads, T, D]`. Without a cache all sequences attend to themselves (training). With
one, all new keys and values go into it; rows whose sequences began in an earlier pass, be they chunks of a prompt or
the newest tokens of running samples, attend to what it holds.
"""

# T packed token, H query head, K key head, D head size

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from tinsmith.engine.attend import ScoreRule
from tinsmith.engine.cache_plan import CachePlan
from tinsmith.engine.cached_attention import decode_attention
from tinsmith.engine.kernels import FusedKernels
from tinsmith.engine.kv_cache import KVCache
from tinsmith.engine.self_attention import SequenceBlock, self_attention
from tinsmith.types.errors import Unsupported

ATTENTION = "tinsmith_packed"


@dataclass(frozen=True, slots=True)
class PassLayout:
    """How the rows of one pass form sequences, and where their keys and values are kept."""

    blocks: tuple[SequenceBlock, ...] = ()
    """Sequences that start in this pass and attend to themselves; with a cache, they are the first packed rows."""
    cache: KVCache | None = None
    plan: CachePlan | None = None
    """Where all rows are kept, and the rows whose sequences began in an earlier pass."""
    kernels: FusedKernels = field(default_factory=FusedKernels)
    """What the backward pass computes with."""


@dataclass(slots=True)
class CurrentPass:
    """The layout of the pass that runs now, for architectures that lose keywords on the way to their attention."""

    layout: PassLayout = PassLayout()

    def attach(self, model: nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.current_pass = self  # type: ignore[assignment]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: PassLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`query [1, H, T, D]`, `key`, `value [1, K, T, D]` -> `[1, T, H, D]`. `s_aux [H]` holds the sinks' scores.

    Raises `Unsupported` for scores with both caps and sinks.
    """
    if packing is None:
        packing = _current_pass(module).layout
    if softcap is not None and s_aux is not None:
        raise Unsupported("attention with both soft-capped scores and sinks is not supported")
    rule = ScoreRule(scaling, sliding_window, softcap, s_aux)
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    cache, plan = packing.cache, packing.plan
    if cache is None or plan is None:
        return self_attention(q_THD, k_TKD, v_TKD, packing.blocks, rule, packing.kernels).unsqueeze(0), None
    cache.write(_layer(module), plan.slots_T, k_TKD, v_TKD)
    if (tile := plan.only_tile(rule)) is not None:
        return decode_attention(_layer(module), q_THD, cache, tile, rule).unsqueeze(0), None
    if packing.blocks:
        out_THD = self_attention(q_THD, k_TKD, v_TKD, packing.blocks, rule, packing.kernels)
    else:
        out_THD = q_THD.new_empty(*q_THD.shape[:2], v_TKD.shape[-1])
    plan.attend(_layer(module), q_THD, cache, rule, out_THD)
    return out_THD.unsqueeze(0), None


def _current_pass(module: nn.Module) -> CurrentPass:
    current = module.current_pass
    assert isinstance(current, CurrentPass)
    return current


def _layer(module: nn.Module) -> int:
    layer = module.layer_idx
    assert isinstance(layer, int)
    return layer


AttentionInterface.register(ATTENTION, packed_attention)
