"""Attention with its backward pass in tiles, against the formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tinsmith.engine import tiled_attention
from tinsmith.engine.attend import ScoreRule
from tinsmith.engine.kernels import FusedKernels
from tinsmith.engine.self_attention import plan_blocks, self_attention

TOLERANCES = [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])
RULES = {
    "plain": ScoreRule(),
    "scaled": ScoreRule(scale=0.3),
    "window": ScoreRule(scale=0.3, window=5),
    "softcap": ScoreRule(scale=0.3, softcap=1.5),
    "sinks": ScoreRule(scale=0.3, sinks_H=SINKS),
    "window and sinks": ScoreRule(scale=0.3, window=3, sinks_H=SINKS),
    "window and softcap": ScoreRule(window=7, softcap=2.0),
}


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of some tens of tokens meet every kind of tile."""
    monkeypatch.setattr(tiled_attention, "_TILE_QUERIES", 8)
    monkeypatch.setattr(tiled_attention, "_TILE_KEYS", 12)
    monkeypatch.setattr(tiled_attention, "_SCORES_AT_ONCE", 8 * 12 * 6 * 2)


def reference(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: list[int], rule: ScoreRule) -> Tensor:
    """Sequence by sequence, all scores written out."""
    repeats = q_THD.shape[1] // k_TKD.shape[1]
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (q_THD, k_TKD, v_TKD)), strict=True):
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (rule.scale or q.shape[2] ** -0.5)
        if rule.softcap is not None:
            scores = torch.tanh(scores / rule.softcap) * rule.softcap
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (distance < 0) | (distance >= (rule.window or len(q)))
        scores = scores.masked_fill(hidden, float("-inf"))
        if rule.sinks_H is not None:
            sinks = rule.sinks_H.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat([scores, sinks], dim=2)
        weights = scores.softmax(-1)[..., : len(q)]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def relative_errors(
    lengths: list[int], heads: int, key_heads: int, rule: ScoreRule, dtype: torch.dtype, sizes: tuple[int, int] = (8, 8)
) -> list[float]:
    """Of the output and of the three gradients."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(heads, sizes[0]), (key_heads, sizes[0]), (key_heads, sizes[1]), (heads, sizes[1])]
    *qkv, grad = (torch.randn(n, sum(lengths), d, generator=rng).to(dtype).transpose(0, 1) for n, d in shapes)
    ours = [x.clone().requires_grad_() for x in qkv]
    out = self_attention(*ours, plan_blocks(lengths, torch.device("cpu")), rule, FusedKernels())
    out.backward(grad)
    wide = [x.double().requires_grad_() for x in qkv]
    expected = reference(*wide, lengths, rule)
    expected.backward(grad.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, wide, strict=True))]
    return [float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_output_and_gradients_equal_the_formula(rule: ScoreRule, dtype: torch.dtype, tolerance: float) -> None:
    assert max(relative_errors([2, 30, 17, 33, 16, 31], 6, 2, rule, dtype)) < tolerance


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (4, 1)])
@pytest.mark.parametrize("lengths", [[1], [2], [25], [9, 9, 9, 1]])
def test_any_shape_equals_the_formula(heads: int, key_heads: int, lengths: list[int]) -> None:
    assert max(relative_errors(lengths, heads, key_heads, ScoreRule(scale=0.4), torch.float32)) < 2e-5


def test_values_may_be_narrower_than_keys() -> None:
    assert max(relative_errors([20, 5], 4, 2, ScoreRule(), torch.float32, sizes=(12, 8))) < 2e-5


@pytest.mark.parametrize("rule", [ScoreRule(), ScoreRule(window=300)], ids=["plain", "window"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_long_sequences_equal_the_formula(rule: ScoreRule, dtype: torch.dtype, tolerance: float) -> None:
    assert max(relative_errors([700, 130], 2, 1, rule, dtype)) < tolerance


def test_no_more_than_a_tile_of_scores_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain = torch.bmm

    def watched(*arguments: Any, **keywords: Any) -> Tensor:
        nonlocal largest
        product = plain(*arguments, **keywords)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch, "bmm", watched)
    relative_errors([1500] * 5, 4, 2, ScoreRule(window=1200), torch.float32)
    assert largest <= 2**20
