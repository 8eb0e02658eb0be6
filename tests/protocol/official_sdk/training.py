"""Training clients, losses, saved state."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kit import MODEL, SENTENCES, Shared, adam, check, datum, failure_of, logprobs_of, policy_datum
from tinker import types

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
def gspo_is_its_formula_and_bounds_may_be_given_per_token() -> None:
    plain = logprobs_of(Shared.trainer.forward([datum(s) for s in SENTENCES], "cross_entropy").result())
    rng = np.random.default_rng(6)
    data, expected = [], 0.0
    for sentence, lp in zip(SENTENCES, plain, strict=True):
        q, a = lp + rng.normal(0, 0.3, lp.shape), rng.normal(0, 1, lp.shape)
        mask = (np.arange(len(lp)) > 1).astype(np.float64)
        low = rng.uniform(0.8, 1.0, lp.shape)
        bounds = {"clip_low_threshold": low.tolist(), "sequence_ratio_mask": mask.tolist()}
        data.append(datum(sentence, weights=None, logprobs=q.tolist(), advantages=a.tolist(), **bounds))
        s = np.exp((lp - q)[mask != 0].mean())
        expected -= np.minimum(s * a, np.clip(s, low, 1.05) * a).sum()
    result = Shared.trainer.forward(data, "gspo", {"clip_high_threshold": 1.05}).result()
    assert math.isclose(result.metrics["loss:sum"], expected, rel_tol=1e-3, abs_tol=1e-3), (result.metrics, expected)


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


def grpo(
    logprobs: torch.Tensor, advantages: torch.Tensor, old: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A clipped policy gradient, averaged over each sequence."""
    ratio = torch.exp(logprobs - old)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = torch.nn.functional.softplus(old - logprobs).mean()
    loss = -surrogate[advantages != 0].sum() / logprobs.shape[0] + scale * kl
    return loss, {"custom/kl:mean": kl.detach(), "custom/tokens:sum": (advantages != 0).sum()}


def _grpo_data(count: int) -> list[types.Datum]:
    rng = np.random.default_rng(9)
    data = []
    for index in range(count):
        tokens = SENTENCES[index % len(SENTENCES)]
        n = len(tokens) - 1
        arrays = {"advantages": rng.normal(0, 1, n), "old": rng.normal(-6, 1, n), "scale": np.asarray(0.5)}
        data.append(datum(tokens, weights=None, **{key: a.astype(np.float32) for key, a in arrays.items()}))
    return data


@check
def a_traced_loss_on_the_server_equals_the_same_in_the_client_and_direct_autograd() -> None:
    ranks = {"logprobs": 1, "advantages": 1, "old": 1, "scale": 0}
    handle = Shared.traced_loss = Shared.service.create_custom_loss(grpo, ranks).result()
    assert handle.loss_id is not None
    data = _grpo_data(5)
    clients = [Shared.service.create_lora_training_client(MODEL, rank=4, seed=5).result() for _ in range(3)]
    there = clients[0].forward_backward_custom(data, handle).result()
    here = clients[1].forward_backward_custom(data, dataclasses.replace(handle, loss_id=None)).result()
    leaves = [torch.from_numpy(lp.copy()).requires_grad_() for lp in logprobs_of(there)]
    found = [
        grpo(leaf, *(d.loss_fn_inputs[key].to_torch() for key in ("advantages", "old", "scale")))
        for leaf, d in zip(leaves, data, strict=True)
    ]
    total = sum(loss for loss, _ in found)
    total.backward()
    surrogates = [datum(SENTENCES[i % len(SENTENCES)], weights=(-leaf.grad).tolist()) for i, leaf in enumerate(leaves)]
    clients[2].forward_backward(surrogates, "cross_entropy").result()
    for result in (there, here):
        assert math.isclose(result.metrics["loss:sum"], total.item(), rel_tol=1e-4), (result.metrics, total)
        kl = np.mean([metrics["custom/kl:mean"].item() for _, metrics in found])
        assert math.isclose(result.metrics["custom/kl:mean"], kl, rel_tol=1e-4)
        assert result.metrics["custom/tokens:sum"] == sum(len(leaf) for leaf in leaves)
    assert "surrogate_loss:sum" in here.metrics
    assert "surrogate_loss:sum" not in there.metrics
    moved = []
    for client in clients:
        client.optim_step(
            adam(learning_rate=1e-2, eps=1.0)
        ).result()  # such an eps makes the step linear in the gradient
        moved.append(
            np.concatenate(logprobs_of(client.forward([datum(s) for s in SENTENCES], "cross_entropy").result()))
        )
    before = np.concatenate(logprobs_of(clients[0].forward([datum(s) for s in SENTENCES], "cross_entropy").result()))
    np.testing.assert_allclose(moved[0], before, atol=1e-6)
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-4)
    np.testing.assert_allclose(moved[0], moved[2], atol=1e-4)


@check
def a_traced_loss_over_several_requests_is_summed_and_averaged() -> None:
    config = {"loss_id": Shared.traced_loss.loss_id}
    data = _grpo_data(1030)
    whole = Shared.trainer.forward(data, "custom", config).result()
    parts = [Shared.trainer.forward(part, "custom", config).result() for part in (data[:500], data[500:])]
    assert math.isclose(whole.metrics["loss:sum"], sum(p.metrics["loss:sum"] for p in parts), rel_tol=1e-4)
    means = [part.metrics["custom/kl:mean"] for part in parts]
    assert math.isclose(whole.metrics["custom/kl:mean"], (500 * means[0] + 530 * means[1]) / 1030, rel_tol=1e-4)


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
