"""Segments multiplied in batches give what they give one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.numerics.driver import Driver, item, random_datum, sample_operation
from tinsmith.engine import lora_groups
from tinsmith.engine.lora import Segment
from tinsmith.engine.lora_groups import SegmentGroup, SegmentPlanner
from tinsmith.types.errors import AdapterCorrupted
from tinsmith.types.operations import OptimStep, PublishSnapshot, TrainItem
from tinsmith.types.params import AdamParams

LENGTHS = {"a": 20, "b": 22, "c": 23, "d": 24, "e": 24, "f": 70, "g": 70, "h": 70}
RANKS = {"a": 1, "b": 4, "c": 9, "d": 4, "e": 2, "f": 4, "g": 4, "h": 4}


def work(step: int, *, forward_only: str = "") -> list[TrainItem]:
    rng = np.random.default_rng([step, 5])
    return [item(m, random_datum(rng, n), forward_only=m in forward_only) for m, n in LENGTHS.items()]


def opened(folder: Path) -> Driver:
    driver = Driver(folder)
    for name in LENGTHS:
        driver.create(name, rank=RANKS[name], seed=ord(name))
        driver.randomize(name, seed=ord(name), scale=0.02)
    return driver


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_groups, "_LEAST_MEMBERS", 10**6)


def parts(driver: Driver, lengths: dict[str, int]) -> list[str]:
    """What a pass over the adapters is made of: "abc" for a group, "a" for a segment."""
    segments, at = [], 0
    for name, length in lengths.items():
        segments.append(Segment(at, at + length, driver.engine._adapters[name].weights))
        at += length
    names = {s.start: name for s, name in zip(segments, lengths, strict=True)}
    planned = SegmentPlanner().plan(segments)
    return ["".join(names[s.start] for s in (p.segments if isinstance(p, SegmentGroup) else [p])) for p in planned]


def test_short_neighbours_of_like_length_and_sites_are_grouped(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = opened(qwen_folder)
    driver.create("x", train_mlp=False)
    assert parts(driver, LENGTHS) == ["abcde", "fgh"]
    assert parts(driver, {"a": 5, "b": 5, "x": 5, "c": 5, "d": 5, "e": 5}) == ["a", "b", "x", "cde"]
    assert parts(driver, {"a": 300, "b": 300, "c": 300}) == ["a", "b", "c"]
    assert parts(driver, {"a": 8, "b": 8, "c": 8, "d": 8}) == ["abcd"]
    monkeypatch.setattr(lora_groups, "_STACK_ELEMENTS", 1000)
    assert parts(driver, {"a": 8, "b": 8, "c": 8, "d": 8}) == ["a", "b", "c", "d"]
    assert parts(driver, {"a": 10, "b": 10, "c": 100, "d": 100}) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("forward_only", ["", "bf", "fgh"])
def test_groups_of_mixed_ranks_and_lengths_train_as_segments_do(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch, forward_only: str
) -> None:
    grouped = opened(qwen_folder)
    outputs = []
    for step in range(3):
        outputs.append(grouped.train(*work(step, forward_only=forward_only)))
        grouped.all([OptimStep(model_id=name, params=AdamParams(learning_rate=1e-2)) for name in LENGTHS])
    one_by_one(monkeypatch)
    single = opened(qwen_folder)
    for step in range(3):
        expected = single.train(*work(step, forward_only=forward_only))
        single.all([OptimStep(model_id=name, params=AdamParams(learning_rate=1e-2)) for name in LENGTHS])
        for ours, theirs in zip(outputs[step], expected, strict=True):
            gap = ours.loss_fn_outputs[0]["logprobs"].to_numpy() - theirs.loss_fn_outputs[0]["logprobs"].to_numpy()
            assert np.abs(gap).max() <= 1e-5
    for name in LENGTHS:
        assert np.abs(grouped.weights(name) - single.weights(name)).max() <= 1e-5
        assert grouped.engine._adapters[name].step == (0 if name in forward_only else 3)


def test_gradients_of_a_group_equal_those_of_its_members_alone(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = opened(qwen_folder)
    grouped.train(*work(0))
    grouped.train(*work(1))
    one_by_one(monkeypatch)
    for name in LENGTHS:
        alone = opened(qwen_folder)
        for step in range(2):
            alone.train(*(i for i in work(step) if i.model_id == name))
        assert np.abs(grouped.grads(name) - alone.grads(name)).max() <= 1e-5 * np.abs(alone.grads(name)).max()


def test_bfloat16_groups_are_as_exact_as_bfloat16_segments(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp32, the error of the batched products is not above that of the single ones by more than a fifth."""

    def gradients(dtype: str) -> dict[str, np.ndarray]:
        driver = Driver(qwen_folder, dtype=dtype)
        for name in LENGTHS:
            driver.create(name, rank=RANKS[name], seed=ord(name))
            driver.randomize(name, seed=ord(name), scale=0.02)
        driver.train(*work(0))
        return {name: driver.grads(name) for name in LENGTHS}

    grouped = gradients("bfloat16")
    one_by_one(monkeypatch)
    single, exact = gradients("bfloat16"), gradients("float32")
    errors = [
        sum(float(np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name])) for name in LENGTHS)
        for found in (grouped, single)
    ]
    assert errors[0] <= 1.2 * errors[1]
    assert errors[0] / len(LENGTHS) < 0.1


