"""The fused functions against autograd through the plain formulas, and a bfloat16 engine that uses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as common_rotation

from tests.numerics.driver import Driver, item, plain_model, random_datum
from tinsmith.engine import kernels as functions
from tinsmith.engine.fused import FusedRMSNorm, _Gate, _rotated, fuse_rotations
from tinsmith.engine.kernels import FusedKernels


@pytest.fixture(scope="module")
def compiled() -> FusedKernels:
    kernels = FusedKernels()
    thread = kernels.compile_in_background(32, torch.bfloat16)
    if thread is None:
        pytest.skip("there is no C++ compiler")
    thread.join(timeout=240)
    assert kernels.is_compiled
    return kernels


def test_plain_functions_equal_autograd_in_fp64() -> None:
    rng = torch.Generator().manual_seed(0)
    x, w, gate, up, grad = (
        torch.randn(s, generator=rng, dtype=torch.float64) for s in [(9, 32), (32,)] + [(9, 32)] * 3
    )
    x64, gate64, up64 = (t.clone().requires_grad_() for t in (x, gate, up))
    reference = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + 1e-6) * w
    reference.backward(grad)
    y, scale = functions.norm_forward(x.float(), w.float(), 1e-6)
    assert float((y - reference.detach()).abs().max()) < 1e-5
    assert float((functions.norm_backward(grad.float(), x.float(), w.float(), scale) - x64.grad).abs().max()) < 1e-5
    product = torch.nn.functional.silu(gate64) * up64
    product.backward(grad)
    assert float((functions.gate_forward(gate.float(), up.float()) - product.detach()).abs().max()) < 1e-5
    for ours, theirs in zip(
        functions.gate_backward(grad.float(), gate.float(), up.float()), (gate64, up64), strict=True
    ):
        assert float((ours - theirs.grad).abs().max()) < 1e-5


def test_compiled_functions_agree_with_the_plain_ones(compiled: FusedKernels) -> None:
    plain = FusedKernels()
    for rows in (1, 7, 64):
        x, y, g = (torch.randn(rows, 32, dtype=torch.bfloat16) for _ in range(3))
        norm = torch.nn.Module()
        norm.weight, norm.variance_epsilon = torch.nn.Parameter(torch.rand(32).bfloat16(), requires_grad=False), 1e-6
        results = []
        for kernels in (plain, compiled):
            a, b, c = (t.clone().requires_grad_() for t in (x, x, y))
            FusedRMSNorm(norm, kernels)(a).backward(g)
            _Gate.apply(b, c, kernels).backward(g)
            results.append([t.grad.float() for t in (a, b, c)])
        for ours, theirs in zip(*results, strict=True):
            assert float((ours - theirs).abs().max()) <= 0.02 * float(theirs.abs().max())


def test_nothing_is_compiled_while_the_engine_works(qwen_folder: Path) -> None:
    driver, rng = Driver(qwen_folder, dtype="bfloat16"), np.random.default_rng(1)
    base = driver.engine._base
    thread = base.kernels.compile_in_background(32, torch.bfloat16)
    if thread is None:
        pytest.skip("there is no C++ compiler")
    thread.join(timeout=240)
    driver.create("m")
    assert base._is_fused
    assert all("forward" in vars(layer.self_attn) for layer in base._model.model.layers)
    assert sum(isinstance(module, FusedRMSNorm) for module in base._model.modules()) == 2 * 4 + 1
    counters.clear()
    for lengths in ([3], [40, 7, 9], [1], [60] * 5):
        driver.train(item("m", *(random_datum(rng, n) for n in lengths)))
        driver.train(item("m", *(random_datum(rng, n) for n in lengths), forward_only=True))
    for samples in (1, 2, 7):
        driver.sample([1, 2, 3], num_samples=samples, max_tokens=5)
    assert counters["stats"]["unique_graphs"] == 0


def test_a_bfloat16_engine_trains_like_a_float32_one(qwen_folder: Path) -> None:
    rng = np.random.default_rng(0)
    data = [random_datum(rng, int(n)) for n in rng.integers(5, 60, 12)]
    grads, losses = [], []
    for dtype in ("float32", "bfloat16"):
        driver = Driver(qwen_folder, dtype=dtype)
        driver.create("m")
        (output,) = driver.train(item("m", *data))
        grads.append(driver.grads("m"))
        losses.append(output.loss_sum)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert np.linalg.norm(grads[1] - grads[0]) / np.linalg.norm(grads[0]) < 0.1


def test_rotations_are_replaced_where_they_are_the_common_ones(qwen_folder: Path) -> None:
    model = plain_model(qwen_folder)
    attention = model.model.layers[0].self_attn
    before = type(attention).forward.__globals__["apply_rotary_pos_emb"]
    assert fuse_rotations(model, FusedKernels()) == 2
    assert attention.forward.__func__.__globals__["apply_rotary_pos_emb"] is not before
    assert type(attention).forward.__globals__["apply_rotary_pos_emb"] is before


def test_look_alike_rotation_stays() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> object:
            return apply_rotary_pos_emb(q, q, q, q)

    attention = Attention()
    assert fuse_rotations(attention, FusedKernels()) == 0
    assert "forward" not in vars(attention)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of neighbours, not of halves."""
    turned = (torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) for x in (q, k))
    q_turned, k_turned = turned
    return q * cos + q_turned * sin, k * cos + k_turned * sin


def test_rotation_equals_the_models_own_forward_and_backward(compiled: FusedKernels) -> None:
    rng = torch.Generator().manual_seed(0)
    # sine and cosine of the two halves differ: the backward pass must not assume otherwise
    q, grad = (torch.randn(50, 6, 24, generator=rng).bfloat16() for _ in range(2))
    cos, sin = (torch.randn(50, 24, generator=rng).bfloat16() for _ in range(2))
    wide = q.double().transpose(0, 1)[None].requires_grad_()
    expected, _ = common_rotation(wide, wide, cos.double()[None], sin.double()[None])
    expected.backward(grad.double().transpose(0, 1)[None])
    for kernels in (FusedKernels(), compiled):
        x = q.transpose(0, 1)[None].clone().requires_grad_()
        y = _rotated(x, cos, sin, kernels)
        y.backward(grad.transpose(0, 1)[None])
        assert float((y.detach() - expected.detach()).norm() / expected.detach().norm()) < 0.005
        assert float((x.grad - wide.grad).norm() / wide.grad.norm()) < 0.005


def test_compiled_tiles_agree_with_the_plain_ones(compiled: FusedKernels) -> None:
    rng = torch.Generator().manual_seed(0)
    for shape in ((6, 20, 36), (2, 7, 7), (1, 5, 9)):
        scores, dots = (torch.randn(shape, generator=rng) for _ in range(2))
        normalizer = scores.logsumexp(-1, keepdim=True)
        mean, mask = torch.randn(*shape[:2], 1, generator=rng), torch.zeros(shape[1:])
        mask[0, 1:] = -1e30
        arguments = (dots.bfloat16(), normalizer, mean, mask, torch.tensor(0.7))
        with torch.no_grad():
            for got, expected in zip(
                compiled.tile_slopes(scores.clone(), *arguments),
                FusedKernels().tile_slopes(scores.clone(), *arguments),
                strict=True,
            ):
                assert float((got.float() - expected.float()).abs().max()) <= 0.01 * float(expected.abs().max())
                assert not got[:, 0, 1:].any()
