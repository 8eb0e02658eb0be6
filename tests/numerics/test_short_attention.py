"""Attention of short sequences against the formula in fp64."""

from __future__ import annotations

import pytest
import torch

from tinsmith.engine.short_attention import short_attention


@pytest.mark.parametrize(("heads", "key_heads", "length"), [(4, 4, 2), (6, 2, 17), (4, 1, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_output_and_gradients_equal_the_formula(
    heads: int, key_heads: int, length: int, dtype: torch.dtype, tolerance: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, heads, length, 8), (3, key_heads, length, 8), (3, key_heads, length, 8), (3, heads, length, 8)]
    # transposed in memory, as the engine hands them over
    *qkv, grad = (torch.randn(b, n, h, d, generator=rng).to(dtype).transpose(1, 2) for b, h, n, d in shapes)
    ours = [t.clone().requires_grad_() for t in qkv]
    out = short_attention(*ours, 0.3)
    out.backward(grad)

    wide = [t.double().requires_grad_() for t in qkv]
    q, k, v = wide[0], *(t.repeat_interleave(heads // key_heads, dim=1) for t in wide[1:])
    scores = (q @ k.transpose(2, 3)) * 0.3
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    expected = scores.softmax(-1) @ v
    expected.backward(grad.double())
    for got, reference in [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, wide, strict=True))]:
        assert float((got.detach() - reference.detach()).norm() / reference.detach().norm()) < tolerance
