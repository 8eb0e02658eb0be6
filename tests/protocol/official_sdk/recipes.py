"""What published recipes rely on, by the numbers of the protocol notes (R1 to R14)."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import numpy as np
import tinker
from kit import MODEL, PROMPT, SENTENCES, Shared, adam, check, datum, draw, failure_of, logprobs_of, policy_datum
from tinker import types
from traps import fails_soon


@check
def r01_leaving_the_service_finishes_the_session() -> None:
    with tinker.ServiceClient() as service:
        trainer = service.create_lora_training_client(MODEL, rank=2).result()
    session_id = trainer.model_id.split(":")[0]
    found = Shared.rest.search_sessions(types.SessionSearchRequest(session_id=session_id)).result().sessions
    assert [(s.session_id, s.status.reason.type) for s in found] == [(session_id, "success")]


@check
def r02_of_a_base_model_and_a_checkpoint_the_checkpoint_is_sampled() -> None:
    path = Shared.trainer.save_weights_for_sampler("r02").result().path
    both = Shared.service.create_sampling_client(model_path=path, base_model=MODEL).result()
    sentence = types.ModelInput.from_ints(SENTENCES[0])
    trained = logprobs_of(Shared.trainer.forward([datum(SENTENCES[0])], "cross_entropy").result())[0]
    np.testing.assert_allclose(both.compute_logprobs(sentence).result()[1:], trained, atol=1e-4)


@check
def r03_a_prompt_of_n_tokens_has_n_logprobs_and_the_first_is_none() -> None:
    for length in (1, 2, 9):
        scored = Shared.sampler.compute_logprobs(types.ModelInput.from_ints(list(range(7, 7 + length)))).result()
        assert len(scored) == length
        assert scored[0] is None
        assert all(isinstance(value, float) for value in scored[1:])


@check
def r04_what_stops_a_sequence_is_part_of_it() -> None:
    tokenizer = Shared.trainer.get_tokenizer()
    free = draw(Shared.sampler, temperature=0.0, stop=[]).sequences[0].tokens
    by_token = draw(Shared.sampler, temperature=0.0, stop=[free[3]]).sequences[0]
    assert (by_token.tokens[-1], by_token.stop_reason) == (free[3], "stop")
    text = tokenizer.decode(free)
    stop = text[len(text) // 2 :][:2]
    by_text = draw(Shared.sampler, temperature=0.0, stop=[stop]).sequences[0]
    assert stop in tokenizer.decode(by_text.tokens)
    assert by_text.stop_reason == "stop"


@check
def r05_sampled_logprobs_are_of_the_scaled_distribution_over_all_tokens() -> None:
    def rows(**params: float) -> list[tuple[int, float]]:
        given = types.SamplingParams(**({"max_tokens": 1, "seed": 3, "stop": []} | params))
        found = Shared.sampler.sample(PROMPT, 1, given, topk_sample_logprobs=5).result().sequences[0].topk_logprobs
        return found[0]

    plain, cold, cut = rows(), rows(temperature=0.5), rows(top_k=2, top_p=0.5)
    assert [token for token, _ in plain] == [token for token, _ in cold]
    for (_, high), (_, low) in pairwise(plain):
        assert high >= low
    gaps = [[row[0][1] - logprob for _, logprob in row[1:]] for row in (plain, cold)]
    np.testing.assert_allclose(gaps[1], [2 * gap for gap in gaps[0]], atol=1e-3)
    np.testing.assert_allclose([lp for _, lp in cut], [lp for _, lp in plain], atol=1e-5)
    drawn = draw(Shared.sampler, seed=4, stop=[]).sequences[0]
    tokens = PROMPT.to_ints() + list(drawn.tokens)
    trained = logprobs_of(Shared.trainer.forward([datum(tokens)], "cross_entropy").result())[0]
    fresh = Shared.trainer.save_weights_and_get_sampling_client().result()
    scored = fresh.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    np.testing.assert_allclose(scored[1:], trained, atol=1e-4)


@check
def r06_a_run_keeps_the_metadata_it_was_made_with() -> None:
    labels = {"renderer_name": "role_colon", "step": "3"}
    made = Shared.service.create_lora_training_client(MODEL, rank=2, user_metadata=labels).result()
    assert Shared.rest.get_training_run(made.model_id).result().user_metadata == labels
    loaded = Shared.service.create_training_client_from_state(Shared.state_path, user_metadata=labels).result()
    assert Shared.rest.get_training_run(loaded.model_id).result().user_metadata == labels


@check
def r07_permanent_errors_end_a_call_at_once() -> None:
    missing = f"tinker://{Shared.trainer.model_id}/weights/r07"
    for action, word in (
        (lambda: Shared.service.create_sampling_client(model_path=missing).result(), "r07"),
        (lambda: Shared.service.create_training_client_from_state(missing).result(), "r07"),
        (lambda: Shared.service.create_lora_training_client("no/model").result(), "no/model"),
        (lambda: Shared.service.create_sampling_client(base_model="no/model").result(), "no/model"),
        (lambda: Shared.rest.get_training_run("no-run").result(), "no-run"),
        (lambda: Shared.rest.get_session("no-session").result(), "no-session"),
        (lambda: Shared.rest.get_sampler("no-sampler").result(), "no-sampler"),
        (lambda: Shared.rest.export_session_trace("no-session").result(), "no-session"),
        (lambda: Shared.rest.copy_weights(missing, "p1").result(), "r07"),
        (lambda: Shared.trainer.forward([datum([5, 999_999])], "cross_entropy").result(), "999999"),
        (lambda: draw(Shared.sampler, max_tokens=10**6), "max_tokens"),
    ):
        fails_soon(action, word)


@check
def r08_a_sampler_for_every_step_is_cheap_and_never_changes() -> None:
    first = Shared.trainer.save_weights_and_get_sampling_client().result()
    before = first.compute_logprobs(PROMPT).result()
    started = time.monotonic()
    for _ in range(10):
        Shared.trainer.forward_backward([datum(SENTENCES[0])], "cross_entropy")
        Shared.trainer.optim_step(adam(learning_rate=1e-3))
        newest = Shared.trainer.save_weights_and_get_sampling_client().result()
    assert time.monotonic() - started < 20
    assert first.compute_logprobs(PROMPT).result() == before
    assert newest.compute_logprobs(PROMPT).result() != before


@check
def r09_the_next_batch_may_be_sent_before_this_one_is_read() -> None:
    trainers = [Shared.service.create_lora_training_client(MODEL, rank=4, seed=3).result() for _ in range(2)]
    data = [datum(sentence) for sentence in SENTENCES]
    ahead = []
    for _ in range(4):
        ahead.append(trainers[0].forward_backward(data, "cross_entropy"))
        trainers[0].optim_step(adam(learning_rate=5e-3))
    one_by_one = []
    for _ in range(4):
        one_by_one.append(trainers[1].forward_backward(data, "cross_entropy").result())
        trainers[1].optim_step(adam(learning_rate=5e-3)).result()
    losses = [future.result().metrics["loss:sum"] for future in ahead]
    np.testing.assert_allclose(losses, [result.metrics["loss:sum"] for result in one_by_one], rtol=1e-3)


@check
def r10_rows_of_no_weight_contribute_nothing() -> None:
    tokens = SENTENCES[3]
    n = len(tokens) - 1
    lp = logprobs_of(Shared.trainer.forward([datum(tokens)], "cross_entropy").result())[0]
    weights = [0.0] * 2 + [1.0] * (n - 2)
    half = Shared.trainer.forward([datum(tokens, weights=weights)], "cross_entropy").result().metrics["loss:sum"]
    assert math.isclose(half, -float(lp[2:].sum()), rel_tol=1e-4)
    inputs = {
        "target_tokens": [0, 0, *tokens[3:]],
        "logprobs": [0.0, 0.0, *lp[2:].tolist()],
        "advantages": [0.0, 0.0] + [1.0] * (n - 2),
    }
    data = [datum(tokens, weights=None, **inputs)]
    loss = Shared.trainer.forward(data, "importance_sampling").result().metrics["loss:sum"]
    assert math.isclose(loss, -(n - 2), rel_tol=1e-4)


@check
def r11_the_unpublished_loss_is_refused_and_another_named() -> None:
    lp = logprobs_of(Shared.trainer.forward([datum(SENTENCES[0])], "cross_entropy").result())[0]
    data = [policy_datum(SENTENCES[0], lp, [1.0] * len(lp))]
    loss = Shared.trainer.forward_backward(data, "stable_reinforce", {"kl_coeff": 0.01})
    fails_soon(lambda: loss.result(), "stable_reinforce", "importance_sampling")
    recording = Shared.service.create_sampling_client(base_model=MODEL, record_stability_info=True).result()
    fails_soon(lambda: draw(recording), "record_stability_info", "importance_sampling")


@check
def r13_samplers_of_several_weights_live_side_by_side() -> None:
    sentence = types.ModelInput.from_ints(SENTENCES[1])
    samplers = [Shared.service.create_sampling_client(base_model=MODEL).result()]
    for number in range(3):
        Shared.trainer.forward_backward([datum(SENTENCES[1])], "cross_entropy")
        Shared.trainer.optim_step(adam(learning_rate=2e-3))
        path = Shared.trainer.save_weights_for_sampler(f"r13-{number}").result().path
        samplers.append(Shared.service.create_sampling_client(model_path=path).result())
    first = [sampler.compute_logprobs(sentence).result() for sampler in samplers]
    second = [future.result() for future in [s.compute_logprobs(sentence) for s in reversed(samplers)]][::-1]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a[1:], b[1:], atol=1e-5)
    sums = [sum(scores[1:]) for scores in first]
    assert sums == sorted(sums), sums
    assert len(set(sums)) == 4


@check
def r14_no_shape_of_a_batch_is_slow() -> None:
    times = []
    for number in range(1, 21):
        data = [datum([5 + (i * number) % 400 for i in range(3 + 7 * number % 60)]) for _ in range(1 + number % 7)]
        started = time.monotonic()
        Shared.trainer.forward_backward(data, "cross_entropy").result()
        times.append(time.monotonic() - started)
    Shared.trainer.optim_step(adam(learning_rate=0.0)).result()
    assert max(times) < 2.5, times


@check
def inflight_samplers_follow_the_weights_and_snapshots_do_not() -> None:
    def fresh(kind: str) -> tinker.SamplingClient:
        return Shared.trainer.save_weights_and_get_sampling_client(kind=kind).result()

    inflight, snapshot = fresh("inflight"), fresh("snapshot")
    before = inflight.compute_logprobs(PROMPT).result()
    Shared.trainer.forward_backward([datum(SENTENCES[2])], "cross_entropy")
    Shared.trainer.optim_step(adam(learning_rate=5e-3)).result()
    assert inflight.compute_logprobs(PROMPT).result() == before
    newest = fresh("inflight")
    np.testing.assert_allclose(
        inflight.compute_logprobs(PROMPT).result()[1:], newest.compute_logprobs(PROMPT).result()[1:], atol=1e-6
    )
    np.testing.assert_allclose(snapshot.compute_logprobs(PROMPT).result()[1:], before[1:], atol=1e-6)
    assert newest.compute_logprobs(PROMPT).result() != before


@check
def a_datum_with_provenance_trains() -> None:
    drawn = draw(Shared.sampler, stop=[]).sequences[0]
    tokens = PROMPT.to_ints() + list(drawn.tokens)
    n = len(tokens) - 1
    num_prompt = PROMPT.length
    prompt = types.PromptProvenanceSpan(sequence_id=drawn.sequence_id, offset=0, length=num_prompt)
    sampled = types.SampledProvenanceSpan(sequence_id=drawn.sequence_id, offset=0, length=n - num_prompt)
    targets = [
        types.PromptProvenanceSpan(sequence_id=drawn.sequence_id, offset=1, length=num_prompt - 1),
        types.SampledProvenanceSpan(sequence_id=drawn.sequence_id, offset=0, length=n - num_prompt + 1),
    ]
    with_spans = datum(tokens).with_provenance(model_input=[prompt, sampled], loss_fn_inputs=targets)
    results = [Shared.trainer.forward([d], "cross_entropy").result() for d in (with_spans, datum(tokens))]
    assert results[0].metrics == results[1].metrics


@check
def a_sample_that_is_given_up_is_cancelled() -> None:
    future = Shared.sampler.sample(PROMPT, 4, types.SamplingParams(max_tokens=200, stop=[]))
    failure_of(lambda: future.result(timeout=0.001))
    assert draw(Shared.sampler).sequences[0].tokens
