"""Causal attention of short sequences on a CPU, with a backward pass made of batched matrix products.

torch's own CPU kernel is fast forward, but its backward pass walks tile by tile; for sequences of a few hundred tokens
the written-out formula (Dao et al., arXiv 2205.14135, section B.4, without tiles) is several times faster:

    P = exp(scale q k^T - normalizer)     dV = P^T dO      D = rowsum(dO * O)
    dS = P * (dO V^T - D) * scale         dQ = dS K        dK = dS^T Q

Query heads that share a key head are folded into query positions, so their sums come with the products.
"""

# B sequence, L position, H query head, K key head, G query heads per key head, D head size, N = B * K

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LENGTH = 256
"""Longer sequences hold too many scores at once, and torch's kernel has caught up."""


def is_short(q_BHLD: Tensor, v_BKLD: Tensor) -> bool:
    """Whether `short_attention` is the better choice for a pass that will go backward."""
    return (
        q_BHLD.device.type == "cpu"
        and torch.is_grad_enabled()
        and 1 < q_BHLD.shape[2] <= _MAX_LENGTH
        and q_BHLD.shape[3] == v_BKLD.shape[3]
    )


def short_attention(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, scale: float | None) -> Tensor:
    """softmax(q k^T * scale + causal mask) v -> `[B, H, L, D]`; `scale` `None` is 1 / sqrt(D)."""
    result: Tensor = _ShortAttention.apply(q_BHLD, k_BKLD, v_BKLD, q_BHLD.shape[3] ** -0.5 if scale is None else scale)
    return result


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHLD, k_BKLD, v_BKLD, scale):  # type: ignore[no-untyped-def]
        out_BHLD, normalizer_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHLD, k_BKLD, v_BKLD, 0.0, True, scale=scale
        )
        ctx.save_for_backward(q_BHLD, k_BKLD, v_BKLD, out_BHLD, normalizer_BHL)
        ctx.scale = scale
        return out_BHLD

    @staticmethod
    def backward(ctx, grad_BHLD):  # type: ignore[no-untyped-def]
        q_BHLD, k_BKLD, v_BKLD, out_BHLD, normalizer_BHL = ctx.saved_tensors
        num_sequences, num_heads, length, head_size = q_BHLD.shape
        num_keys = num_sequences * k_BKLD.shape[1]
        folded = (num_keys, num_heads // k_BKLD.shape[1] * length, head_size)
        q, grad, out = (x.reshape(folded) for x in (q_BHLD, grad_BHLD, out_BHLD))
        k, v = (x.reshape(num_keys, length, head_size) for x in (k_BKLD, v_BKLD))

        # scores in fp32: their exponentials would magnify a low-precision rounding
        scores = torch.bmm(q.float(), k.float().transpose(1, 2)).mul_(ctx.scale)
        scores.sub_(normalizer_BHL.reshape(num_keys, -1, 1))
        scores.view(num_keys, -1, length, length).masked_fill_(_future(length), float("-inf"))
        p = scores.exp_()
        slope = torch.bmm(grad, v.transpose(1, 2)).float()
        slope.sub_((grad.float() * out.float()).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
        p, slope = p.to(q.dtype), slope.to(q.dtype)
        grad_q = torch.bmm(slope, k).view(q_BHLD.shape)
        grad_k = torch.bmm(slope.transpose(1, 2), q).view(k_BKLD.shape)
        grad_v = torch.bmm(p.transpose(1, 2), grad).view(v_BKLD.shape)
        return grad_q, grad_k, grad_v, None


def _future(length: int) -> Tensor:
    """True where a key lies after its query."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)
