"""The optimizer step against fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.numerics.driver import Driver, item, random_datum
from tinsmith.engine.adapter import Adapter, optim_steps
from tinsmith.engine.lora import LoraLayout, LoraSite
from tinsmith.types import AdamParams
from tinsmith.types.operations import LoraSpec


def wide_adapter(num_parameters: int) -> Adapter:
    site = LoraSite("model.layers.0.self_attn.o_proj", "attn", num_parameters - 1, 1)
    return Adapter("m", LoraLayout((site,), LoraSpec(rank=1, seed=0)), torch.device("cpu"))


def test_the_norm_of_many_gradients_is_exact() -> None:
    """One sum over millions of squares in fp32 would stop growing: 0.7 % are missing or too much at this size."""
    adapter = wide_adapter(2**23)
    adapter.grads_P.fill_(0.1)
    adapter.num_pending = 1
    (metrics,) = optim_steps([(adapter, AdamParams())])
    assert isinstance(metrics, dict)
    assert metrics["grad_norm:mean"] == pytest.approx(float(np.float32(0.1)) * 2**11.5, rel=2e-5)


def test_without_epsilon_what_has_no_gradient_does_not_move(driver: Driver) -> None:
    """While B is zero, so is the gradient of A: 0 / 0 would be NaN in every weight of it."""
    driver.create("m")
    driver.train(item("m", random_datum(np.random.default_rng(0), 12)))
    before, grads = driver.weights("m").astype(np.float64), driver.grads("m")
    driver.step("m", eps=0.0, learning_rate=1e-3)
    assert (grads == 0).any()
    np.testing.assert_allclose(driver.weights("m"), before - 1e-3 * np.sign(grads), atol=1e-6, rtol=0)
