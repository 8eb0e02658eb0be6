"""Causal attention on a CPU with a backward pass made of batched matrix products over tiles.

torch's own CPU kernel is fast forward, but for sequences of some hundred tokens up to four times slower than these
products backward:

    P = exp(cap(scale q k^T) - normalizer)     dV = P^T dO      D = rowsum(dO * O)
    dS = P * (dO V^T - D) * cap' * scale       dQ = dS K        dK = dS^T Q

(Dao et al., arXiv 2205.14135, section B.4.) A tile is some queries by some keys; tiles that the mask hides are skipped,
and no more than a tile of scores is ever held. Query heads that share a key head are folded into query positions, so
their sums come with the products. Scores are in fp32: exponentials would magnify a low-precision rounding.
"""

# B sequence, L position, H query head, K key head, G query heads per key head, D head size,
# N = B * K, F = G * query of a tile, S key of a tile

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.attend import ScoreRule
from tinsmith.engine.kernels import FusedKernels

_TILE_QUERIES = 128
_TILE_KEYS = 512
_SIZE_STEP = 32
_SCORES_AT_ONCE = 2**20
"""Of several sequences together; 4 MB in fp32."""
_HIDDEN = -1e30
"""Added to the scores of keys that a query must not see. Finite: a row may be hidden from a whole tile."""