def test_nan_in_one_member_of_a_padded_group_stays_there(qwen_folder: Path) -> None:
    clean, beside = opened(qwen_folder), opened(qwen_folder)
    beside.engine._adapters["b"].weights.flat_P.fill_(1e30)  # finite; all that comes of it is NaN
    beside.engine._adapters["b"].weights.changed()
    for driver in (clean, beside):
        driver.train(*work(0))
    for name in LENGTHS:
        if name == "b":
            assert not np.isfinite(beside.grads(name)).all()
        else:
            gap = np.abs(clean.grads(name) - beside.grads(name)).max()
            assert gap <= 1e-5 * np.abs(clean.grads(name)).max()
    outcomes = beside.all([OptimStep(model_id=name, params=AdamParams()) for name in LENGTHS])
    assert [isinstance(outcome, AdapterCorrupted) for outcome in outcomes] == [name == "b" for name in LENGTHS]


def test_many_adapters_in_one_decode_batch_draw_what_each_draws_alone(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = opened(qwen_folder)
    for name in LENGTHS:
        together(PublishSnapshot(model_id=name, snapshot_id=name))
    prompts = [sample_operation([3, 4, 5], snapshot_id=name, seed=7, max_tokens=15, num_samples=2) for name in LENGTHS]
    drawn = together.all(prompts)
    one_by_one(monkeypatch)
    for operation, response in zip(prompts, drawn, strict=True):
        alone = together(operation)
        assert [s.tokens for s in alone.sequences] == [s.tokens for s in response.sequences]
        gap = np.subtract([s.logprobs for s in alone.sequences], [s.logprobs for s in response.sequences])
        assert np.abs(gap).max() <= 1e-5


def test_stacked_weights_follow_the_weights_they_are_of(qwen_folder: Path) -> None:
    driver = opened(qwen_folder)
    weights = [driver.engine._adapters[name].weights for name in "abc"]
    stacks = lora_groups.WeightStacks(weights)
    a_SRI, _ = stacks.at(0, torch.float32)
    assert a_SRI.shape[:2] == (3, 9)
    assert torch.equal(a_SRI[1, :4], weights[1].masters[0].a_RI)
    assert float(a_SRI[1, 4:].abs().max()) == 0
    driver.randomize("b", seed=99)
    assert not torch.equal(a_SRI[1, :4], weights[1].masters[0].a_RI)
    again, _ = stacks.at(0, torch.float32)
    assert torch.equal(again[1, :4], weights[1].masters[0].a_RI)
