"""Checks of a running server with the official Tinker SDK; run by that SDK's own interpreter.

Every function below `@check` is one test. One line of JSON per check goes to stdout:
`{"check": name, "ok": bool, "detail": text, "seconds": number}`. They run in order and share one session.
"""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

MODEL = "tinsmith/tiny"
VOCABULARY = 2048
"""At least this many ids exist in the served model."""

CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


class Shared:
    """What later checks take from earlier ones."""

    service: tinker.ServiceClient
    rest: tinker.RestClient
    trainer: tinker.TrainingClient
    sampler: tinker.SamplingClient
    state_path: str
    sampler_path: str


def datum(tokens: Sequence[int], **inputs: Any) -> types.Datum:
    given = {"target_tokens": list(tokens[1:]), "weights": [1.0] * (len(tokens) - 1)} | inputs
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={key: value for key, value in given.items() if value is not None},
    )


def policy_datum(tokens: Sequence[int], logprobs: Sequence[float], advantages: Sequence[float]) -> types.Datum:
    return datum(tokens, weights=None, logprobs=list(logprobs), advantages=list(advantages))


def logprobs_of(result: types.ForwardBackwardOutput) -> list[np.ndarray]:
    return [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]


def adam(**changes: float) -> types.AdamParams:
    return types.AdamParams(**({"learning_rate": 1e-3} | changes))


def failure_of(action: Callable[[], Any], *words: str) -> str:
    """The message of the error that `action` must end with; it must hold all `words`."""
    try:
        outcome = action()
    except Exception as error:  # noqa: BLE001 - whatever the SDK raises
        message = f"{type(error).__name__}: {error}"
        for word in words:
            assert word in message, f"{word!r} is not in {message!r}"
        return message
    raise AssertionError(f"no error; got {outcome!r}")


SENTENCES = [[10 + (7 * i + 3 * j) % 400 for j in range(6 + i % 5)] for i in range(8)]


# ---- a training client ----


@check
def capabilities_name_the_model() -> None:
    models = Shared.rest.get_server_capabilities().result().supported_models
    assert MODEL in [model.model_name for model in models]
    assert all(model.max_context_length > 100 for model in models)


@check
def a_training_client_is_created_and_describes_itself() -> None:
    Shared.trainer = Shared.service.create_lora_training_client(
        MODEL, rank=8, seed=11, user_metadata={"purpose": "protocol test"}
    ).result()
    info = Shared.trainer.get_info()
    assert info.model_data.model_name == MODEL
    assert info.lora_rank == 8
    assert info.is_lora is True


@check
def its_tokenizer_loads_and_round_trips() -> None:
    tokenizer = Shared.trainer.get_tokenizer()
    text = "The tinsmith mends a kettle."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@check
def a_call_of_1025_datums_comes_back_whole_and_in_order() -> None:
    data = [datum([5 + i % 300, 6 + i % 290, 7 + i % 280, 8][: 3 + i % 2]) for i in range(1025)]
    result = Shared.trainer.forward_backward(data, "cross_entropy").result()
    assert len(result.loss_fn_outputs) == 1025
    for index, logprobs in enumerate(logprobs_of(result)):
        assert logprobs.shape == (2 + index % 2,)
    total = -sum(float(logprobs.sum()) for logprobs in logprobs_of(result))
    assert math.isclose(result.metrics["loss:sum"], total, rel_tol=1e-4), (result.metrics, total)
    alone = Shared.trainer.forward([data[1024]], "cross_entropy").result()
    np.testing.assert_allclose(logprobs_of(alone)[0], logprobs_of(result)[1024], atol=1e-4)
    Shared.trainer.optim_step(adam(learning_rate=0.0)).result()


@check
def steps_submitted_ahead_of_their_results_lower_the_loss() -> None:
    data = [datum(sentence) for sentence in SENTENCES]
    futures = []
    for _ in range(6):
        futures.append(Shared.trainer.forward_backward(data, "cross_entropy"))
        futures.append(Shared.trainer.optim_step(adam(learning_rate=5e-3)))
    results = [future.result() for future in futures]
    losses = [result.metrics["loss:sum"] for result in results[::2]]
    assert losses == sorted(losses, reverse=True), losses
    assert losses[-1] < 0.8 * losses[0], losses