def attention_forward(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Output `[B, H, L, D]`, and log(sum(exp(scores))) `[B, H, L]` in fp32, sinks included."""
    num_sequences, num_heads, length, head_size = q_BHLD.shape
    if rule.is_plain and _window(rule, length) == length > 1 and head_size == v_BKLD.shape[3]:
        flash: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHLD, k_BKLD, v_BKLD, 0.0, True, scale=rule.scale
        )
        return flash
    out_BHLD = q_BHLD.new_empty(num_sequences, num_heads, length, v_BKLD.shape[3])
    normalizer_BHL = torch.empty(num_sequences, num_heads, length)
    for some in _sequences(q_BHLD):
        for queries in _query_tiles(length):
            out, normalizer = _query_tile_forward(q_BHLD[some], k_BKLD[some], v_BKLD[some], queries, rule)
            rows = normalizer_BHL[some, :, queries]
            rows.copy_(normalizer.view(rows.shape))
            out_BHLD[some, :, queries].copy_(out.view(*rows.shape, -1))
    return out_BHLD, normalizer_BHL


def attention_backward(
    grads: Sequence[Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    normalizer_BHL: Tensor,
    mean_BHL1: Tensor,
    grad_BHLD: Tensor,
    rule: ScoreRule,
    kernels: FusedKernels,
) -> None:
    """Write the gradients of queries `[B, H, L, D]`, keys and values `[B, K, L, D]` into `grads`.

    `mean` is rowsum(output * grad) in fp32. Sinks are frozen and have no gradient.
    """
    q_BHLD, k_BKLD, v_BKLD = qkv
    grad_q, grad_k, grad_v = grads
    num_key_heads, length = k_BKLD.shape[1:3]
    for some in _sequences(q_BHLD):
        k_NLD, v_NLD = k_BKLD[some].flatten(0, 1), v_BKLD[some].flatten(0, 1)
        tiles = _Tiles(k_NLD, v_NLD, rule, kernels, _scale(rule, q_BHLD))
        for queries in _query_tiles(length):
            q, grad, normalizer, mean = (
                _fold(x[some], num_key_heads, queries)
                for x in (q_BHLD, grad_BHLD, normalizer_BHL.unsqueeze(-1), mean_BHL1)
            )
            total = grad_q[some, :, queries]
            total.copy_(tiles.backward(q, grad, normalizer, mean, queries).view(total.shape))
        for total, tile_sum in ((grad_k[some], tiles.grad_k_NLD), (grad_v[some], tiles.grad_v_NLD)):
            total.copy_(tile_sum.view(total.shape))


class _Tiles:
    """Keys and values of some sequences, and their gradients as tile after tile adds to them."""

    def __init__(self, k_NLD: Tensor, v_NLD: Tensor, rule: ScoreRule, kernels: FusedKernels, scale: float) -> None:
        self.grad_k_NLD, self.grad_v_NLD = (torch.zeros(x.shape) for x in (k_NLD, v_NLD))
        self._k_NLD, self._v_NLD, self._wide_k_NLD = k_NLD, v_NLD, k_NLD.float()
        self._rule, self._kernels = rule, kernels
        self._scale = torch.tensor(scale)

    def backward(
        self, q_NFD: Tensor, grad_NFD: Tensor, normalizer_NF1: Tensor, mean_NF1: Tensor, queries: slice
    ) -> Tensor:
        """The gradient `[N, F, D]` of one tile of queries, in fp32."""
        wide_q_NFD, grad_q_NFD = q_NFD.float(), torch.zeros(q_NFD.shape)
        for keys in _key_tiles(queries, _window(self._rule, self._k_NLD.shape[1])):
            scores_NFS = torch.bmm(wide_q_NFD, self._wide_k_NLD[:, keys].transpose(1, 2))
            dots_NFS = torch.bmm(grad_NFD, self._v_NLD[:, keys].transpose(1, 2))
            scores, dots, normalizer, mean = (
                _per_head(x, queries) for x in (scores_NFS, dots_NFS, normalizer_NF1, mean_NF1)
            )
            p_XQS, slopes_XQS = self._slopes(scores, dots, normalizer, mean, _mask(queries, keys, self._rule.window))
            p_NFS, slopes_NFS = p_XQS.view(scores_NFS.shape), slopes_XQS.view(scores_NFS.shape)
            _add_product(grad_q_NFD, slopes_NFS, self._k_NLD[:, keys])
            _add_product(self.grad_k_NLD[:, keys], slopes_NFS.transpose(1, 2), q_NFD)
            _add_product(self.grad_v_NLD[:, keys], p_NFS.transpose(1, 2), grad_NFD)
        return grad_q_NFD

    def _slopes(self, scores: Tensor, dots: Tensor, normalizer: Tensor, mean: Tensor, mask_QS: Tensor) -> Any:
        softcap = self._rule.softcap
        if softcap is None:
            return self._kernels.tile_slopes(scores, dots, normalizer, mean, mask_QS, self._scale)
        squeezed = scores.mul_(self._scale / softcap).tanh_()
        p = (squeezed * softcap).sub_(normalizer).add_(mask_QS).exp_()
        slopes = (dots.float() - mean).mul_(p).mul_(1 - squeezed.square()).mul_(self._scale)
        return p.to(dots.dtype), slopes.to(dots.dtype)


def _query_tile_forward(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, queries: slice, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    """One tile of queries over its keys, tile after tile, with a running maximum -> `[N, F, D]`, `[N, F, 1]`."""
    q_NFD = _fold(q_BHLD, k_BKLD.shape[1], queries).float()
    high_NF1, sum_NF1 = _before_any_key(q_NFD, queries, q_BHLD.shape[0], rule)
    out_NFD = q_NFD.new_zeros(*q_NFD.shape[:2], v_BKLD.shape[3])
    for keys in _key_tiles(queries, _window(rule, q_BHLD.shape[2])):
        k_NSD, v_NSD = (x[:, :, keys].flatten(0, 1) for x in (k_BKLD, v_BKLD))
        scores_NFS = torch.bmm(q_NFD, k_NSD.float().transpose(1, 2)).mul_(_scale(rule, q_BHLD))
        if rule.softcap is not None:
            scores_NFS.div_(rule.softcap).tanh_().mul_(rule.softcap)
        _per_head(scores_NFS, queries).add_(_mask(queries, keys, rule.window))
        new_NF1 = torch.maximum(high_NF1, scores_NFS.amax(-1, keepdim=True))
        p_NFS = scores_NFS.sub_(new_NF1).exp_()
        shrink_NF1 = torch.exp(high_NF1 - new_NF1)
        sum_NF1 = sum_NF1 * shrink_NF1 + p_NFS.sum(-1, keepdim=True)
        out_NFD.mul_(shrink_NF1).add_(torch.bmm(p_NFS.to(v_NSD.dtype), v_NSD))
        high_NF1 = new_NF1
    return out_NFD.div_(sum_NF1).to(q_BHLD.dtype), high_NF1 + sum_NF1.log()


def _before_any_key(q_NFD: Tensor, queries: slice, num_sequences: int, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Highest score and sum of exponentials of the sinks alone, or of nothing."""
    shape = (*q_NFD.shape[:2], 1)
    if rule.sinks_H is None:
        return q_NFD.new_full(shape, _HIDDEN), q_NFD.new_zeros(shape)
    sinks_BHQ = rule.sinks_H.float()[None, :, None].expand(num_sequences, -1, queries.stop - queries.start)
    return sinks_BHQ.reshape(shape), q_NFD.new_ones(shape)


def _sequences(q_BHLD: Tensor) -> Iterator[slice]:
    """As many sequences at once as hold no more scores than allowed."""
    num_sequences, num_heads, length, _ = q_BHLD.shape
    scores_each = num_heads * min(length, _TILE_QUERIES) * min(length, _TILE_KEYS)
    size = max(1, _SCORES_AT_ONCE // scores_each)
    yield from _even_slices(0, num_sequences, size)


def _query_tiles(length: int) -> Iterator[slice]:
    yield from _even_slices(0, length, _TILE_QUERIES)


def _key_tiles(queries: slice, window: int) -> Iterator[slice]:
    """Over the keys that any of the queries sees."""
    yield from _even_slices(max(0, queries.start - window + 1), queries.stop, _TILE_KEYS)


def _even_slices(start: int, stop: int, most: int) -> Iterator[slice]:
    """Slices of similar sizes, not a full one and a sliver; matrix products like multiples of the step."""
    count = -(-(stop - start) // most)
    size = -(-(stop - start) // count)
    size = min(most, -(-size // _SIZE_STEP) * _SIZE_STEP)
    yield from (slice(low, min(low + size, stop)) for low in range(start, stop, size))


def _mask(queries: slice, keys: slice, window: int | None) -> Tensor:
    """`[Q, S]`, 0 where a query sees a key."""
    distance_QS = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(keys.start, keys.stop)
    hidden_QS = distance_QS < 0
    if window is not None:
        hidden_QS |= distance_QS >= window
    return torch.zeros(hidden_QS.shape).masked_fill_(hidden_QS, _HIDDEN)


def _fold(x_BHLD: Tensor, num_key_heads: int, queries: slice) -> Tensor:
    """`[N, F, D]`: the tile's queries of all heads that share a key head, contiguous."""
    tile = x_BHLD[:, :, queries]
    return tile.reshape(tile.shape[0] * num_key_heads, -1, tile.shape[3]).contiguous()


def _per_head(x_NFS: Tensor, queries: slice) -> Tensor:
    """`[X, Q, S]` with the tile's queries apart again."""
    return x_NFS.reshape(-1, queries.stop - queries.start, x_NFS.shape[2])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a batched product to an fp32 total. Low-precision factors are multiplied as they are and rounded once."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


def _scale(rule: ScoreRule, q_BHLD: Tensor) -> float:
    return float(q_BHLD.shape[3] ** -0.5) if rule.scale is None else rule.scale


def _window(rule: ScoreRule, length: int) -> int:
    return length if rule.window is None else min(rule.window, length)
