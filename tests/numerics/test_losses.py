"""Every loss and its gradient against fp64 formulas written out by hand, and the laws that all of them obey."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.numerics.driver import Driver, item, random_datum, rl_datum
from tinsmith.engine.losses import LOSSES, evaluate
from tinsmith.types import Datum, ForwardBackwardOutput
from tinsmith.types.operations import TrainItem

Reference = Callable[..., tuple[np.ndarray, np.ndarray]]


def cross_entropy(lp: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return -(w * lp), -w


def importance_sampling(lp: np.ndarray, q: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r = np.exp(lp - q)
    return -(r * a), -(r * a)


def ppo(lp: np.ndarray, q: np.ndarray, a: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    r = np.exp(lp - q)
    clipped = np.clip(r, low, high)
    unclipped_wins = r * a <= clipped * a
    inside = (r >= low) & (r <= high)
    return -np.minimum(r * a, clipped * a), -np.where(unclipped_wins | inside, r * a, 0)


def cispo(lp: np.ndarray, q: np.ndarray, a: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    clipped = np.clip(np.exp(lp - q), low, high)
    return -(clipped * lp * a), -(clipped * a)


def dro(lp: np.ndarray, q: np.ndarray, a: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    return -(lp * a - 0.5 * beta * (lp - q) ** 2), -(a - beta * (lp - q))


CASES: list[tuple[str, Reference, dict[str, float], dict[str, float]]] = [
    ("importance_sampling", importance_sampling, {}, {}),
    ("ppo", ppo, {}, {"low": 0.8, "high": 1.2}),
    ("ppo", ppo, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5}, {"low": 0.9, "high": 1.5}),
    ("cispo", cispo, {}, {"low": 0.0, "high": 4.0}),
    ("cispo", cispo, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.1}, {"low": 0.5, "high": 1.1}),
    ("dro", dro, {}, {"beta": 0.01}),
    ("dro", dro, {"beta": 0.3}, {"beta": 0.3}),
]
CASE_IDS = [f"{name}-{'set' if config else 'default'}" for name, _, config, _ in CASES]


@pytest.mark.parametrize(
    ("name", "reference", "config", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_policy_losses_equal_their_formula_in_fp64(
    name: str, reference: Reference, config: dict[str, float], settings: dict[str, float]
) -> None:
    rng = np.random.default_rng(0)
    lp, q, a = rng.normal(-2, 1, 400), rng.normal(-2, 1, 400), rng.normal(0, 1, 400)
    inputs = {"logprobs": as_float(q), "advantages": as_float(a)}
    value, grad, _ = evaluate(LOSSES[name], as_float(lp), inputs, config)
    losses, expected_grad = reference(*(as_double(x) for x in (lp, q, a)), **settings)
    assert value.item() == pytest.approx(losses.sum(), rel=1e-5, abs=1e-4)
    assert np.abs(grad.numpy() - expected_grad).max() <= 1e-5 * np.abs(expected_grad).max()


def test_cross_entropy_equals_its_formula_in_fp64() -> None:
    rng = np.random.default_rng(0)
    lp, w = rng.normal(-2, 1, 400), rng.normal(0, 2, 400)
    value, grad, metrics = evaluate(LOSSES["cross_entropy"], as_float(lp), {"weights": as_float(w)}, {})
    losses, expected_grad = cross_entropy(as_double(lp), as_double(w))
    assert value.item() == pytest.approx(losses.sum(), rel=1e-5)
    assert np.abs(grad.numpy() - expected_grad).max() <= 1e-6
    assert metrics["weight:sum"] == pytest.approx(w.sum(), rel=1e-5)


@pytest.mark.parametrize(("name", "reference", "config", "settings"), CASES, ids=CASE_IDS)
def test_the_adapter_gradient_is_the_formulas_gradient_carried_through_the_model(
    driver: Driver, name: str, reference: Reference, config: dict[str, float], settings: dict[str, float]
) -> None:
    """cross_entropy with weights -dL/dlp is the linear surrogate of any loss L: same gradient in every weight."""
    datum = rl_datum(np.random.default_rng(1), 30)
    (output,) = trained_probe(driver, item("m", datum, loss_fn=name, loss_fn_config=config))
    lp, q, a = (
        as_double(x)
        for x in (
            output.logprobs[0].to_numpy(),
            datum.loss_fn_inputs["logprobs"].to_numpy(),
            datum.loss_fn_inputs["advantages"].to_numpy(),
        )
    )
    losses, slope = reference(lp, q, a, **settings)
    assert output.loss_sum == pytest.approx(losses.sum(), rel=1e-5, abs=1e-4)
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": (-slope).astype(np.float32)}
    surrogate = Datum(datum.model_input, inputs)
    assert relative(driver.grads("m"), grads_of(driver, surrogate)) <= 1e-5


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_gradient_scales_exactly_with_the_weight(driver: Driver, factor: float) -> None:
    rng = np.random.default_rng(2)
    datum = random_datum(rng, 25)
    scaled = with_inputs(datum, weights=datum.loss_fn_inputs["weights"].to_numpy() * np.float32(factor))
    one, other = grads_of(driver, datum), grads_of(driver, scaled)
    assert np.abs(other - factor * one).max() <= 1e-6 * np.abs(one).max()


def test_two_copies_equal_weight_two(driver: Driver) -> None:
    datum = random_datum(np.random.default_rng(3), 25)
    doubled = with_inputs(datum, weights=datum.loss_fn_inputs["weights"].to_numpy() * np.float32(2))
    assert relative(grads_of(driver, datum, datum), grads_of(driver, doubled)) <= 1e-5


def test_two_calls_accumulate_like_one(driver: Driver) -> None:
    rng = np.random.default_rng(4)
    first, second = random_datum(rng, 25), random_datum(rng, 11)
    together = grads_of(driver, first, second)
    driver.create("twice")
    driver.randomize("twice")
    driver.train(item("twice", first))
    driver.train(item("twice", second))
    assert relative(driver.grads("twice"), together) <= 1e-5


def test_rows_of_weight_zero_contribute_nothing(driver: Driver) -> None:
    rng = np.random.default_rng(5)
    datum = random_datum(rng, 30)
    weights, targets = (
        datum.loss_fn_inputs["weights"].to_numpy().copy(),
        datum.loss_fn_inputs["target_tokens"].to_numpy(),
    )
    weights[:10] = 0
    other_targets = targets.copy()
    other_targets[:10] = 0
    one = grads_of(driver, with_inputs(datum, weights=weights))
    other = grads_of(driver, with_inputs(datum, weights=weights, target_tokens=other_targets))
    assert np.array_equal(one, other)


def test_forward_leaves_no_gradient_even_beside_a_backward_pass(driver: Driver) -> None:
    rng = np.random.default_rng(6)
    shown, trained = random_datum(rng, 20), random_datum(rng, 20)
    expected = grads_of(driver, trained)
    driver.create("mixed")
    driver.randomize("mixed")
    driver.train(item("mixed", shown, forward_only=True), item("mixed", trained))
    assert relative(driver.grads("mixed"), expected) <= 1e-5
    driver.create("looked at")
    driver.train(item("looked at", shown, forward_only=True))
    before = driver.weights("looked at")
    assert driver.step("looked at", learning_rate=0.1, weight_decay=0.1)["step_applied"] == 0
    assert np.array_equal(driver.weights("looked at"), before)


def trained_probe(driver: Driver, *items: TrainItem) -> list[ForwardBackwardOutput]:
    driver.create("m")
    driver.randomize("m")
    return driver.train(*items)


def grads_of(driver: Driver, *data: Datum) -> np.ndarray:
    name = f"probe {len(driver.engine._adapters)}"
    driver.create(name)
    driver.randomize(name)
    driver.train(item(name, *data))
    return driver.grads(name)


def with_inputs(datum: Datum, **inputs: np.ndarray) -> Datum:
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **inputs})


def as_float(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def as_double(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
