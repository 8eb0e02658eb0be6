"""Prompts in chunks, prompts that the cache still has, and what must never be shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.numerics.driver import VOCAB, Driver, item, random_datum, sample_operation
from tests.numerics.families import FAMILIES, save_tiny
from tinsmith.engine.block_pool import BASE_OWNER, BLOCK_TOKENS, BlockPool, block_keys
from tinsmith.types import SampleResponse
from tinsmith.types.errors import InvalidInput, ServerError
from tinsmith.types.operations import CancelSample, DropSnapshot, OptimStep, PublishSnapshot, Sample
from tinsmith.types.params import AdamParams
from tinsmith.types.tensor import TensorData


@pytest.fixture
def two_adapters(driver: Driver) -> Driver:
    """With the snapshots `a` and `b` of adapters of one shape."""
    for name, seed in (("a", 1), ("b", 2)):
        driver.create(name, rank=3, seed=seed)
        driver.randomize(name, seed=seed)
        driver(PublishSnapshot(model_id=name, snapshot_id=name))
    return driver


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


def everything(prompt: list[int], **fields: Any) -> Sample:
    """A request that asks for all there is."""
    asked = np.random.default_rng(1).integers(-1, VOCAB, (len(prompt) - 1, 3))
    defaults: dict[str, Any] = {
        "num_samples": 3,
        "max_tokens": 20,
        "seed": 4,
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 2,
        "target_prompt_logprobs": TensorData.from_numpy(asked),
        "prompt_alt_tokens_k": 2,
    }
    return sample_operation(prompt, **{**defaults, **fields})


def assert_same(one: SampleResponse, other: SampleResponse, tolerance: float = 1e-5) -> None:
    assert [s.tokens for s in one.sequences] == [s.tokens for s in other.sequences]
    assert [s.stop_reason for s in one.sequences] == [s.stop_reason for s in other.sequences]
    for left, right in zip(one.sequences, other.sequences, strict=True):
        assert np.abs(left.logprobs_np - right.logprobs_np).max() <= tolerance
        if left.topk_logprobs_np is not None:
            assert np.array_equal(left.topk_logprobs_np.token_ids, right.topk_logprobs_np.token_ids)
    for name in ("prompt_logprobs_np", "target_prompt_logprobs", "prompt_alt_tokens", "topk_prompt_logprobs_np"):
        assert (getattr(one, name) is None) == (getattr(other, name) is None), name
    if one.prompt_logprobs_np is not None:
        np.testing.assert_allclose(one.prompt_logprobs_np, other.prompt_logprobs_np, atol=tolerance, rtol=0)
    if one.target_prompt_logprobs is not None:
        left, right = one.target_prompt_logprobs.to_numpy(), other.target_prompt_logprobs.to_numpy()
        np.testing.assert_allclose(left, right, atol=tolerance, rtol=0)
    if one.prompt_alt_tokens is not None:
        assert one.prompt_alt_tokens.tokens == other.prompt_alt_tokens.tokens
    if one.topk_prompt_logprobs_np is not None:
        left, right = one.topk_prompt_logprobs_np, other.topk_prompt_logprobs_np
        assert np.array_equal(left.token_ids, right.token_ids)
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=tolerance, rtol=0)


def pool(driver: Driver) -> BlockPool:
    return driver.engine._sampler._cache.blocks


def shrink(driver: Driver, num_blocks: int) -> None:
    blocks = pool(driver)
    blocks._free = blocks._free[-num_blocks:]
    blocks.num_blocks = num_blocks + 1


def forget_all(driver: Driver) -> None:
    for owner in list(pool(driver)._of_owner):
        pool(driver).forget(owner)
    pool(driver).open(BASE_OWNER)
    assert pool(driver).num_kept == 0
    pool(driver)._free.sort(reverse=True)


# ---- chunks ----


@pytest.mark.parametrize("budget", [1, 7, 16, 50])
def test_a_prompt_in_chunks_equals_a_whole_one(any_folder: Path, budget: int) -> None:
    operations = [everything(prompt_of(n, seed=n)) for n in (1 + budget, 33, 90, 64, 2)]
    whole = Driver(any_folder).all(operations)
    chunked = Driver(any_folder, max_prefill_tokens=budget)
    for one, other in zip(whole, chunked.all(operations), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3"])
def test_windows_caps_sinks_and_odd_heads_in_chunks_and_from_the_cache(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, FAMILIES[family].model_type, **FAMILIES[family].config)
    operations = [everything(prompt_of(n, seed=n)) for n in (60, 21, 100)]
    whole = Driver(folder).all(operations)
    chunked = Driver(folder, max_prefill_tokens=13)
    again = [replace(o, prompt_logprobs=False, topk_prompt_logprobs=0, prompt_alt_tokens_k=0) for o in operations]
    again = [replace(o, target_prompt_logprobs=None) for o in again]
    for one, other in zip(whole, chunked.all(operations), strict=True):
        assert_same(one, other)
    for one, other in zip(whole, chunked.all(again), strict=True):
        assert [s.tokens for s in one.sequences] == [s.tokens for s in other.sequences]
        assert other.prompt_cache_hit_tokens > 0


def test_running_samples_advance_while_a_long_prompt_is_computed(qwen_folder: Path) -> None:
    driver = Driver(qwen_folder, max_prefill_tokens=10)
    engine, sampler = driver.engine, driver.engine._sampler
    engine.accept(0, sample_operation([1, 2, 3], max_tokens=100, stop_token_ids=()))
    engine.work()
    engine.accept(1, sample_operation(prompt_of(150), max_tokens=2))
    for slices in range(1, 15):
        before = sampler.tokens_sampled, sampler.tokens_prefilled
        assert engine.work() == []
        assert (sampler.tokens_sampled, sampler.tokens_prefilled) == (before[0] + 1, before[1] + 10), slices


def test_training_waits_for_one_slice_of_sampling_at_most(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(qwen_folder)
    rng = np.random.default_rng(0)
    driver.create("m")
    now = [0.0]

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("tinsmith.engine.engine.time.perf_counter", tick)  # every slice takes as long as every other
    engine = driver.engine
    for ticket in range(64):
        engine.accept(ticket, sample_operation(prompt_of(40, ticket), num_samples=4, max_tokens=200, stop_token_ids=()))
    for _ in range(20):
        assert engine.work() == []
    for round_ in range(3):
        engine.accept(1000, item("m", random_datum(rng, 5)))
        engine.accept(1001, OptimStep(model_id="m", params=AdamParams()))
        slices = 0
        finished: list[int] = []
        while 1001 not in finished and slices < 50:
            finished += [ticket for ticket, _ in engine.work()]
            slices += 1
        assert slices <= 7, f"round {round_}: forward_backward and optim_step alone take 3 slices"


def test_prompts_are_short_slices_while_training_waits(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.engine.sampler._PREFILL_BESIDE_TRAINING", 20)
    driver = Driver(qwen_folder)
    driver.create("m")
    sampler = driver.engine._sampler
    driver.engine.accept(0, sample_operation(prompt_of(200), max_tokens=1))
    sampler.step(shared=True)
    assert sampler.tokens_prefilled == 20
    sampler.step()
    assert sampler.tokens_prefilled == 200


# ---- reuse ----


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 31, 32, 33, 100])
def test_a_repeated_prompt_gives_the_same_and_counts_what_was_reused(qwen_folder: Path, length: int) -> None:
    driver = Driver(qwen_folder)
    operation = sample_operation(prompt_of(length), num_samples=3, max_tokens=20, seed=4)
    cold = driver(operation)
    assert cold.prompt_cache_hit_tokens == 0
    prefilled = driver.engine._sampler.tokens_prefilled
    warm = driver(operation)
    assert_same(cold, warm)
    assert warm.prompt_cache_hit_tokens == length
    assert driver.engine._sampler.tokens_prefilled == prefilled
    other = replace(operation, seed=9, num_samples=5, max_tokens=40)
    assert_same(Driver(qwen_folder)(other), driver(other))
    scored = replace(operation, prompt_logprobs=True)
    assert_same(Driver(qwen_folder)(scored), driver(scored))


def test_a_prompt_that_ends_inside_anothers_block_is_kept_by_itself(driver: Driver) -> None:
    prompt = prompt_of(60)
    driver.sample(prompt, max_tokens=30)
    shorter = driver.sample(prompt[:55], max_tokens=30, seed=1)
    assert shorter.prompt_cache_hit_tokens == 48
    for seed, length in ((2, 60), (3, 55)):
        operation = sample_operation(prompt[:length], seed=seed, max_tokens=30, num_samples=2)
        again = driver(operation)
        assert again.prompt_cache_hit_tokens == length
        assert_same(Driver(Path(driver.engine.card.source))(operation), again)


def test_a_longer_prompt_reuses_its_beginning_and_what_was_drawn_after_it(driver: Driver) -> None:
    prompt = prompt_of(40)
    first = driver.sample(prompt, max_tokens=40, stop_token_ids=())
    follow_up = [*prompt, *first.sequences[0].tokens, 5, 6, 7]
    second = driver.sample(follow_up, max_tokens=5, seed=1)
    assert second.prompt_cache_hit_tokens == (40 + 39) // BLOCK_TOKENS * BLOCK_TOKENS
    cold = Driver(Path(driver.engine.card.source)).sample(follow_up, max_tokens=5, seed=1)
    assert_same(cold, second)
    other = driver.sample([*prompt[:20], 3, *prompt[21:]], max_tokens=5)
    assert other.prompt_cache_hit_tokens == 16


@pytest.mark.parametrize("length", [7, 80, 90])
def test_requests_of_one_prompt_at_once_compute_it_once(driver: Driver, length: int) -> None:
    prompt = prompt_of(length)
    operations = [sample_operation(prompt, seed=n, max_tokens=6) for n in range(8)]
    responses = driver.all(operations)
    assert [r.prompt_cache_hit_tokens for r in responses] == [0] + [length] * 7
    assert driver.engine._sampler.tokens_prefilled == length
    for operation, response in zip(operations, responses, strict=True):
        assert_same(Driver(Path(driver.engine.card.source))(operation), response)


def test_scored_rows_are_computed_and_the_count_says_so(driver: Driver) -> None:
    prompt = prompt_of(70)
    driver.sample(prompt)
    whole = driver.sample(prompt, prompt_logprobs=True)
    assert whole.prompt_cache_hit_tokens == 0
    recent = driver.sample(prompt, prompt_logprobs=True, topk_prompt_logprobs=1, prompt_logprobs_last_n=10)
    assert recent.prompt_cache_hit_tokens == 48
    assert np.isnan(recent.prompt_logprobs_np[:60]).all()
    assert recent.topk_prompt_logprobs[:60] == [None] * 60
    assert None not in recent.topk_prompt_logprobs[60:]
    np.testing.assert_allclose(recent.prompt_logprobs_np[60:], whole.prompt_logprobs_np[60:], atol=1e-5)
    asked = np.full((69, 1), -1)
    asked[68] = 7
    target = driver.sample(prompt, target_prompt_logprobs=TensorData.from_numpy(asked))
    assert target.prompt_cache_hit_tokens == 64


def test_two_adapters_and_the_base_never_share_a_prompt(two_adapters: Driver) -> None:
    prompt = prompt_of(60)
    operations = [sample_operation(prompt, snapshot_id=s, seed=3, max_tokens=10) for s in ("a", "b", None)]
    together = two_adapters.all(operations)
    assert [r.prompt_cache_hit_tokens for r in together] == [0, 0, 0]
    again = [two_adapters(operation) for operation in operations]
    assert [r.prompt_cache_hit_tokens for r in again] == [60, 60, 60]
    for cold, warm in zip(together, again, strict=True):
        assert_same(cold, warm)
    logprobs = [r.sequences[0].logprobs_np[0] for r in together]
    assert len({round(float(x), 4) for x in logprobs}) == 3


def test_snapshots_of_equal_weights_share_and_dropping_the_last_frees_the_blocks(two_adapters: Driver) -> None:
    driver, prompt = two_adapters, prompt_of(60)
    driver(PublishSnapshot(model_id="a", snapshot_id="a2"))
    driver.sample(prompt, snapshot_id="a")
    assert driver.sample(prompt, snapshot_id="a2").prompt_cache_hit_tokens == 60
    kept = pool(driver).num_kept
    driver(DropSnapshot(snapshot_id="a"))
    assert pool(driver).num_kept == kept
    driver.engine.accept(0, sample_operation(prompt, snapshot_id="a2", max_tokens=50))
    driver.engine.work()
    driver(DropSnapshot(snapshot_id="a2"))
    while driver.engine.has_work:
        driver.engine.work()
    assert pool(driver).num_kept == 0
    driver(PublishSnapshot(model_id="a", snapshot_id="a"))
    assert driver.sample(prompt, snapshot_id="a").prompt_cache_hit_tokens == 0


# ---- a small cache ----


@pytest.mark.parametrize("num_blocks", [12, 17, 40])
def test_eviction_and_preemption_change_nothing_but_time(qwen_folder: Path, num_blocks: int) -> None:
    operations = [
        everything(prompt_of(n % 70 + 2, seed=n % 5), seed=n, max_tokens=60, num_samples=n % 4 + 1) for n in range(14)
    ]
    expected = Driver(qwen_folder).all(operations)
    tight = Driver(qwen_folder, max_prefill_tokens=48, max_decode_batch=6)
    shrink(tight, num_blocks)
    for _ in range(2):
        for one, other in zip(expected, tight.all(operations), strict=True):
            assert_same(one, other)
    assert pool(tight).num_free == num_blocks
    assert not tight.engine.has_work


@pytest.mark.parametrize("num_blocks", [11, 17, 40])
def test_repeated_prompts_in_a_tiny_cache_keep_their_results(qwen_folder: Path, num_blocks: int) -> None:
    operations = [
        sample_operation(prompt_of(n % 70 + 2, seed=n % 5), seed=n, max_tokens=60, num_samples=n % 4 + 1)
        for n in (0, 15, 30, 45, 60, 30, 45, 14, 15, 0, 3, 60)
    ]
    expected = Driver(qwen_folder).all(operations)
    tight = Driver(qwen_folder, max_decode_batch=6)
    shrink(tight, num_blocks)
    for _ in range(3):
        for one, other in zip(expected, tight.all(operations), strict=True):
            assert_same(one, other)
    assert pool(tight).num_free == num_blocks
    assert sum(pool(tight)._users) == 0
    assert set(pool(tight)._ends_in) <= set(pool(tight)._idle)


def test_adapters_interleaved_in_a_tiny_cache_keep_their_results(two_adapters: Driver, qwen_folder: Path) -> None:
    operations = [
        sample_operation(prompt_of(30, seed=n % 3), snapshot_id=("a", "b", None)[n % 3], seed=n, max_tokens=40)
        for n in range(18)
    ]
    expected = two_adapters.all(operations)
    forget_all(two_adapters)
    shrink(two_adapters, 10)
    for one, other in zip(expected, two_adapters.all(operations), strict=True):
        assert_same(one, other)


def test_the_longest_unused_prompt_goes_first(qwen_folder: Path) -> None:
    driver = Driver(qwen_folder)
    shrink(driver, 8)
    prompts = [prompt_of(33, seed=n) for n in range(3)]
    hits = [driver.sample(prompts[n], max_tokens=1).prompt_cache_hit_tokens for n in (0, 1, 0, 2, 0, 1)]
    assert hits == [0, 0, 33, 0, 33, 16], "the first block of a prompt outlives its second"


def test_what_fits_exactly_is_done_and_one_token_more_is_refused(qwen_folder: Path) -> None:
    driver = Driver(qwen_folder)
    shrink(driver, 4)
    assert len(driver.sample(prompt_of(40), max_tokens=25, stop_token_ids=()).sequences[0].tokens) == 25
    with pytest.raises(InvalidInput, match=r"65 tokens; this engine's holds 64"):
        driver.sample(prompt_of(40), max_tokens=26)
    many = driver.sample(prompt_of(40), max_tokens=25, stop_token_ids=(), num_samples=9, seed=5)
    roomy = Driver(qwen_folder).sample(prompt_of(40), max_tokens=25, stop_token_ids=(), num_samples=9, seed=5)
    assert_same(roomy, many)


@pytest.mark.parametrize("slices", [0, 1, 2, 3, 8])
def test_cancel_frees_blocks_at_any_stage(qwen_folder: Path, slices: int) -> None:
    driver = Driver(qwen_folder, max_prefill_tokens=32, max_decode_batch=4)
    engine = driver.engine
    free = pool(driver).num_free
    engine.accept(0, everything(prompt_of(80), num_samples=7, max_tokens=100, stop_token_ids=()))
    engine.accept(1, sample_operation(prompt_of(80), num_samples=3, max_tokens=100, stop_token_ids=()))
    for _ in range(slices):
        engine.work()
    engine.accept(2, CancelSample(ticket=0))
    engine.accept(3, CancelSample(ticket=1))
    outcomes = dict(engine.work())
    assert sorted(outcomes) == [0, 1, 2, 3]
    assert not engine.has_work
    assert pool(driver).num_free == free
    assert sum(pool(driver)._users) == 0
    assert driver.engine._sampler._computing == {}


@pytest.mark.parametrize("passes", range(1, BLOCK_TOKENS + 1))
def test_a_pass_that_fails_gives_back_the_block_it_was_lent(
    driver: Driver, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = pool(driver).num_free
    driver.engine.accept(0, sample_operation(prompt_of(7), max_tokens=60))
    for _ in range(passes):
        driver.engine.work()
    monkeypatch.setattr(driver.engine._base, "hidden", out_of_memory)
    ((_, outcome),) = driver.engine.work()
    assert isinstance(outcome, ServerError)
    assert pool(driver).num_free == free


def out_of_memory(*_: Any) -> None:
    raise RuntimeError("out of memory")


# ---- what must not leak ----


def test_values_that_are_not_finite_never_meet_another_adapter(two_adapters: Driver) -> None:
    driver, prompt = two_adapters, prompt_of(50)
    shrink(driver, 40)
    healthy = sample_operation(prompt, snapshot_id="b", seed=3, num_samples=4, max_tokens=30)
    expected = driver(healthy)
    driver.create("bad", rank=3)
    driver.randomize("bad", scale=float("inf"))
    driver(PublishSnapshot(model_id="bad", snapshot_id="bad"))
    forget_all(driver)
    bad = [sample_operation(prompt_of(60, n), snapshot_id="bad", seed=n, max_tokens=30) for n in range(6)]
    outcomes = driver.all([*bad[:3], healthy, *bad[3:]])
    assert all("not finite" in str(o) for o in [*outcomes[:3], *outcomes[4:]])
    assert_same(expected, outcomes[3])
    forget_all(driver)
    for rows in driver.engine._sampler._cache._pools():
        rows[1:41].fill_(float("inf"))
    pool(driver)._writers = [b"someone else"] * len(pool(driver)._writers)
    assert_same(expected, driver(healthy))


def test_equal_tokens_of_other_owners_or_after_other_tokens_have_other_keys() -> None:
    tokens = np.arange(64)
    keys = block_keys(b"one", tokens)
    assert len(set(keys)) == 4
    assert not set(keys) & set(block_keys(b"two", tokens))
    assert block_keys(b"one", tokens[:50], keys[:2]) == keys[:3]
    changed = tokens.copy()
    changed[3] = 99
    assert not set(keys) & set(block_keys(b"one", changed))


def test_a_block_whose_content_was_given_up_belongs_to_its_next_owner_alone() -> None:
    """A request fails on the device while another, of the same weights, still reads the beginning of its prompt."""
    blocks = BlockPool(3)
    blocks.open(b"one")
    blocks.open(b"two")
    (shared,) = blocks.take(1, b"one")
    blocks.register(shared, b"key", b"one")
    blocks.share([shared])
    blocks.release([shared], tainted=True)
    blocks.register(shared, b"key", b"one")
    blocks.release([shared])
    taken = blocks.take(2, b"two")
    blocks.register(shared, b"other", b"two")
    blocks.release(taken)
    blocks.forget(b"one")
    assert blocks.find([b"other"]) == [shared]
    blocks.forget(b"two")
    assert sorted(blocks.take(2, b"one")) == sorted(taken)
