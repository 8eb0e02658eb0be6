"""Sampling clients: what they draw, score and remember."""

from __future__ import annotations

import pickle

import numpy as np
import tinker
import torch
from kit import MODEL, PROMPT, SENTENCES, Shared, adam, check, datum, draw, logprobs_of
from tinker import types

# ---- sampling ----


@check
def a_sampling_client_of_the_live_weights_draws_four() -> None:
    Shared.sampler = Shared.trainer.save_weights_and_get_sampling_client()
    response = draw(Shared.sampler, 4)
    assert len(response.sequences) == 4
    assert len({tuple(sequence.tokens) for sequence in response.sequences}) > 1
    for sequence in response.sequences:
        assert 1 <= len(sequence.tokens) <= 12
        assert sequence.logprobs is not None
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert all(-50 < logprob <= 0 for logprob in sequence.logprobs)
        assert sequence.stop_reason == ("length" if len(sequence.tokens) == 12 else "stop")
        assert sequence.sequence_id


@check
def the_same_seed_gives_the_same_tokens() -> None:
    first, again, other = draw(Shared.sampler, 2), draw(Shared.sampler, 2), draw(Shared.sampler, 2, seed=6)
    assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]
    assert [s.tokens for s in first.sequences] != [s.tokens for s in other.sequences]


@check
def a_seed_may_be_any_integer() -> None:
    for seed in (0, 2**63, 2**70, -1):
        assert draw(Shared.sampler, seed=seed).sequences[0].tokens


@check
def temperature_zero_takes_the_likeliest_token() -> None:
    response = draw(Shared.sampler, 2, temperature=0.0, stop=[])
    a, b = (sequence.tokens for sequence in response.sequences)
    assert a == b
    assert len(a) == 12
    top = Shared.sampler.sample(
        PROMPT, 1, types.SamplingParams(max_tokens=12, temperature=0.0, stop=[]), topk_sample_logprobs=2
    ).result()
    rows = top.sequences[0].topk_logprobs
    assert rows is not None
    assert [row[0][0] for row in rows] == a


@check
def a_stop_token_ends_a_sequence_and_belongs_to_it() -> None:
    free = draw(Shared.sampler, temperature=0.0, stop=[]).sequences[0].tokens
    stopped = draw(Shared.sampler, temperature=0.0, stop=[free[4]]).sequences[0]
    assert stopped.tokens == free[: free.index(free[4]) + 1]
    assert stopped.stop_reason == "stop"


