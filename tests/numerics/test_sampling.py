"""Drawn tokens and their log-probabilities against `generate`, the trainer, and their own definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.numerics.driver import VOCAB, Driver, item, plain_model, random_datum, sample_operation
from tinsmith.engine.block_pool import BlockPool
from tinsmith.engine.token_choice import ChoiceRules, choose, stream, uniforms
from tinsmith.types import Datum, ModelInput
from tinsmith.types.operations import PublishSnapshot
from tinsmith.types.results import DrawnToken, SampleResponse
from tinsmith.types.tensor import TensorData


@pytest.fixture
def trained(driver: Driver) -> Driver:
    """With a snapshot `s` of a trained adapter."""
    rng = np.random.default_rng(0)
    driver.create("m", rank=3)
    for _ in range(3):
        driver.train(item("m", *(random_datum(rng, 30) for _ in range(3))))
        driver.step("m", learning_rate=0.02)
    driver(PublishSnapshot(model_id="m", snapshot_id="s"))
    return driver


def test_temperature_zero_equals_generate(any_folder: Path) -> None:
    driver, plain, rng = Driver(any_folder), plain_model(any_folder), np.random.default_rng(1)
    prompts = [rng.integers(2, VOCAB, n).tolist() for n in (1, 5, 16, 17, 40)]
    operations = [sample_operation(p, temperature=0.0, max_tokens=40, stop_token_ids=(1,)) for p in prompts]
    for prompt, response in zip(prompts, driver.all(operations), strict=True):
        expected = plain.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=1, pad_token_id=0
        )[0, len(prompt) :]
        assert response.sequences[0].tokens == expected.tolist()


def test_sampler_log_probs_equal_the_trainers(trained: Driver) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (1, 15, 16, 31)]
    responses = trained.all(
        [
            sample_operation(p, snapshot_id="s", num_samples=3, max_tokens=30, seed=5, prompt_logprobs=True)
            for p in prompts
        ]
    )
    for prompt, response in zip(prompts, responses, strict=True):
        assert len(response.prompt_logprobs_np) == len(prompt)
        assert np.isnan(response.prompt_logprobs_np[0])
        for sequence in response.sequences:
            expected = trainer_logprobs(trained, prompt + sequence.tokens)
            assert np.abs(sequence.logprobs_np - expected[len(prompt) - 1 :]).max() <= 1e-4
            if len(prompt) > 1:
                assert np.abs(response.prompt_logprobs_np[1:] - expected[: len(prompt) - 1]).max() <= 1e-4


def test_log_probs_are_those_of_the_scaled_full_distribution(trained: Driver, qwen_folder: Path) -> None:
    plain = plain_model(qwen_folder)
    prompt = [3, 1, 4, 1, 5]
    for temperature, top_k, top_p in [(0.5, -1, 1.0), (2.0, 3, 1.0), (1.0, -1, 0.4), (0.0, -1, 1.0)]:
        response = trained.sample(prompt, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=10)
        tokens = response.sequences[0].tokens
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / (temperature or 1.0), -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert np.abs(response.sequences[0].logprobs_np - expected.numpy()).max() <= 1e-4


@pytest.mark.parametrize("temperature", [1e-9, 1e-38, 1e-300])
def test_almost_no_temperature_takes_the_most_likely_token_for_certain(trained: Driver, temperature: float) -> None:
    (greedy,) = trained.sample([3, 1, 4], temperature=0.0).sequences
    (cold,) = trained.sample([3, 1, 4], temperature=temperature, topk_sample_logprobs=2).sequences
    assert cold.tokens == greedy.tokens
    assert not cold.logprobs_np.any()
    assert np.isfinite(cold.topk_logprobs_np.logprobs).all()


def test_endless_temperature_makes_all_tokens_equally_likely(trained: Driver) -> None:
    (hot,) = trained.sample([3, 1, 4], temperature=1e300).sequences
    assert hot.logprobs_np == pytest.approx(-np.log(VOCAB), rel=1e-6)


def test_the_same_seed_draws_the_same_tokens_in_any_company(trained: Driver) -> None:
    prompt = list(range(2, 20))
    alone = trained.sample(prompt, seed=11, num_samples=4, max_tokens=25, snapshot_id="s")
    crowd = [
        sample_operation(list(range(n, n + 7)), seed=n, max_tokens=n % 40 + 1, snapshot_id="s" if n % 2 else None)
        for n in range(30)
    ]
    wanted = sample_operation(prompt, seed=11, num_samples=4, max_tokens=25, snapshot_id="s")
    outcomes = trained.all([*crowd[:15], wanted, *crowd[15:]])
    assert [s.tokens for s in outcomes[15].sequences] == [s.tokens for s in alone.sequences]
    assert len({tuple(s.tokens) for s in alone.sequences}) == 4
    other = trained.sample(prompt, seed=12, num_samples=4, max_tokens=25, snapshot_id="s")
    assert [s.tokens for s in other.sequences] != [s.tokens for s in alone.sequences]


def test_a_cache_too_small_for_all_changes_nothing_but_time(qwen_folder: Path) -> None:
    operations = [sample_operation([7, n, 9], seed=n, max_tokens=60, num_samples=2) for n in range(12)]
    roomy, tight = Driver(qwen_folder), Driver(qwen_folder, kv_cache_bytes=2**20)
    few = shrink(tight, 24)
    expected = [[s.tokens for s in r.sequences] for r in roomy.all(operations)]
    assert [[s.tokens for s in r.sequences] for r in tight.all(operations)] == expected
    assert pool(tight).num_free == few


def test_sequences_end_where_they_should(trained: Driver) -> None:
    free = trained.sample([4, 5], seed=2, max_tokens=30)
    tokens = free.sequences[0].tokens
    assert (free.sequences[0].stop_reason, len(tokens)) == ("length", 30)
    stop = tokens[10]
    first = tokens.index(stop)
    stopped = trained.sample([4, 5], seed=2, max_tokens=30, stop_token_ids=(stop,))
    assert (stopped.sequences[0].stop_reason, stopped.sequences[0].tokens) == ("stop", tokens[: first + 1])
    exact = trained.sample([4, 5], seed=2, max_tokens=first + 1, stop_token_ids=(stop,))
    assert (exact.sequences[0].stop_reason, len(exact.sequences[0].tokens)) == ("stop", first + 1)
    short = trained.sample([4, 5], seed=2, max_tokens=first, stop_token_ids=(stop,)) if first else None
    assert short is None or short.sequences[0].stop_reason == "length"


def test_top_k_log_probs_are_the_most_likely_tokens(trained: Driver, qwen_folder: Path) -> None:
    plain = plain_model(qwen_folder)
    prompt = [8, 9, 10, 11]
    response = trained.sample(prompt, max_tokens=5, topk_sample_logprobs=3, topk_prompt_logprobs=2, seed=1)
    tokens = response.sequences[0].tokens
    with torch.no_grad():
        logprobs = torch.log_softmax(plain(torch.tensor([prompt + tokens])).logits[0], -1)
    sampled = response.sequences[0].topk_logprobs_np
    assert sampled.token_ids.tolist() == logprobs[3:-1].topk(3).indices.tolist()
    assert np.abs(sampled.logprobs - logprobs[3:-1].topk(3).values.numpy()).max() <= 1e-4
    rows = response.topk_prompt_logprobs
    assert rows[0] is None
    assert [[i for i, _ in row] for row in rows[1:]] == logprobs[:3].topk(2).indices.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_chosen_and_alternative_prompt_tokens_against_fp64(
    trained: Driver, qwen_folder: Path, temperature: float
) -> None:
    plain = plain_model(qwen_folder).double()
    prompt = np.random.default_rng(4).integers(2, VOCAB, 40)
    with torch.no_grad():
        logits = plain(torch.from_numpy(prompt)[None]).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).numpy()
    asked = np.random.default_rng(5).integers(-1, VOCAB, (39, 3))
    asked[:5] = -1
    asked[7, 1] = -1
    dense = trained.sample(
        prompt.tolist(),
        target_prompt_logprobs=TensorData(asked),
        prompt_alt_tokens_k=6,
        temperature=temperature,
        seed=9,
    )
    scores = dense.target_prompt_logprobs.to_numpy()
    wanted = np.where(asked < 0, 0.0, np.take_along_axis(expected, np.maximum(asked, 0), 1))
    assert np.abs(scores - wanted).max() <= 1e-4
    assert (scores[asked < 0] == 0.0).all()
    alternatives = dense.prompt_alt_tokens
    ids = alternatives.tokens.to_numpy()
    scaled = torch.log_softmax(logits / (temperature or 1.0), -1).numpy()
    assert np.abs(alternatives.logprobs.to_numpy() - np.take_along_axis(scaled, ids, 1)).max() <= 1e-4
    if temperature == 0:
        assert (ids == logits.argmax(-1).numpy()[:, None]).all()
    else:
        assert len({tuple(row) for row in ids.T.tolist()}) == 6
    sparse = trained.sample(
        prompt.tolist(), target_prompt_logprobs=TensorData.from_torch_sparse(torch.from_numpy(asked), pad_value=-1)
    )
    assert sparse.target_prompt_logprobs.is_sparse
    assert np.abs(sparse.target_prompt_logprobs.to_numpy() - wanted).max() <= 1e-4


def test_alternative_prompt_tokens_follow_the_distribution(driver: Driver, qwen_folder: Path) -> None:
    with torch.no_grad():
        logits = plain_model(qwen_folder)(torch.tensor([[5, 6]])).logits[0, 0]
    expected = torch.softmax(logits, -1).numpy()
    draws = [driver.sample([5, 6], prompt_alt_tokens_k=100, seed=s, max_tokens=1) for s in range(40)]
    ids = np.concatenate([d.prompt_alt_tokens.tokens.to_numpy().reshape(-1) for d in draws])
    frequencies = np.bincount(ids, minlength=VOCAB) / len(ids)
    assert np.abs(frequencies - expected).max() < 4 * np.sqrt(0.25 / len(ids))
    assert ((frequencies - expected) ** 2 * len(ids) / expected).sum() < VOCAB + 5 * np.sqrt(2 * VOCAB)


RULES = [(1.0, -1, 1.0), (0.7, -1, 1.0), (1.3, 4, 1.0), (1.0, -1, 0.6), (1.0, 5, 0.5)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), RULES)
def test_frequencies_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(3).normal(0, 1.5, 12)
    expected = filtered(logits / temperature, top_k, top_p)
    draws = 40_000
    rules = ChoiceRules.same(draws, temperature, top_k, top_p)
    rows = torch.from_numpy(logits.astype(np.float32)).repeat(draws, 1)
    tokens = choose(rows, rules, uniforms(stream(7, 0), np.arange(draws))).tokens_B
    counts = np.bincount(tokens, minlength=12)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
    assert chi_square < 3 * kept.sum() + 10


def test_uniform_numbers_are_uniform_and_independent_of_each_other() -> None:
    seeds, samples, positions = np.ogrid[:20, :20, :50]
    numbers = uniforms(stream(seeds, samples), positions).reshape(-1)
    assert 0 <= numbers.min() < numbers.max() < 1
    assert len(np.unique(numbers)) == len(numbers)
    assert numbers.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def pool(driver: Driver) -> BlockPool:
    return driver.engine._sampler._cache.blocks


def shrink(driver: Driver, num_blocks: int) -> int:
    """Leave the cache so many blocks to lend."""
    blocks = pool(driver)
    blocks._free = blocks._free[-num_blocks:]
    blocks.num_blocks = num_blocks + 1
    return num_blocks


def filtered(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    if top_k > 0:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


def trainer_logprobs(driver: Driver, tokens: list[int]) -> np.ndarray:
    ones = np.ones(len(tokens) - 1, np.float32)
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": np.array(tokens[1:]), "weights": ones})
    return driver.train(item("m", datum, forward_only=True))[0].logprobs[0].to_numpy()


def test_a_streamed_sample_tells_the_tokens_it_answers_with(driver: Driver) -> None:
    operations = [
        sample_operation([3, 1, 4, 1, 5], num_samples=3, max_tokens=n, seed=n, topk_sample_logprobs=2, stream=n != 9)
        for n in (7, 9, 30)
    ]
    for ticket, operation in enumerate(operations):
        driver.engine.accept(ticket, operation)
    told: dict[int, list[DrawnToken]] = {}
    answers: dict[int, SampleResponse] = {}
    while len(answers) < len(operations):
        for ticket, outcome in driver.engine.work():
            assert ticket not in answers, "nothing comes after the answer"
            if isinstance(outcome, DrawnToken):
                told.setdefault(ticket, []).append(outcome)
            else:
                answers[ticket] = outcome
    assert sorted(told) == [0, 2], "only where it was asked for"
    for ticket, tokens in told.items():
        for index, sequence in enumerate(answers[ticket].sequences):
            mine = [drawn for drawn in tokens if drawn.index == index]
            assert [drawn.token for drawn in mine] == sequence.tokens
            assert [drawn.logprob for drawn in mine] == sequence.logprobs
            assert [list(drawn.topk) for drawn in mine] == sequence.topk_logprobs
            assert [drawn.stop_reason for drawn in mine] == [None] * (len(mine) - 1) + [sequence.stop_reason]
