"""Every loss and its gradient against fp64 formulas written out by hand, and the laws that all of them obey."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.driver import Driver, item, random_datum, rl_datum
from tinsmith.engine.losses import LOSSES, LossInputs, evaluate
from tinsmith.types import Datum, ForwardBackwardOutput, TensorData
from tinsmith.types.errors import AdapterCorrupted
from tinsmith.types.metrics import reduction_of
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
    inputs = LossInputs({"logprobs": as_float(q), "advantages": as_float(a)}, [400])
    value, grad, _ = evaluate(LOSSES[name], as_float(lp), inputs, config)
    losses, expected_grad = reference(*(as_double(x) for x in (lp, q, a)), **settings)
    assert value.item() == pytest.approx(losses.sum(), rel=1e-5, abs=1e-4)
    assert np.abs(grad.numpy() - expected_grad).max() <= 1e-5 * np.abs(expected_grad).max()


@pytest.mark.parametrize(
    ("name", "advantage"),
    [("importance_sampling", 0.0), ("ppo", 0.0), ("ppo", 1.0), ("cispo", 0.0), ("cispo", 1.0), ("cispo", -1.0)],
)
def test_a_ratio_beyond_fp32_is_as_harmless_as_in_the_formula(name: str, advantage: float) -> None:
    """Prompt rows are often filled with a number of no meaning; their advantage is 0."""
    lp, q, a = np.array([-1.0, -2.0]), np.array([-500.0, -2.1]), np.array([advantage, 1.0])
    reference, settings = next((ref, settings) for other, ref, _, settings in CASES if other == name)
    inputs = LossInputs({"logprobs": as_float(q), "advantages": as_float(a)}, [2])
    value, grad, _ = evaluate(LOSSES[name], as_float(lp), inputs, {})
    losses, expected_grad = reference(lp, q, a, **settings)
    assert value.item() == pytest.approx(losses.sum(), rel=1e-5)
    assert grad.numpy() == pytest.approx(expected_grad, rel=1e-5)


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_a_sequence_ratio_beyond_fp32_is_as_harmless_as_in_the_formula(advantage: float) -> None:
    given = {"logprobs": [-500.0, -500.0], "advantages": [advantage, 0.0], "sequence_ratio_mask": [1.0, 1.0]}
    inputs = LossInputs({name: as_float(np.array(values)) for name, values in given.items()}, [2])
    value, grad, _ = evaluate(LOSSES["gspo"], torch.tensor([-1.0, -2.0]), inputs, {})
    assert value.item() == pytest.approx(-1.2 * advantage)
    assert not grad.any()


def test_cross_entropy_equals_its_formula_in_fp64() -> None:
    rng = np.random.default_rng(0)
    lp, w = rng.normal(-2, 1, 400), rng.normal(0, 2, 400)
    inputs = LossInputs({"weights": as_float(w)}, [400])
    value, grad, metrics = evaluate(LOSSES["cross_entropy"], as_float(lp), inputs, {})
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
    assert relative(driver.grads("m"), grads_of(driver, surrogate(datum, slope))) <= 1e-5


# ---- bounds per token ----


@pytest.mark.parametrize(("name", "reference"), [("ppo", ppo), ("cispo", cispo)])
@pytest.mark.parametrize("given", [("low", "high"), ("low",), ("high",)])
def test_bounds_may_differ_from_token_to_token(
    driver: Driver, name: str, reference: Reference, given: tuple[str, ...]
) -> None:
    """A bound that the datum does not give is that of the config; gradients through the model as above."""
    rng = np.random.default_rng(11)
    bounds = {"low": rng.uniform(0.5, 0.9, 30), "high": rng.uniform(1.1, 1.6, 30)}
    config = {"low": 0.7, "high": 1.3}
    datum = near_datum(driver, rng, 30, **{f"clip_{key}_threshold": bounds[key] for key in given})
    other = near_datum(driver, rng, 20)
    (output,) = trained_probe(
        driver,
        item(
            "m",
            datum,
            other,
            loss_fn=name,
            loss_fn_config={f"clip_{key}_threshold": value for key, value in config.items() if key not in given},
        ),
    )
    defaults = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}[name]
    settings = [
        {key: as_double(bounds[key]) if key in given else np.float32(config[key]) for key in config},
        {key: d if key in given else np.float32(config[key]) for key, d in zip(config, defaults, strict=True)},
    ]
    losses, slopes = [], []
    for datum_, logprobs, bound in zip((datum, other), output.logprobs, settings, strict=True):
        values, slope = reference(*policy_arrays(datum_, logprobs), **bound)
        losses.append(values.sum())
        slopes.append(slope)
    assert output.loss_sum == pytest.approx(sum(losses), rel=1e-5, abs=1e-4)
    assert 0 < output.metrics["clip_fraction:mean"] < 1
    surrogates = [surrogate(d, slope) for d, slope in zip((datum, other), slopes, strict=True)]
    assert relative(driver.grads("m"), grads_of(driver, *surrogates)) <= 1e-5


# ---- gspo ----


def gspo(
    lp: np.ndarray, q: np.ndarray, a: np.ndarray, mask: np.ndarray, low: Any = 0.8, high: Any = 1.2
) -> tuple[np.ndarray, np.ndarray]:
    """Of one sequence. The ratio's gradient is that of the token's own log-probability: ds/dlp = s."""
    s = np.exp((lp - q)[mask != 0].mean()) if mask.any() else 1.0
    clipped = np.clip(s, low, high)
    inside = (s >= low) & (s <= high)
    return -np.minimum(s * a, clipped * a), -np.where((s * a <= clipped * a) | inside, s * a, 0)


@pytest.mark.parametrize(
    ("config", "per_token"),
    [({}, False), ({"clip_low_threshold": 0.95, "clip_high_threshold": 1.02}, False), ({}, True)],
    ids=["default", "set", "per token"],
)
def test_gspo_equals_its_formula_sequence_by_sequence(
    driver: Driver, config: dict[str, float], per_token: bool
) -> None:
    """Value and gradient, several datums of different length in one request, in one pass or in many."""
    rng = np.random.default_rng(12)
    data = []
    for length in (30, 1, 17, 23):
        inputs = {"sequence_ratio_mask": (rng.random(length) < 0.6).astype(np.float32) * 2}
        inputs["sequence_ratio_mask"][0] = 1
        if per_token:
            inputs["clip_low_threshold"] = rng.uniform(0.8, 1.0, length).astype(np.float32)
            inputs["clip_high_threshold"] = rng.uniform(1.0, 1.2, length).astype(np.float32)
        data.append(near_datum(driver, rng, length, **inputs))
    (output,) = trained_probe(driver, item("m", *data, loss_fn="gspo", loss_fn_config=config))
    total, surrogates, ratios = 0.0, [], []
    for datum, logprobs in zip(data, output.logprobs, strict=True):
        arrays = {key: as_double(tensor.to_numpy()) for key, tensor in datum.loss_fn_inputs.items()}
        bounds = {
            key: arrays.get(f"clip_{key}_threshold", config.get(f"clip_{key}_threshold", default))
            for key, default in (("low", 0.8), ("high", 1.2))
        }
        lp, q, a = policy_arrays(datum, logprobs)
        losses, slope = gspo(lp, q, a, arrays["sequence_ratio_mask"], **bounds)
        total += losses.sum()
        surrogates.append(surrogate(datum, slope))
        ratios.append(np.exp((lp - q)[arrays["sequence_ratio_mask"] != 0].mean()))
    assert output.loss_sum == pytest.approx(total, rel=1e-5, abs=1e-4)
    assert relative(driver.grads("m"), grads_of(driver, *surrogates)) <= 1e-5
    assert output.metrics["ratio:max"] == pytest.approx(max(ratios), rel=1e-4)
    assert output.metrics["ratio:min"] == pytest.approx(min(ratios), rel=1e-4)


def test_gspo_is_the_same_however_its_datums_are_spread_over_passes(qwen_folder: Path) -> None:
    gradients = []
    for max_tokens in (8192, 20):
        driver = Driver(qwen_folder, max_micro_batch_tokens=max_tokens)
        rng = np.random.default_rng(13)
        data = [near_datum(driver, rng, n, sequence_ratio_mask=np.ones(n, dtype=np.float32)) for n in (9, 14, 6, 12)]
        trained_probe(driver, item("m", *data, loss_fn="gspo"))
        gradients.append(driver.grads("m"))
    assert relative(*gradients) <= 1e-5


def test_a_sequence_without_ratio_and_advantage_contributes_nothing(driver: Driver) -> None:
    datum = rl_datum(np.random.default_rng(14), 12)
    zero = np.zeros(12, dtype=np.float32)
    empty = with_inputs(datum, sequence_ratio_mask=zero, advantages=zero)
    (output,) = trained_probe(driver, item("m", empty, loss_fn="gspo"))
    assert output.loss_sum == 0
    assert not driver.grads("m").any()


# ---- metrics ----


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_metrics_are_named_with_one_colon_and_a_known_reduction(driver: Driver, name: str) -> None:
    rng = np.random.default_rng(15)
    datum = random_datum(rng, 10) if name == "cross_entropy" else near_datum(driver, rng, 10)
    if name == "gspo":
        datum = with_inputs(datum, sequence_ratio_mask=np.ones(10, dtype=np.float32))
    (output,) = trained_probe(driver, item("m", datum, loss_fn=name))
    assert {"loss:sum", "tokens:sum"} < output.metrics.keys()
    for key in output.metrics:
        assert key.count(":") == 1, key
        assert reduction_of(key) is not None, key
    assert ("ratio:mean" in output.metrics) == (name != "cross_entropy")
    assert ("clip_fraction:mean" in output.metrics) == (name in ("ppo", "cispo", "gspo"))


def test_ratio_metrics_are_those_of_the_tokens_with_an_advantage(driver: Driver) -> None:
    rng = np.random.default_rng(16)
    datum = near_datum(driver, rng, 40)
    advantages = datum.loss_fn_inputs["advantages"].to_numpy().copy()
    advantages[:25] = 0
    (output,) = trained_probe(driver, item("m", with_inputs(datum, advantages=advantages), loss_fn="ppo"))
    lp, q, _ = policy_arrays(datum, output.logprobs[0])
    gap = (lp - q)[25:]
    ratio = np.exp(gap)
    expected = {
        "ratio:mean": ratio.mean(),
        "ratio:max": ratio.max(),
        "ratio:min": ratio.min(),
        "clip_fraction:mean": ((ratio < 0.8) | (ratio > 1.2)).mean(),
        "approx_kl:mean": (np.exp(gap) - 1 - gap).mean(),
        "entropy:mean": -q[25:].mean(),
    }
    for key, value in expected.items():
        assert output.metrics[key] == pytest.approx(value, rel=1e-3), key


def test_metrics_of_a_request_do_not_depend_on_how_many_passes_it_takes(qwen_folder: Path) -> None:
    rng = np.random.default_rng(17)
    data = []
    for length, num_trained in ((60, 50), (40, 3), (30, 0)):
        datum = rl_datum(rng, length)
        datum.loss_fn_inputs["advantages"].to_numpy()[num_trained:] = 0
        data.append(datum)
    found = []
    for limit in (1000, 64):
        driver = Driver(qwen_folder, max_micro_batch_tokens=limit)
        driver.create("m")
        (output,) = driver.train(item("m", *data, loss_fn="ppo"))
        found.append(output.metrics)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# ---- laws of all losses ----


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


def test_a_pass_without_any_gradient_skips_the_backward_pass_and_still_counts(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(21)
    driver.create("m")
    backwards: list[object] = []
    real = driver.engine._base.backward
    monkeypatch.setattr(driver.engine._base, "backward", lambda *args: (backwards.append(args), real(*args)))
    nothing = rl_datum(rng, 9)
    nothing.loss_fn_inputs["advantages"].to_numpy()[:] = 0
    driver.train(item("m", nothing, loss_fn="importance_sampling"))
    assert backwards == []
    assert driver.step("m")["step_applied"] == 1
    nothing.loss_fn_inputs["advantages"].to_numpy()[3] = np.nan
    driver.train(item("m", nothing, loss_fn="importance_sampling"))
    assert len(backwards) == 1
    with pytest.raises(AdapterCorrupted):
        driver.step("m")


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


def near_datum(driver: Driver, rng: np.random.Generator, length: int, **inputs: np.ndarray) -> Datum:
    """A policy datum whose ratios lie around 1: its `logprobs` are the model's, disturbed."""
    datum = rl_datum(rng, length)
    name = f"probe {len(driver.engine._adapters)}"
    driver.create(name)
    driver.randomize(name)
    plain = with_inputs(datum, weights=np.ones(length, dtype=np.float32))
    plain = Datum(plain.model_input, {key: plain.loss_fn_inputs[key] for key in ("target_tokens", "weights")})
    (output,) = driver.train(item(name, plain, forward_only=True))
    old = output.logprobs[0].to_numpy() + rng.normal(0, 0.3, length)
    given = {key: value.astype(np.float32) for key, value in inputs.items()}
    return with_inputs(datum, logprobs=old.astype(np.float32), **given)


def policy_arrays(datum: Datum, logprobs: TensorData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`lp`, `q` and `A` in fp64."""
    inputs = datum.loss_fn_inputs
    return (
        as_double(logprobs.to_numpy()),
        as_double(inputs["logprobs"].to_numpy()),
        as_double(inputs["advantages"].to_numpy()),
    )


def surrogate(datum: Datum, slope: np.ndarray) -> Datum:
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": (-slope).astype(np.float32)}
    return Datum(datum.model_input, inputs)


def with_inputs(datum: Datum, **inputs: np.ndarray) -> Datum:
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **inputs})


def as_float(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def as_double(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
