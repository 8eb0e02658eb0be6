"""Twenty steps of one model, alone and beside a tenant who does everything wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.numerics.driver import Driver, item, random_datum, rl_datum, sample_operation
from tinsmith.types.errors import TinsmithError
from tinsmith.types.operations import OptimStep, PublishSnapshot, TrainItem
from tinsmith.types.params import AdamParams
from tinsmith.types.results import SampleResponse

STEPS = 20
PARAMS = AdamParams(learning_rate=2e-3, weight_decay=0.01, grad_clip_norm=5.0)


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def quiet_work(step: int) -> list[TrainItem]:
    rng = np.random.default_rng([step, 1])
    return [item("a", *(random_datum(rng, int(n)) for n in rng.integers(2, 40, 3))) for _ in range(2)]


def noisy_work(step: int) -> list[TrainItem]:
    """Of other ranks and losses, sometimes forward only, and from the tenth step on full of NaN."""
    rng = np.random.default_rng([step, 2])
    work = [
        item("b", *(rl_datum(rng, int(n)) for n in rng.integers(1, 60, 2)), loss_fn="ppo"),
        item("c", random_datum(rng, int(rng.integers(1, 90))), forward_only=step % 2 == 0),
    ]
    if step >= 10:
        bad = rl_datum(rng, 12)
        bad.loss_fn_inputs["advantages"].to_numpy()[:] = np.nan
        work.append(item("d", bad, loss_fn="importance_sampling"))
    return work


def run(driver: Driver, *, beside: bool) -> tuple[np.ndarray, SampleResponse]:
    driver.create("a", rank=4, seed=1)
    if beside:
        driver.create("b", rank=7, seed=2)
        driver.create("c", rank=1, seed=3, train_mlp=False)
        driver.create("d", rank=4, seed=4)
    for step in range(STEPS):
        work: list[object] = [*quiet_work(step)]
        if beside:
            work = [*noisy_work(step), *work]
            work += [
                sample_operation([1, 2, 3], max_tokens=3, top_k=2, seed=step),
                sample_operation([7], snapshot_id="x"),
            ]
            work += [OptimStep(model_id=m, params=AdamParams(learning_rate=0.1, weight_decay=0.9)) for m in "bcd"]
        driver.all([*work, OptimStep(model_id="a", params=PARAMS)])
    publish: list[object] = [PublishSnapshot(model_id="a", snapshot_id="final")]
    others = [sample_operation([5, 6, 7], max_tokens=30, seed=s) for s in range(5)] if beside else []
    driver.all(publish)
    *_, drawn = driver.all([*others, sample_operation([5, 6, 7], snapshot_id="final", seed=3, max_tokens=30)])
    assert not isinstance(drawn, TinsmithError)
    return driver.weights("a"), drawn


def test_twenty_steps_agree_within_the_float_noise_of_the_batch_shape(qwen_folder: Path) -> None:
    alone, drawn_alone = run(Driver(qwen_folder), beside=False)
    beside, drawn_beside = run(Driver(qwen_folder), beside=True)
    assert np.abs(alone - beside).max() <= 1e-6 * np.abs(alone).max()
    assert drawn_alone.sequences[0].tokens == drawn_beside.sequences[0].tokens


def test_twenty_steps_and_a_sample_agree_bitwise_under_deterministic(qwen_folder: Path) -> None:
    alone, drawn_alone = run(Driver(qwen_folder, deterministic=True), beside=False)
    beside, drawn_beside = run(Driver(qwen_folder, deterministic=True), beside=True)
    assert np.array_equal(alone, beside)
    assert drawn_alone.sequences[0].tokens == drawn_beside.sequences[0].tokens
    assert drawn_alone.sequences[0].logprobs == drawn_beside.sequences[0].logprobs


def test_a_repeated_prompt_and_a_cancelled_one_change_nothing_under_deterministic(qwen_folder: Path) -> None:
    driver = Driver(qwen_folder, deterministic=True)
    prompt = list(range(1, 100))
    first = driver.sample(prompt, seed=1, max_tokens=20)
    again, other = driver.all([sample_operation(prompt, seed=s, max_tokens=20) for s in (1, 2)])
    assert again.prompt_cache_hit_tokens == 0
    assert again.sequences[0].tokens == first.sequences[0].tokens
    assert again.sequences[0].logprobs == first.sequences[0].logprobs
    assert other.sequences[0].tokens != first.sequences[0].tokens
