"""Attention over packed rows, registered with transformers so that any architecture calls it.

A pass is described by a `PassLayout` on the router below; the model hands over queries, keys and values of one packed
row `[1, heads, T, D]`. Three kinds of pass: training (each sequence attends to itself), prefill (the same, and keys and
values go into the cache), decode (one row per sequence, which attends to its cached tokens).
"""

# T packed token, B sequence of a padded block, L its length, H query head, K key head, D head size

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tinsmith.engine.kv_cache import CachePlan, KVCache
from tinsmith.types.errors import Unsupported

ATTENTION = "tinsmith_packed"
_MAX_PADDING = 1.25
"""Sequences share a padded block while the longest is at most this much longer than the shortest."""


@dataclass(frozen=True, slots=True)
class SequenceBlock:
    """Sequences of similar length, computed together as `[B, L]` with padding at the end."""

    num_sequences: int
    length: int
    rows_N: Tensor
    """Packed rows of the real tokens, int64 `[N]`."""
    cells_N: Tensor | None
    """Their places among the B * L cells; `None` if the block is full and its rows are consecutive."""


@dataclass(frozen=True, slots=True)
class PassLayout:
    """How the rows of one pass form sequences, and where their keys and values are kept."""

    blocks: tuple[SequenceBlock, ...] = ()
    cache: KVCache | None = None
    plan: CachePlan | None = None
    is_decode: bool = False


def plan_blocks(lengths: list[int], device: torch.device) -> tuple[SequenceBlock, ...]:
    """Group packed sequences of these lengths (in packed order) into padded blocks."""
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    blocks, group = [], by_length[:1]
    for index in by_length[1:]:
        if lengths[index] > lengths[group[0]] * _MAX_PADDING + 1:
            blocks.append(_block(sorted(group), lengths, starts, device))
            group = []
        group.append(index)
    blocks.append(_block(sorted(group), lengths, starts, device))
    return tuple(blocks)


def _block(group: list[int], lengths: list[int], starts: list[int], device: torch.device) -> SequenceBlock:
    longest = max(lengths[i] for i in group)
    rows_N = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in group])
    is_full = all(lengths[i] == longest for i in group)
    if is_full and int(rows_N[-1] - rows_N[0]) + 1 == len(rows_N):
        return SequenceBlock(len(group), longest, rows_N.to(device), None)
    cells_N = torch.cat([torch.arange(b * longest, b * longest + lengths[i]) for b, i in enumerate(group)])
    return SequenceBlock(len(group), longest, rows_N.to(device), cells_N.to(device))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: PassLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`query [1, H, T, D]`, `key`, `value [1, K, T, D]` -> `[1, T, H, D]`."""
    if softcap is not None or s_aux is not None:
        raise Unsupported("attention with logit soft-capping or sinks is not supported by this engine")
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    if packing.cache is not None and packing.plan is not None:
        packing.cache.write(_layer(module), packing.plan, k_TKD, v_TKD)
    if packing.is_decode:
        assert packing.cache is not None
        assert packing.plan is not None
        out_THD = _decode(_layer(module), q_THD, packing.cache, packing.plan, scaling, sliding_window)
    else:
        out_THD = _self_attention(q_THD, k_TKD, v_TKD, packing.blocks, scaling, sliding_window)
    return out_THD.unsqueeze(0), None


def _layer(module: nn.Module) -> int:
    layer = module.layer_idx
    assert isinstance(layer, int)
    return layer


def _self_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    blocks: tuple[SequenceBlock, ...],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    outputs = []
    for block in blocks:
        q, k, v = (_Pad.apply(x, block) for x in (q_THD, k_TKD, v_TKD))
        mask = _window_mask(block.length, window, q.device) if window and window < block.length else None
        out_BHLD = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out_BHLD.transpose(1, 2))
    result: Tensor = _Unpad.apply(blocks, q_THD.shape[0], *outputs)
    return result


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    at_L = torch.arange(length, device=device)
    distance_LL = at_L[:, None] - at_L[None, :]
    return (distance_LL >= 0) & (distance_LL < window)


class _Pad(torch.autograd.Function):
    """Rows `[T, X, D]` of a block's tokens -> `[B, X, L, D]`, zeros in the padding."""

    @staticmethod
    def forward(ctx, x_TXD, block):  # type: ignore[no-untyped-def]
        ctx.block, ctx.num_rows = block, x_TXD.shape[0]
        return _pad(x_TXD, block).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad_BXLD):  # type: ignore[no-untyped-def]
        grad = grad_BXLD.transpose(1, 2)
        return _unpad_into(grad.new_zeros(ctx.num_rows, *grad.shape[2:]), grad, ctx.block), None


class _Unpad(torch.autograd.Function):
    """The inverse for all blocks: `[B, L, X, D]` each -> one `[T, X, D]`."""

    @staticmethod
    def forward(ctx, blocks, num_rows, *outputs):  # type: ignore[no-untyped-def]
        ctx.blocks = blocks
        result = outputs[0].new_empty(num_rows, *outputs[0].shape[2:])
        for block, output in zip(blocks, outputs, strict=True):
            _unpad_into(result, output, block)
        return result

    @staticmethod
    def backward(ctx, grad_TXD):  # type: ignore[no-untyped-def]
        return None, None, *(_pad(grad_TXD, block) for block in ctx.blocks)


def _pad(x_TXD: Tensor, block: SequenceBlock) -> Tensor:
    if block.cells_N is None:
        start = int(block.rows_N[0])
        rows = x_TXD[start : start + len(block.rows_N)]
        return rows.reshape(block.num_sequences, block.length, *x_TXD.shape[1:])
    cells = x_TXD.new_zeros(block.num_sequences * block.length, *x_TXD.shape[1:])
    cells.index_copy_(0, block.cells_N, x_TXD.index_select(0, block.rows_N))
    return cells.view(block.num_sequences, block.length, *x_TXD.shape[1:])


def _unpad_into(result_TXD: Tensor, padded_BLXD: Tensor, block: SequenceBlock) -> Tensor:
    cells = padded_BLXD.reshape(block.num_sequences * block.length, *padded_BLXD.shape[2:])
    if block.cells_N is not None:
        cells = cells.index_select(0, block.cells_N)
    return result_TXD.index_copy_(0, block.rows_N, cells)


def _decode(
    layer: int, q_BHD: Tensor, cache: KVCache, plan: CachePlan, scaling: float | None, window: int | None
) -> Tensor:
    """One query row per sequence over its cached keys. Query heads of one key head stand in for query positions."""
    k_BKLD, v_BKLD = cache.read(layer, plan)
    mask_BL = plan.valid_BL
    if window:
        mask_BL = mask_BL & (plan.ages_BL < window)
    num_sequences, num_heads, head_size = q_BHD.shape
    q = q_BHD.reshape(num_sequences, k_BKLD.shape[1], -1, head_size)
    out = nn.functional.scaled_dot_product_attention(
        q, k_BKLD, v_BKLD, attn_mask=mask_BL[:, None, None, :], scale=scaling
    )
    return out.reshape(num_sequences, num_heads, -1)


AttentionInterface.register(ATTENTION, packed_attention)