@check
def a_stop_string_ends_a_sequence() -> None:
    tokenizer = Shared.trainer.get_tokenizer()
    free = draw(Shared.sampler, temperature=0.0, stop=[]).sequences[0].tokens
    text = tokenizer.decode(free)
    stop = text[len(text) // 2 :][:2]
    stopped = draw(Shared.sampler, temperature=0.0, stop=[stop]).sequences[0]
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free[: len(stopped.tokens)]
    assert stop in tokenizer.decode(stopped.tokens)
    assert stop not in tokenizer.decode(stopped.tokens[:-1])


@check
def compute_logprobs_equals_the_trainer() -> None:
    for sentence in SENTENCES[:3]:
        scored = Shared.sampler.compute_logprobs(types.ModelInput.from_ints(sentence)).result()
        trained = logprobs_of(Shared.trainer.forward([datum(sentence)], "cross_entropy").result())[0]
        assert len(scored) == len(sentence)
        assert scored[0] is None
        np.testing.assert_allclose(np.array(scored[1:], dtype=np.float64), trained, atol=1e-4)


@check
def sampled_logprobs_equal_scored_ones() -> None:
    drawn = draw(Shared.sampler, seed=9, stop=[]).sequences[0]
    whole = PROMPT.to_ints() + list(drawn.tokens)
    scored = Shared.sampler.compute_logprobs(types.ModelInput.from_ints(whole)).result()
    np.testing.assert_allclose(drawn.logprobs, scored[PROMPT.length :], atol=1e-4)


@check
def prompt_logprobs_and_their_alternatives_come_together() -> None:
    response = Shared.sampler.sample(
        PROMPT, 1, types.SamplingParams(max_tokens=2), include_prompt_logprobs=True, topk_prompt_logprobs=3
    ).result()
    assert response.prompt_logprobs is not None
    assert len(response.prompt_logprobs) == 4
    assert response.prompt_logprobs[0] is None
    assert response.topk_prompt_logprobs is not None
    assert response.topk_prompt_logprobs[0] is None
    assert [len(row) for row in response.topk_prompt_logprobs[1:] if row] == [3, 3, 3]
    last = Shared.sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result()
    assert last[:2] == [None, None]
    np.testing.assert_allclose(last[2:], response.prompt_logprobs[2:], atol=1e-5)


@check
def chosen_prompt_tokens_are_scored_dense_and_sparse() -> None:
    own = Shared.sampler.compute_logprobs(PROMPT).result()
    ids = torch.full((3, 8), -1)  # the SDK sends sparse only what is smaller that way
    ids[:, 0] = torch.tensor([21, 22, 23])
    ids[0, 1], ids[2, 7] = 5, 9
    one_token = types.SamplingParams(max_tokens=1)
    dense = Shared.sampler.sample(
        PROMPT, 1, one_token, target_prompt_logprobs=types.TensorData.from_torch(ids)
    ).result()
    scores = dense.target_prompt_logprobs
    assert scores is not None
    assert scores.dtype == "float32"
    np.testing.assert_allclose(scores.to_numpy()[:, 0], own[1:], atol=1e-5)
    assert scores.to_numpy()[1, 1] == 0.0
    assert (scores.to_numpy() < 0).sum() == 5
    sparse = Shared.sampler.sample(
        PROMPT, 1, one_token, target_prompt_logprobs=types.TensorData.from_torch_sparse(ids, pad_value=-1)
    ).result()
    assert sparse.target_prompt_logprobs is not None
    assert sparse.target_prompt_logprobs.sparse_crow_indices == [0, 2, 3, 5]
    np.testing.assert_allclose(sparse.target_prompt_logprobs.to_numpy(), scores.to_numpy(), atol=1e-5)


@check
def alternative_prompt_tokens_are_drawn_at_every_position() -> None:
    def ask() -> types.SampleResponse:
        params = types.SamplingParams(max_tokens=1, seed=3)
        return Shared.sampler.sample(PROMPT, 1, params, prompt_alt_tokens_k=4).result()

    response, again = ask(), ask()
    alternatives, repeated = response.prompt_alt_tokens, again.prompt_alt_tokens
    assert alternatives is not None
    assert repeated is not None
    assert alternatives.tokens.to_numpy().shape == (3, 4)
    np.testing.assert_array_equal(alternatives.tokens.to_numpy(), repeated.tokens.to_numpy())
    targets = types.TensorData.from_torch(torch.from_numpy(alternatives.tokens.to_numpy().astype(np.int64)))
    scored = Shared.sampler.sample(
        PROMPT, 1, types.SamplingParams(max_tokens=1), target_prompt_logprobs=targets
    ).result()
    assert scored.target_prompt_logprobs is not None
    np.testing.assert_allclose(alternatives.logprobs.to_numpy(), scored.target_prompt_logprobs.to_numpy(), atol=1e-5)


@check
def a_repeated_prompt_comes_from_the_cache() -> None:
    prompt = types.ModelInput.from_ints([11 + i % 300 for i in range(70)])
    params = types.SamplingParams(max_tokens=5, seed=1)
    first = Shared.sampler.sample(prompt, 2, params).result()
    second = Shared.sampler.sample(prompt, 2, params).result()
    assert first.prompt_cache_hit_tokens == 0
    assert second.prompt_cache_hit_tokens == 70
    assert [s.tokens for s in first.sequences] == [s.tokens for s in second.sequences]


@check
def a_sampler_stays_as_it_was_while_training_goes_on() -> None:
    before = draw(Shared.sampler, 2)
    Shared.trainer.forward_backward([datum(sentence) for sentence in SENTENCES], "cross_entropy")
    Shared.trainer.optim_step(adam(learning_rate=2e-2)).result()
    newer = Shared.trainer.save_weights_and_get_sampling_client()
    after = draw(Shared.sampler, 2)
    assert [s.tokens for s in before.sequences] == [s.tokens for s in after.sequences]
    old = Shared.sampler.compute_logprobs(types.ModelInput.from_ints(SENTENCES[0])).result()
    new = newer.compute_logprobs(types.ModelInput.from_ints(SENTENCES[0])).result()
    assert max(abs(a - b) for a, b in zip(old[1:], new[1:], strict=True)) > 1e-3


@check
def a_named_sampler_checkpoint_is_sampled_by_its_path() -> None:
    Shared.sampler_path = Shared.trainer.save_weights_for_sampler("for-sampling").result().path
    assert Shared.sampler_path == f"tinker://{Shared.trainer.model_id}/sampler_weights/for-sampling"
    by_path = Shared.service.create_sampling_client(model_path=Shared.sampler_path).result()
    assert by_path.get_base_model() == MODEL
    from_trainer = Shared.trainer.create_sampling_client(Shared.sampler_path).result()
    assert [s.tokens for s in draw(by_path).sequences] == [s.tokens for s in draw(from_trainer).sequences]


@check
def base_model_and_checkpoint_together_mean_the_checkpoint() -> None:
    both = Shared.service.create_sampling_client(model_path=Shared.sampler_path, base_model=MODEL).result()
    base = Shared.service.create_sampling_client(base_model=MODEL).result()
    sentence = types.ModelInput.from_ints(SENTENCES[0])
    trained = logprobs_of(Shared.trainer.forward([datum(SENTENCES[0])], "cross_entropy").result())[0]
    np.testing.assert_allclose(both.compute_logprobs(sentence).result()[1:], trained, atol=1e-4)
    assert abs(np.array(base.compute_logprobs(sentence).result()[1:]) - trained).max() > 1e-2


@check
def a_pickled_sampler_and_a_handle_draw_the_same() -> None:
    expected = [s.tokens for s in draw(Shared.sampler).sequences]
    copy = pickle.loads(pickle.dumps(Shared.sampler))
    assert [s.tokens for s in draw(copy).sequences] == expected
    handle = Shared.sampler.get_sampler_handle()
    rebuilt = tinker.SamplingClient.from_sampler_handle(handle, api_key="tml-local")
    assert [s.tokens for s in draw(rebuilt).sequences] == expected


@check
def sixty_four_samples_at_once_all_come_back() -> None:
    futures = [Shared.sampler.sample(PROMPT, 2, types.SamplingParams(max_tokens=1 + i % 7, seed=i)) for i in range(64)]
    for i, future in enumerate(futures):
        sequences = future.result().sequences
        assert len(sequences) == 2
        assert all(len(sequence.tokens) <= 1 + i % 7 for sequence in sequences)
