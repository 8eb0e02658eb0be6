"""The traps of the protocol that the SDK itself falls into, by their numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import tinker
import torch
from kit import MODEL, PROMPT, SENTENCES, Shared, adam, check, datum, draw, failure_of, logprobs_of
from tinker import types

SOON_S = 10.0
"""A permanent error that the SDK does not retry is known by then; one that it retries takes minutes."""


def fails_soon(action: Callable[[], Any], *words: str) -> str:
    started = time.monotonic()
    message = failure_of(action, *words)
    assert time.monotonic() - started < SOON_S, f"{message} came after {time.monotonic() - started:.0f} s"
    return message


def trains() -> None:
    result = Shared.trainer.forward([datum(SENTENCES[0])], "cross_entropy").result(timeout=30)
    assert result.metrics["loss:sum"] > 0


@check
def t01_a_bad_datum_in_a_later_chunk_fails_the_call_and_the_client_does_not_hang() -> None:
    data = [datum([5, 6, 7]) for _ in range(2100)]
    data[1500] = datum([5, 6, 7], weights=[1.0])
    fails_soon(lambda: Shared.trainer.forward_backward(data, "cross_entropy").result(timeout=60), "weights")
    trains()
    Shared.trainer.optim_step(adam(learning_rate=0.0)).result(timeout=30)


@check
def t02_chunks_sent_before_the_first_are_taken_at_once() -> None:
    data = [datum([5 + i % 200, 6, 7]) for i in range(2060)]
    result = Shared.trainer.forward(data, "cross_entropy").result(timeout=120)
    assert len(result.loss_fn_outputs) == 2060
    for index in (0, 1024, 2059):
        alone = Shared.trainer.forward([data[index]], "cross_entropy").result()
        np.testing.assert_allclose(logprobs_of(result)[index], logprobs_of(alone)[0], atol=1e-4)


@check
def t03_waiting_for_a_result_takes_few_polls() -> None:
    requests: list[str] = []
    transport = tinker._base_client.AsyncAPIClient
    original = transport.request  # every request of the SDK goes through it

    async def counted(self: Any, cast_to: Any, options: Any, *rest: Any, **named: Any) -> Any:
        requests.append(options.url)
        return await original(self, cast_to, options, *rest, **named)

    transport.request = counted
    try:
        data = [datum([5 + i % 400 for i in range(500)]) for _ in range(24)]
        started = time.monotonic()
        Shared.trainer.forward(data, "cross_entropy").result()
        seconds = time.monotonic() - started
    finally:
        transport.request = original
    polls = sum(url.endswith("/retrieve_future") for url in requests)
    assert 1 <= polls <= 2 + seconds / 10, (requests, seconds)


@check
def t04_a_400_is_reported_and_not_retried() -> None:
    fails_soon(
        lambda: Shared.rest.set_checkpoint_ttl_from_tinker_path(Shared.state_path, 5).result(), "400", "ttl_seconds"
    )


@check
def t05_what_is_taken_already_fails_at_once() -> None:
    path = Shared.trainer.save_state("t05").result().path
    fails_soon(lambda: Shared.trainer.save_state("t05").result(), "t05")
    fails_soon(lambda: [Shared.trainer.save_weights_for_sampler("t05").result() for _ in range(2)], "t05")
    for _ in range(2):
        Shared.rest.publish_checkpoint_from_tinker_path(path).result(timeout=SOON_S)
    for _ in range(2):
        Shared.rest.unpublish_checkpoint_from_tinker_path(path).result(timeout=SOON_S)


@check
def t06_arrays_come_as_protobuf() -> None:
    trains()
    assert draw(Shared.sampler).sequences[0].tokens


@check
def t07_every_sequence_has_an_id_of_its_own() -> None:
    ids = [sequence.sequence_id for _ in range(2) for sequence in draw(Shared.sampler, 3).sequences]
    assert len(set(ids)) == 6


@check
def t08_metrics_of_several_chunks_are_combined() -> None:
    data = [datum([5, 6, 7]) for _ in range(1030)]
    whole = Shared.trainer.forward(data, "cross_entropy").result().metrics
    one = Shared.trainer.forward(data[:1], "cross_entropy").result().metrics
    assert all(name.count(":") == 1 for name in whole), whole
    assert abs(whole["loss:sum"] - 1030 * one["loss:sum"]) < 1e-3 * whole["loss:sum"]


@check
def t10_a_model_made_from_a_checkpoint_has_the_id_that_the_sdk_assumes() -> None:
    client = Shared.service.create_training_client_from_state(Shared.state_path).result()
    session_id, kind, number = client.model_id.split(":")
    assert (kind, number.isdigit()) == ("train", True)
    assert client.get_info().model_id == client.model_id
    assert Shared.rest.get_training_run(client.model_id).result().training_run_id == client.model_id
    assert session_id == Shared.trainer.model_id.split(":")[0]


@check
def t11_a_checkpoint_named_like_a_route_is_still_a_checkpoint() -> None:
    for name in ("publish", "ttl", "archive", "v1.2:x@y"):
        path = Shared.trainer.save_state(name).result().path
        Shared.rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
        Shared.rest.publish_checkpoint_from_tinker_path(path).result()
        assert Shared.rest.get_weights_info_by_tinker_path(path).result().lora_rank == 8
        Shared.rest.delete_checkpoint_from_tinker_path(path).result()


@check
def t13_a_client_is_configured_and_made_in_a_moment() -> None:
    started = time.monotonic()
    with tinker.ServiceClient() as service:
        service.create_sampling_client(base_model=MODEL).result()
    assert time.monotonic() - started < SOON_S


@check
def t15_nothing_asks_for_payment() -> None:
    Shared.rest.get_server_capabilities().result(timeout=SOON_S)
    tinker.AdminClient().get_current_checkpoint_storage_usage().result(timeout=SOON_S)


@check
def t16_a_refused_request_uses_up_its_number() -> None:
    futures = [Shared.trainer.optim_step(adam(learning_rate=value)) for value in (-1.0, 0.0, -2.0, 0.0)]
    for index, future in enumerate(futures):
        if index % 2:
            future.result(timeout=30)
        else:
            fails_soon(lambda future=future: future.result(), "learning_rate")


@check
def t17_reaching_the_limit_is_not_a_stop() -> None:
    assert draw(Shared.sampler, stop=[]).sequences[0].stop_reason == "length"
    token = draw(Shared.sampler, temperature=0.0, stop=[]).sequences[0].tokens[0]
    stopped = draw(Shared.sampler, temperature=0.0, stop=[token]).sequences[0]
    assert (stopped.stop_reason, stopped.tokens) == ("stop", [token])


@check
def t18_the_trainer_finds_its_tokenizer() -> None:
    assert Shared.trainer.get_info().model_data.tokenizer_id
    assert Shared.trainer.get_tokenizer().encode("a kettle")


@check
def t19_whoami_reads_an_identity_from_the_token() -> None:
    identity = Shared.rest.whoami().result()
    assert identity.user_urn
    assert identity.org_urn.startswith("tml:organization:")
    assert identity.email is None


@check
def t20_hundreds_of_open_polls_delay_nobody() -> None:
    futures = [Shared.sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=40, seed=i)) for i in range(300)]
    session_id = Shared.trainer.model_id.split(":")[0]
    times = []
    with httpx.Client(base_url=str(Shared.base_url), headers={"x-api-key": "tml-x"}) as http:
        for _ in range(20):
            started = time.perf_counter()
            http.post("/api/v1/session_heartbeat", json={"session_id": session_id}).raise_for_status()
            times.append(time.perf_counter() - started)
            time.sleep(0.02)
    assert all(future.result().sequences for future in futures)
    assert statistics.median(times) < 0.1, times


@check
def t21_requests_without_a_body_are_taken() -> None:
    path = Shared.trainer.save_state("t21").result().path
    Shared.rest.publish_checkpoint_from_tinker_path(path).result()
    Shared.rest.delete_checkpoint_from_tinker_path(path).result()


@check
def t22_sparse_targets_and_weights_are_the_same_as_dense_ones() -> None:
    tokens = SENTENCES[2]
    n = len(tokens) - 1
    targets, weights = torch.zeros(n, 30, dtype=torch.int64), torch.zeros(n, 30)
    targets[:, 0] = torch.tensor(tokens[1:])
    weights[1:, 0] = 0.5
    weights[0, 7] = 2.0
    sparse = datum(tokens, target_tokens=targets, weights=weights)
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    dense = datum(tokens, target_tokens=targets.numpy(), weights=weights.numpy())
    results = [Shared.trainer.forward([d], "cross_entropy").result() for d in (sparse, dense)]
    assert abs(results[0].metrics["loss:sum"] - results[1].metrics["loss:sum"]) < 1e-4
    np.testing.assert_allclose(logprobs_of(results[0])[0], logprobs_of(results[1])[0], atol=1e-5)


@check
def t23_bodies_are_compressed_and_read() -> None:
    assert Shared.service.holder._client_config.proto_compress_fwdbwd is True
    trains()


@check
def t25_finished_requests_are_not_taken_for_failures() -> None:
    trainer = Shared.service.create_lora_training_client(MODEL, rank=2).result()
    trainer.forward_backward([datum(SENTENCES[0])], "cross_entropy").result()
    trainer.optim_step(adam()).result()
    state = trainer.save_state("t25").result()
    trainer.save_weights_for_sampler("t25").result()
    trainer.save_weights_external("t25").result()
    trainer.load_state_with_optimizer(state.path).result()


@check
def t26_small_answers_come_at_once() -> None:
    times = []
    with httpx.Client(base_url=str(Shared.base_url)) as http:
        for _ in range(30):
            started = time.perf_counter()
            http.get("/api/v1/healthz").raise_for_status()
            times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.03, times
