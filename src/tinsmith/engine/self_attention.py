"""Packed sequences attending to themselves: training, and prompts that start from nothing.

Sequences of similar length are computed together as one padded block; padding lies behind every real token, where a
causal mask hides it.
"""

# T packed token, B sequence of a padded block, L its length, N real token, H query head, K key head, D head size

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinsmith.engine.attend import ScoreRule, attend
from tinsmith.engine.kernels import FusedKernels
from tinsmith.engine.tiled_attention import attention_backward, attention_forward

_GROUPED_UP_TO = 192
"""On a CPU longer sequences are blocks of their own: there, padding and copying cost more than calls."""
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

    def view(self, x_TXD: Tensor) -> Tensor | None:
        """The block's rows as `[B, L, X, D]` without a copy, where they lie so."""
        if self.cells_N is not None or not x_TXD.is_contiguous():
            return None
        start = int(self.rows_N[0])
        rows = x_TXD[start : start + self.num_sequences * self.length]
        return rows.view(self.num_sequences, self.length, *x_TXD.shape[1:])


def plan_blocks(lengths: list[int], device: torch.device) -> tuple[SequenceBlock, ...]:
    """Group packed sequences of these lengths (in packed order) into padded blocks."""
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    blocks, group = [], by_length[:1]
    for index in by_length[1:]:
        is_alone = device.type == "cpu" and lengths[index] > _GROUPED_UP_TO
        if is_alone or lengths[index] > lengths[group[0]] * _MAX_PADDING + 1:
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


def self_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    blocks: tuple[SequenceBlock, ...],
    rule: ScoreRule,
    kernels: FusedKernels,
) -> Tensor:
    """`q [T, H, D]`, `k`, `v [T, K, D]` -> `[T, H, D]`. `kernels` serve a pass on a CPU that will go backward."""
    if q_THD.device.type == "cpu" and torch.is_grad_enabled():
        trained: Tensor = _TrainedAttention.apply(q_THD, k_TKD, v_TKD, blocks, rule, kernels)
        return trained
    outputs = []
    for block in blocks:
        q, k, v = (_Pad.apply(x, block) for x in (q_THD, k_TKD, v_TKD))
        outputs.append(attend(q, k, v, rule).transpose(1, 2))
    result: Tensor = _Unpad.apply(blocks, q_THD.shape[0], *outputs)
    return result


class _TrainedAttention(torch.autograd.Function):
    """All blocks in one function: gradients of slices would each cost a buffer of all rows, and an addition."""

    @staticmethod
    def forward(ctx, q_THD, k_TKD, v_TKD, blocks, rule, kernels):  # type: ignore[no-untyped-def]
        out_THD = q_THD.new_empty(*q_THD.shape[:2], v_TKD.shape[2])
        normalizers = []
        for block in blocks:
            q, k, v = (_pad(x, block).transpose(1, 2) for x in (q_THD, k_TKD, v_TKD))
            out, normalizer = attention_forward(q, k, v, rule)
            _unpad_into(out_THD, out.transpose(1, 2), block)
            normalizers.append(normalizer)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, *normalizers)
        ctx.blocks, ctx.rule, ctx.kernels = blocks, rule, kernels
        return out_THD

    @staticmethod
    def backward(ctx, grad_THD):  # type: ignore[no-untyped-def]
        q_THD, k_TKD, v_TKD, out_THD, *normalizers = ctx.saved_tensors
        mean_TH1 = ctx.kernels.row_dots(grad_THD.contiguous(), out_THD.detach())
        totals = [torch.empty(x.shape, dtype=x.dtype) for x in (q_THD, k_TKD, v_TKD)]
        for block, normalizer in zip(ctx.blocks, normalizers, strict=True):
            q, k, v, mean, grad = (_pad(x, block).transpose(1, 2) for x in (q_THD, k_TKD, v_TKD, mean_TH1, grad_THD))
            parts = [block.view(total) for total in totals]
            grads = [
                x.new_empty(x.shape) if part is None else part.transpose(1, 2)
                for part, x in zip(parts, (q, k, v), strict=True)
            ]
            attention_backward(grads, (q, k, v), normalizer, mean, grad, ctx.rule, ctx.kernels)
            for total, part, own in zip(totals, parts, grads, strict=True):
                if part is None:
                    _unpad_into(total, own.transpose(1, 2), block)
        return *totals, None, None, None


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
    if (rows := block.view(result_TXD)) is not None:
        rows.copy_(padded_BLXD)
        return result_TXD
    cells = padded_BLXD.reshape(block.num_sequences * block.length, *padded_BLXD.shape[2:])
    if block.cells_N is not None:
        cells = cells.index_select(0, block.cells_N)
    return result_TXD.index_copy_(0, block.rows_N, cells)
