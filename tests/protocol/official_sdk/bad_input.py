"""Bad input is named and harms nobody; and the end of the session."""

from __future__ import annotations

from typing import Any

import numpy as np
import tinker
import torch
from kit import MODEL, PROMPT, SENTENCES, Shared, adam, check, datum, draw, failure_of
from tinker import types

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
def another_optimizer_is_refused_by_its_name() -> None:
    config = tinker.DimuonOptimizerConfig()
    failure_of(
        lambda: Shared.service.create_lora_training_client(MODEL, rank=4, optimizer=config).result(), "dimuon", "adamw"
    )
    params = tinker.DimuonParams(learning_rate=1e-3)
    failure_of(lambda: Shared.trainer.optim_step(params).result(), "dimuon", "AdamW")
    _trains(Shared.trainer)


def _svd(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.linalg.svdvals(logprobs[None]).sum(), {}


def _in_place(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return logprobs.exp_().sum(), {}


def _pair(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return logprobs[:2], {}


def _weighted(logprobs: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (logprobs * scores).sum(), {}


@check
def a_traced_loss_that_cannot_run_is_named() -> None:
    for fn, words in ((_svd, ("linalg_svdvals", "_svd")), (_in_place, ("'exp_'", "_in_place"))):
        failure_of(lambda fn=fn: Shared.service.create_custom_loss(fn, {"logprobs": 1}).result(), *words)
    pair = Shared.service.create_custom_loss(_pair, {"logprobs": 1}).result()
    data = [datum(SENTENCES[0])]
    failure_of(lambda: Shared.trainer.forward_backward_custom(data, pair).result(), "_pair", "scalar", "(2,)")
    weighted = Shared.service.create_custom_loss(_weighted, {"logprobs": 1, "scores": 1}).result()
    config = {"loss_id": weighted.loss_id}
    _bad_training("data[0]", "'scores'", "missing", loss="custom", config=config, data=data)
    wide = [datum(SENTENCES[0], scores=np.ones((5, 1), dtype=np.float32))]
    _bad_training("data[0]", "'scores'", "(5, 1)", loss="custom", config=config, data=wide)
    _bad_training("'nobody'", loss="custom", config={"loss_id": "nobody"}, data=data)
    _bad_training("loss_id", loss="custom", data=data)
    _trains(Shared.trainer)


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
    encrypted = Shared.trainer.save_weights_external("e2", age_encryption_recipients=["age1x"])
    failure_of(lambda: encrypted.result(), "age_encryption_recipients", "not supported")
    _trains(Shared.trainer)


# ---- the end ----


@check
def closing_the_session_is_accepted() -> None:
    Shared.service.close("success").result()