@check
def forward_equals_forward_backward_and_leaves_no_gradient() -> None:
    data = [datum(sentence) for sentence in SENTENCES]
    before = Shared.trainer.forward(data, "cross_entropy").result()
    step = Shared.trainer.optim_step(adam(learning_rate=1.0)).result()
    assert step.metrics is not None
    assert step.metrics["step_applied"] == 0
    after = Shared.trainer.forward_backward(data, "cross_entropy").result()
    for a, b in zip(logprobs_of(before), logprobs_of(after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    Shared.trainer.optim_step(adam(learning_rate=0.0)).result()


@check
def optim_step_reports_finite_metrics() -> None:
    Shared.trainer.forward_backward([datum(SENTENCES[0])], "cross_entropy").result()
    metrics = Shared.trainer.optim_step(adam(grad_clip_norm=1.0)).result().metrics
    assert metrics["step_applied"] == 1
    assert all(math.isfinite(value) for value in metrics.values())


@check
def two_dimensional_targets_give_two_dimensional_logprobs() -> None:
    tokens = SENTENCES[0]
    n = len(tokens) - 1
    targets = torch.tensor([[tokens[i + 1], 7, 9] for i in range(n)])
    weights = torch.zeros(n, 3)
    weights[:, 0] = 1.0
    wide = Shared.trainer.forward([datum(tokens, target_tokens=targets, weights=weights)], "cross_entropy").result()
    plain = Shared.trainer.forward([datum(tokens)], "cross_entropy").result()
    assert logprobs_of(wide)[0].shape == (n, 3)
    np.testing.assert_allclose(logprobs_of(wide)[0][:, 0], logprobs_of(plain)[0], atol=1e-5)
    assert math.isclose(wide.metrics["loss:sum"], plain.metrics["loss:sum"], rel_tol=1e-5)


@check
def a_result_of_over_a_megabyte_comes_back_whole() -> None:
    tokens = [5 + i % 500 for i in range(1001)]
    targets = np.stack([(np.arange(1000) + k) % 1000 for k in range(110)], axis=1).astype(np.int64)
    wide = datum(tokens, target_tokens=targets, weights=np.zeros((1000, 110), dtype=np.float32))
    result = Shared.trainer.forward([wide] * 3, "cross_entropy").result()
    assert [lp.shape for lp in logprobs_of(result)] == [(1000, 110)] * 3
    np.testing.assert_allclose(logprobs_of(result)[0], logprobs_of(result)[2], atol=1e-4)


@check
def the_asynchronous_twins_work() -> None:
    async def both() -> tuple[types.ForwardBackwardOutput, types.OptimStepResponse]:
        first = await Shared.trainer.forward_backward_async([datum(SENTENCES[0])], "cross_entropy")
        second = await Shared.trainer.optim_step_async(adam(learning_rate=0.0))
        return await first, await second

    result, step = asyncio.run(both())
    assert result.metrics["loss:sum"] > 0
    assert step.metrics["step_applied"] == 1


# ---- losses ----


def _loss_against(name: str, config: dict[str, float], formula: Callable[..., np.ndarray]) -> None:
    """The reported loss is the formula (float64) of the returned log-probabilities, for ratios on both sides of 1."""
    plain = logprobs_of(Shared.trainer.forward([datum(s) for s in SENTENCES], "cross_entropy").result())
    rng = np.random.default_rng(5)
    old = [lp + rng.normal(0, 0.4, lp.shape) for lp in plain]
    advantages = [rng.normal(0, 1, lp.shape) for lp in plain]
    data = [policy_datum(s, q, a) for s, q, a in zip(SENTENCES, old, advantages, strict=True)]
    result = Shared.trainer.forward(data, name, config or None).result()
    expected = 0.0
    for lp, q, a in zip(logprobs_of(result), old, advantages, strict=True):
        lp, q, a = (x.astype(np.float32).astype(np.float64) for x in (lp, q, a))
        expected -= float(formula(lp, q, a, np.exp(lp - q)).sum())
    assert math.isclose(result.metrics["loss:sum"], expected, rel_tol=1e-4, abs_tol=1e-4), (result.metrics, expected)


@check
def cross_entropy_is_the_negative_weighted_sum() -> None:
    weights = [[0.5, -1.0, 2.0, 0.0, 1.0] + [0.25] * (len(s) - 6) for s in SENTENCES]
    data = [datum(s, weights=w) for s, w in zip(SENTENCES, weights, strict=True)]
    result = Shared.trainer.forward(data, "cross_entropy").result()
    expected = -sum(float((lp * w).sum()) for lp, w in zip(logprobs_of(result), weights, strict=True))
    assert math.isclose(result.metrics["loss:sum"], expected, rel_tol=1e-4, abs_tol=1e-4)


@check
def importance_sampling_is_its_formula() -> None:
    _loss_against("importance_sampling", {}, lambda lp, q, a, r: r * a)


@check
def ppo_is_its_formula() -> None:
    def formula(lp: Any, q: Any, a: Any, r: Any) -> Any:
        return np.minimum(r * a, np.clip(r, 0.9, 1.1) * a)

    _loss_against("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, formula)


@check
def cispo_is_its_formula() -> None:
    _loss_against(
        "cispo",
        {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3},
        lambda lp, q, a, r: np.clip(r, 0.7, 1.3) * lp * a,
    )


@check
def dro_is_its_formula() -> None:
    _loss_against("dro", {"beta": 0.05}, lambda lp, q, a, r: lp * a - 0.5 * 0.05 * (lp - q) ** 2)


@check
def every_loss_trains() -> None:
    for name in ("importance_sampling", "ppo", "cispo", "dro"):
        sentence = SENTENCES[1]
        old = logprobs_of(Shared.trainer.forward([datum(sentence)], "cross_entropy").result())[0]
        data = [policy_datum(sentence, old, [1.0] * len(old))]
        config = {"beta": 0.05} if name == "dro" else None
        Shared.trainer.forward_backward(data, name, config).result()
        assert Shared.trainer.optim_step(adam()).result().metrics["step_applied"] == 1, name


@check
def forward_backward_custom_runs_a_loss_of_ones_own() -> None:
    data = [datum(sentence) for sentence in SENTENCES]
    plain = Shared.trainer.forward(data, "cross_entropy").result()

    def loss(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = -sum(lp.sum() for lp in logprobs)
        return total, {"my_metric": 3.0}

    result = Shared.trainer.forward_backward_custom(data, loss).result()
    assert math.isclose(result.metrics["loss:sum"], plain.metrics["loss:sum"], rel_tol=1e-4)
    assert result.metrics["my_metric"] == 3.0
    assert "surrogate_loss:sum" in result.metrics
    assert Shared.trainer.optim_step(adam()).result().metrics["step_applied"] == 1


# ---- state ----


@check
def a_client_from_state_with_optimizer_continues_as_if_nothing_had_happened() -> None:
    data = [datum(sentence) for sentence in SENTENCES]
    saved = Shared.trainer.save_state("midway", user_metadata={"step": "7"}).result()
    Shared.state_path = saved.path
    assert saved.path == f"tinker://{Shared.trainer.model_id}/weights/midway"
    resumed = Shared.service.create_training_client_from_state_with_optimizer(saved.path).result()
    assert resumed.model_id != Shared.trainer.model_id
    losses = []
    for client in (Shared.trainer, resumed):
        for _ in range(2):
            client.forward_backward(data, "cross_entropy")
            client.optim_step(adam())
        losses.append(logprobs_of(client.forward(data, "cross_entropy").result()))
    for a, b in zip(*losses, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@check
def a_client_from_state_alone_starts_a_fresh_optimizer() -> None:
    fresh = Shared.service.create_training_client_from_state(Shared.state_path).result()
    info = fresh.get_info()
    assert (info.lora_rank, info.model_data.model_name) == (8, MODEL)
    fresh.forward_backward([datum(SENTENCES[0])], "cross_entropy").result()
    assert fresh.optim_step(adam()).result().metrics["step_applied"] == 1


@check
def overwriting_a_name_needs_to_be_asked_for() -> None:
    failure_of(lambda: Shared.trainer.save_state("midway").result(), "midway")
    Shared.trainer.save_state("midway", overwrite=True).result()


@check
def state_loads_into_a_live_model() -> None:
    data = [datum(sentence) for sentence in SENTENCES]
    reference = logprobs_of(Shared.trainer.forward(data, "cross_entropy").result())
    Shared.trainer.forward_backward(data, "cross_entropy")
    Shared.trainer.optim_step(adam(learning_rate=1e-2)).result()
    moved = logprobs_of(Shared.trainer.forward(data, "cross_entropy").result())
    assert max(float(abs(a - b).max()) for a, b in zip(moved, reference, strict=True)) > 1e-3
    Shared.trainer.load_state_with_optimizer(Shared.state_path).result()
    back = logprobs_of(Shared.trainer.forward(data, "cross_entropy").result())
    for a, b in zip(back, reference, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# ---- sampling ----

PROMPT = types.ModelInput.from_ints([20, 21, 22, 23])


def draw(client: tinker.SamplingClient, num_samples: int = 1, **params: Any) -> types.SampleResponse:
    given = {"max_tokens": 12, "seed": 5, "temperature": 1.0} | params
    return client.sample(PROMPT, num_samples, types.SamplingParams(**given)).result()


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


# ---- lists ----


@check
def the_run_is_listed_with_its_metadata_and_checkpoints() -> None:
    run = Shared.rest.get_training_run(Shared.trainer.model_id).result()
    assert run.base_model == MODEL
    assert run.lora_rank == 8
    assert run.user_metadata == {"purpose": "protocol test"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == Shared.state_path
    assert run.last_sampler_checkpoint is not None
    assert run.last_sampler_checkpoint.tinker_path == Shared.sampler_path
    runs = Shared.rest.list_training_runs(limit=2).result()
    assert len(runs.training_runs) == 2
    assert runs.cursor.total_count >= 3
    assert Shared.rest.get_training_run_by_tinker_path(Shared.state_path).result() == run


@check
def checkpoints_are_listed_published_dated_and_deleted() -> None:
    rest, run_id = Shared.rest, Shared.trainer.model_id
    path = Shared.trainer.save_state("short-lived", ttl_seconds=7200).result().path

    def listed() -> dict[str, Any]:
        return {c.tinker_path: c for c in rest.list_checkpoints(run_id).result().checkpoints}

    assert listed()[path].expires_at is not None
    assert (listed()[path].size_bytes or 0) > 0
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert listed()[path].expires_at is None
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert listed()[path].public is True
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert listed()[path].public is False
    assert rest.list_user_checkpoints(limit=1).result().checkpoints[0].tinker_path == path
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert path not in listed()
    failure_of(lambda: rest.delete_checkpoint_from_tinker_path(path).result(), "404", "short-lived")


@check
def weights_info_sessions_and_samplers_are_described() -> None:
    info = Shared.rest.get_weights_info_by_tinker_path(Shared.state_path).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 8)
    sessions = Shared.rest.list_sessions(limit=5).result().sessions
    mine = Shared.trainer.model_id.split(":")[0]
    assert mine in sessions
    session = Shared.rest.get_session(mine).result()
    assert Shared.trainer.model_id in session.training_run_ids
    assert session.sampler_ids
    sampler = Shared.rest.get_sampler(session.sampler_ids[0]).result()
    assert sampler.base_model == MODEL


# ---- bad input harms nobody ----


def _trains(client: tinker.TrainingClient) -> None:
    assert client.forward([datum(SENTENCES[0])], "cross_entropy").result().metrics["loss:sum"] > 0


def _bad_training(
    *words: str, loss: str = "cross_entropy", config: Any = None, data: Any = None, **inputs: Any
) -> None:
    data = [datum(SENTENCES[0]), datum(SENTENCES[1], **inputs)] if data is None else data
    message = failure_of(lambda: Shared.trainer.forward_backward(data, loss, config).result(), *words)
    assert "RequestFailedError" in message
    _trains(Shared.trainer)


@check
def an_unknown_loss_is_named() -> None:
    _bad_training("'hinge'", "importance_sampling", loss="hinge")
    _bad_training("stable_reinforce", "importance_sampling", loss="stable_reinforce")


@check
def an_unknown_loss_input_is_named() -> None:
    _bad_training("data[1]", "rewards", rewards=np.ones(6, dtype=np.float32))


@check
def a_missing_loss_input_is_named() -> None:
    _bad_training("data[1]", "weights", weights=None)


@check
def an_unknown_loss_setting_is_named() -> None:
    _bad_training("temperature", loss="ppo", config={"temperature": 2.0})


@check
def a_wrong_length_is_named() -> None:
    _bad_training("data[1]", "weights", "(3,)", weights=[1.0, 1.0, 1.0])


@check
def a_token_outside_the_vocabulary_is_named() -> None:
    n = len(SENTENCES[1]) - 1
    _bad_training("data[1]", "target_tokens", "999999", target_tokens=[999999] + [5] * (n - 1))
    _bad_training("data[1]", "999999", data=[datum(SENTENCES[0]), datum([999999, 5, 6])])


@check
def a_number_that_is_none_is_named() -> None:
    n = len(SENTENCES[1]) - 1
    _bad_training("data[1]", "weights", "nan", weights=[float("nan")] + [1.0] * (n - 1))


@check
def a_context_too_long_is_named() -> None:
    longest = max(m.max_context_length for m in Shared.rest.get_server_capabilities().result().supported_models)
    _bad_training(str(longest), data=[datum([5] * (longest + 2))])


@check
def one_bad_datum_of_1030_fails_the_call_and_the_client_lives_on() -> None:
    data = [datum([5, 6, 7]) for _ in range(1029)] + [datum([5, 6, 7], weights=[1.0])]
    _bad_training("weights", data=data)
    Shared.trainer.optim_step(adam(learning_rate=0.0)).result()


@check
def an_unknown_model_or_shape_is_named() -> None:
    create = Shared.service.create_lora_training_client
    failure_of(lambda: create("nobody/nothing").result(), "nobody/nothing", MODEL)
    failure_of(lambda: create(MODEL, rank=0).result(), "rank", "0")
    failure_of(lambda: create(MODEL, rank=100_000).result(), "rank", "100000")
    failure_of(lambda: Shared.service.create_sampling_client(base_model="nobody/nothing").result(), "nobody/nothing")
    _trains(Shared.trainer)


@check
def a_missing_checkpoint_is_named() -> None:
    path = f"tinker://{Shared.trainer.model_id}/weights/never-saved"
    failure_of(lambda: Shared.service.create_training_client_from_state(path).result(), "never-saved")
    failure_of(lambda: Shared.service.create_sampling_client(model_path=path).result(), "never-saved")
    failure_of(lambda: Shared.service.create_training_client_from_state("/etc/passwd").result(), "/etc/passwd")
    _trains(Shared.trainer)


@check
def bad_optimizer_settings_are_named() -> None:
    failure_of(lambda: Shared.trainer.optim_step(adam(learning_rate=-1.0)).result(), "learning_rate", "-1")
    failure_of(lambda: Shared.trainer.optim_step(adam(beta1=1.5)).result(), "beta1", "1.5")
    _trains(Shared.trainer)


@check
def bad_checkpoint_names_are_named() -> None:
    failure_of(lambda: Shared.trainer.save_state("a b").result(), "'a b'")
    failure_of(lambda: Shared.trainer.save_state("ok", ttl_seconds=5).result(), "ttl_seconds", "5")
    _trains(Shared.trainer)


@check
def bad_samples_are_named_and_harm_nobody() -> None:
    futures = [draw_later(seed=i) for i in range(8)]
    for words, params in (
        (("top_k", "1000000"), {"top_k": 1_000_000}),
        (("temperature", "-1"), {"temperature": -1.0}),
        (("top_p", "1.5"), {"top_p": 1.5}),
        (("max_tokens", "0"), {"max_tokens": 0}),
        (("stop", "999999"), {"stop": [999999]}),
        (("max_tokens", "100000"), {"max_tokens": 100_000}),
    ):
        failure_of(lambda params=params: draw(Shared.sampler, **params), *words)
    outside = types.ModelInput.from_ints([5, 999999])
    failure_of(lambda: Shared.sampler.compute_logprobs(outside).result(), "999999")
    failure_of(lambda: Shared.sampler.compute_logprobs(types.ModelInput.empty()).result(), "prompt")
    failure_of(lambda: draw(Shared.sampler, 0), "num_samples")
    assert all(future.result().sequences for future in futures)


def draw_later(**params: Any) -> Any:
    return Shared.sampler.sample(PROMPT, 1, types.SamplingParams(**({"max_tokens": 10} | params)))


@check
def what_is_not_supported_says_so() -> None:
    failure_of(lambda: Shared.trainer.save_weights_external("e1").result(), "save_weights_external", "not supported")
    failure_of(lambda: Shared.rest.copy_weights(Shared.state_path, "p1").result(), "copy_weights", "not supported")
    _trains(Shared.trainer)


# ---- the end ----


@check
def closing_the_session_is_accepted() -> None:
    Shared.service.close("success").result()


def main() -> None:
    Shared.service = tinker.ServiceClient()
    Shared.rest = Shared.service.create_rest_client()
    wanted = set(sys.argv[1:])
    for function in CHECKS:
        if wanted and function.__name__ not in wanted:
            continue
        started = time.perf_counter()
        try:
            function()
            ok, detail = True, ""
        except Exception:  # noqa: BLE001 - the boundary of one check
            ok, detail = False, traceback.format_exc()
        seconds = time.perf_counter() - started
        print(json.dumps({"check": function.__name__, "ok": ok, "detail": detail, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
