"""Base products over weights laid out beforehand."""

from __future__ import annotations

import torch

from tinsmith.engine.packed_weights import FrozenLinear, PackingBudget


def test_weights_laid_out_beforehand_multiply_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, bias_O, x_TI = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((96, 64), (96,), (20, 64))
    )
    linear = FrozenLinear(weight_OI, bias_O, PackingBudget())
    wanted = x_TI.double() @ weight_OI.double().T + bias_O.double()
    with torch.inference_mode():
        for _ in range(5):
            assert float((linear(x_TI).double() - wanted).abs().max() / wanted.abs().max()) <= 2**-8
    assert (linear._packed is None) == (PackingBudget().pack(weight_OI) is None)


def test_without_a_budget_nothing_is_laid_out_and_results_never_change() -> None:
    weight_OI, x_TI = torch.randn(96, 64).bfloat16(), torch.randn(20, 64).bfloat16()
    linear = FrozenLinear(weight_OI, None, PackingBudget(is_open=False))
    with torch.inference_mode():
        assert all(torch.equal(linear(x_TI), torch.nn.functional.linear(x_TI, weight_OI)) for _ in range(5))
    assert linear._packed is None
