"""Samples of one prompt that read it together: the same numbers as apart, and as transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.numerics.driver import VOCAB, Driver, plain_model, sample_operation
from tests.numerics.families import FAMILIES, save_tiny
from tinsmith.engine import shared_prefix
from tinsmith.engine.attend import ScoreRule, attend_part
from tinsmith.engine.shared_prefix import Group, find_groups
from tinsmith.types import SampleResponse
from tinsmith.types.operations import PublishSnapshot, Sample

APART, ALWAYS = 10**9, 0


def set_threshold(monkeypatch: pytest.MonkeyPatch, saved: int) -> None:
    monkeypatch.setattr(shared_prefix, "_LEAST_SAVED", saved)
    monkeypatch.setattr(shared_prefix, "_LEAST_SAVED_PER_SEQUENCE", 0)


@pytest.fixture
def shared_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of prefix tiles of the layers that ran in two parts; sharing is used wherever it can be."""
    set_threshold(monkeypatch, ALWAYS)
    seen: list[int] = []
    plain = shared_prefix.shared_attention

    def counting(layer, q, cache, plan, rule, out):  # type: ignore[no-untyped-def]
        seen.append(len(plan.prefixes))
        plain(layer, q, cache, plan, rule, out)

    monkeypatch.setattr("tinsmith.engine.cache_plan.shared_attention", counting)
    return seen


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


def mixture() -> list[Sample]:
    """Groups of several sizes and lengths, two requests of one prompt, a prompt that begins like another, loners."""
    shapes = [(70, 4, 0), (40, 3, 1), (40, 2, 1), (16, 5, 2), (33, 1, 3), (5, 4, 4), (48, 2, 5), (100, 6, 6)]
    operations = [
        sample_operation(prompt_of(n, seed), seed=i, num_samples=count, max_tokens=20 + 3 * i)
        for i, (n, count, seed) in enumerate(shapes)
    ]
    longer = [*prompt_of(70, 0)[:40], *prompt_of(30, 9)]
    return [*operations, sample_operation(longer, seed=20, num_samples=3, max_tokens=25)]


def assert_same(one: SampleResponse, other: SampleResponse) -> None:
    for left, right in zip(one.sequences, other.sequences, strict=True):
        assert left.tokens == right.tokens
        assert np.abs(left.logprobs_np - right.logprobs_np).max() <= 1e-5


def test_together_equals_apart(any_folder: Path, monkeypatch: pytest.MonkeyPatch, shared_passes: list[int]) -> None:
    together = Driver(any_folder).all(mixture())
    assert len(shared_passes) > 40
    set_threshold(monkeypatch, APART)
    count = len(shared_passes)
    apart = Driver(any_folder).all(mixture())
    assert len(shared_passes) == count
    for one, other in zip(apart, together, strict=True):
        assert_same(one, other)


def test_log_probs_equal_those_of_transformers(any_folder: Path, shared_passes: list[int]) -> None:
    plain = plain_model(any_folder)
    prompt = prompt_of(75)
    response = Driver(any_folder).sample(prompt, seed=3, num_samples=6, max_tokens=30)
    assert shared_passes
    for sequence in response.sequences:
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + sequence.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        assert np.abs(sequence.logprobs_np - expected.numpy()).max() <= 1e-5


def test_adapters_form_groups_of_their_own(driver: Driver, shared_passes: list[int]) -> None:
    for name in ("a", "b"):
        driver.create(name, seed=ord(name))
        driver.randomize(name, seed=ord(name))
        driver(PublishSnapshot(model_id=name, snapshot_id=name))
    operations = [
        sample_operation(prompt_of(50), snapshot_id=s, seed=2, num_samples=3, max_tokens=15) for s in ("a", None, "b")
    ]
    together = driver.all(operations)
    assert shared_passes
    for operation, response in zip(operations, together, strict=True):
        alone = Driver(Path(driver.engine.card.source))
        for name in ("a", "b"):
            alone.create(name, seed=ord(name))
            alone.randomize(name, seed=ord(name))
            alone(PublishSnapshot(model_id=name, snapshot_id=name))
        assert_same(alone(operation), response)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_draws_the_same_together_and_apart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_passes: list[int]
) -> None:
    save_tiny(tmp_path, FAMILIES[name].model_type, **FAMILIES[name].config)
    operations = [
        sample_operation(prompt_of(n, n), seed=n, num_samples=3, max_tokens=12, topk_sample_logprobs=1)
        for n in (20, 50)
    ]
    together = Driver(tmp_path).all(operations)
    set_threshold(monkeypatch, APART)
    for one, other in zip(Driver(tmp_path).all(operations), together, strict=True):
        assert_same(one, other)


def test_both_ways_to_compute_a_part_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, generator=generator) for n in (5, 32, 32))
    hidden = torch.zeros(3, 1, 1, 32)
    hidden[1, :, :, 20:] = float("-inf")
    fused = attend_part(q, k, v, hidden, ScoreRule(scale=0.3))
    wide = torch.cat([v, v], dim=-1)  # values of another size than keys: no kernel for that
    plain = attend_part(q, k, wide, hidden, ScoreRule(scale=0.3))
    torch.testing.assert_close(fused[0], plain[0][..., :8], atol=1e-6, rtol=0)
    torch.testing.assert_close(fused[1], plain[1], atol=1e-5, rtol=0)


def test_groups_are_neighbours_that_save_the_most() -> None:
    table = np.array([[1, 2, 3, 9], [1, 2, 3, 8], [1, 2, 4, 5], [1, 2, 4, 5], [6, 7, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    full = np.array([4, 4, 4, 3, 2, 0, 0])
    assert find_groups(table, full) == [Group(0, 4, 2)]
    deeper = np.array([[1, *range(10, 20)]] * 3 + [[1, *range(30, 40)]] * 3)
    assert find_groups(deeper, np.full(6, 11)) == [Group(0, 3, 11), Group(3, 6, 11)]
    assert find_groups(deeper, np.full(6, 1)) == [Group(0, 6, 1)]
    assert find_groups(deeper, np.zeros(6, int)) == []
    assert find_groups(deeper[:1], np.full(1, 11)) == []
    assert find_groups(np.arange(8).reshape(4, 2), np.full(4, 2)) == []
