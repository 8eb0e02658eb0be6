"""The fused functions against autograd through the plain formulas, and a bfloat16 engine that uses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.numerics.driver import Driver, item, random_datum
from tinsmith.engine import fused
from tinsmith.engine.fused import FusedKernels, FusedRMSNorm, _Gate


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
    y, scale = fused.norm_forward(x.float(), w.float(), 1e-6)
    assert float((y - reference.detach()).abs().max()) < 1e-5
    assert float((fused.norm_backward(grad.float(), x.float(), w.float(), scale) - x64.grad).abs().max()) < 1e-5
    product = torch.nn.functional.silu(gate64) * up64
    product.backward(grad)
    assert float((fused.gate_forward(gate.float(), up.float()) - product.detach()).abs().max()) < 1e-5
    for ours, theirs in zip(fused.gate_backward(grad.float(), gate.float(), up.float()), (gate64, up64), strict=True):
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
