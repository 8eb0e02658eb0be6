"""Log-probabilities of packed rows against the plain transformers model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.numerics.driver import VOCAB, Driver, item, plain_model, random_datum
from tinsmith.types import Datum, ModelInput, TensorData


def test_log_probs_of_packed_datums_equal_the_plain_model(any_folder: Path) -> None:
    driver, plain, rng = (
        Driver(any_folder, max_micro_batch_tokens=64),
        plain_model(any_folder),
        np.random.default_rng(0),
    )
    driver.create("m")
    data = [random_datum(rng, int(n)) for n in [1, 2, 40, 7, 7, 7, 33, 90, 5]]
    (output,) = driver.train(item("m", *data, forward_only=True))
    for datum, result in zip(data, output.logprobs, strict=True):
        assert result.shape == [datum.model_input.length]
        assert np.abs(result.to_numpy() - reference_logprobs(plain, datum)).max() <= 1e-4


def test_k_targets_per_position_equal_the_plain_model(driver: Driver, qwen_folder: Path) -> None:
    rng = np.random.default_rng(1)
    plain = plain_model(qwen_folder)
    driver.create("m")
    tokens, targets = rng.integers(0, VOCAB, 12), rng.integers(0, VOCAB, (12, 3))
    weights = rng.random((12, 3)).astype(np.float32)
    datum = Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights})
    (output,) = driver.train(item("m", datum, random_datum(rng, 5)))
    expected = torch.log_softmax(plain(torch.tensor(tokens)[None]).logits[0], -1).gather(1, torch.tensor(targets))
    got = output.logprobs[0].to_numpy()
    assert got.shape == (12, 3)
    assert np.abs(got - expected.detach().numpy()).max() <= 1e-4
    second = output.logprobs[1].to_numpy()
    assert second.shape == (5,)


def test_sparse_targets_count_as_dense_ones(driver: Driver) -> None:
    rng = np.random.default_rng(2)
    driver.create("m")
    tokens = rng.integers(0, VOCAB, 6)
    dense_targets = np.zeros((6, 50), np.int64)
    dense_weights = np.zeros((6, 50), np.float32)
    dense_targets[np.arange(6), [0, 3, 9, 9, 20, 49]] = rng.integers(1, VOCAB, 6)
    dense_weights[np.arange(6), [0, 3, 8, 9, 20, 49]] = 1.5
    dense = {"target_tokens": dense_targets, "weights": dense_weights}
    sparse = {key: TensorData.from_torch_sparse(torch.from_numpy(value)) for key, value in dense.items()}
    assert sparse["target_tokens"].is_sparse
    from_dense, from_sparse = (
        driver.train(item("m", Datum(ModelInput.from_ints(tokens), inputs)))[0] for inputs in (dense, sparse)
    )
    assert from_sparse.metrics == from_dense.metrics
    assert np.array_equal(from_sparse.logprobs[0].to_numpy(), from_dense.logprobs[0].to_numpy())


@pytest.mark.parametrize("max_tokens", [1, 16, 50, 10_000])
def test_micro_batch_size_does_not_change_the_numbers(qwen_folder: Path, max_tokens: int) -> None:
    rng = np.random.default_rng(3)
    data = [random_datum(rng, int(n)) for n in rng.integers(1, 30, 12)]
    results = []
    for limit in (4096, max_tokens):
        driver = Driver(qwen_folder, max_micro_batch_tokens=limit)
        driver.create("m")
        driver.randomize("m")
        (output,) = driver.train(item("m", *data))
        results.append((output.loss_sum, driver.grads("m"), output.logprobs))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert relative(results[1][1], results[0][1]) <= 1e-5
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert np.abs(a.to_numpy() - b.to_numpy()).max() <= 1e-5


def test_datum_order_does_not_change_the_gradient(qwen_folder: Path) -> None:
    rng = np.random.default_rng(4)
    data = [random_datum(rng, int(n)) for n in rng.integers(1, 30, 10)]
    grads = []
    for order in (data, data[::-1]):
        driver = Driver(qwen_folder)
        driver.create("m")
        driver.randomize("m")
        driver.train(item("m", *order))
        grads.append(driver.grads("m"))
    assert relative(grads[1], grads[0]) <= 1e-5


def test_bfloat16_log_probs_are_not_rounded_to_bfloat16(qwen_folder: Path) -> None:
    rng = np.random.default_rng(5)
    datum = random_datum(rng, 60)
    results = []
    for dtype in ("float32", "bfloat16"):
        driver = Driver(qwen_folder, dtype=dtype)
        driver.create("m")
        results.append(driver.train(item("m", datum, forward_only=True))[0].logprobs[0].to_numpy())
    assert np.abs(results[1] - results[0]).mean() < 0.05
    rounded = torch.from_numpy(results[1]).bfloat16().float().numpy()
    assert (rounded != results[1]).mean() > 0.9


def reference_logprobs(plain: torch.nn.Module, datum: Datum) -> np.ndarray:
    tokens = torch.tensor(datum.model_input.to_ints())
    targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"].to_numpy())
    with torch.no_grad():
        logits = plain(tokens[None]).logits[0]
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
