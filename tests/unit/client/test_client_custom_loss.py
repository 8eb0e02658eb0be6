"""Losses computed by the client, against torch's own differentiation of the same linear model."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.client.fake_tinker import FAST, FakeTinker, no_connection, status
from tinsmith import types
from tinsmith.client import LossHandle, RequestFailedError, ServiceClient, TrainingClient

TARGETS = ([0, 3, 3], [5, 1], [7])


def data() -> list[types.Datum]:
    return [
        types.Datum(
            types.ModelInput.from_ints([1] * len(targets)),
            {"target_tokens": list(targets), "advantages": [0.5 * (i + 1)] * len(targets)},
        )
        for i, targets in enumerate(TARGETS)
    ]


def curved(datums: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Not linear, not a sum over datums, and with data of its own."""
    advantages = [datum.loss_fn_inputs["advantages"].to_torch() for datum in datums]
    total = torch.stack([(a * lp.exp()).sum() for a, lp in zip(advantages, logprobs, strict=True)]).sum()
    loss = total**2 + logprobs[0][0] * logprobs[1][1]
    return loss, {"mean_prob:mean": float(total.detach())}


def direct_gradient(server: FakeTinker) -> tuple[float, np.ndarray]:
    """The loss, and its gradient with respect to the fake model's table."""
    table = torch.tensor(server.table.astype(np.float32), requires_grad=True)
    loss, _ = curved(data(), [table[torch.tensor(targets)] for targets in TARGETS])
    loss.backward()
    assert table.grad is not None
    return float(loss.detach()), table.grad.numpy()


def test_the_gradient_is_that_of_direct_differentiation(training: TrainingClient, server: FakeTinker) -> None:
    loss, gradient = direct_gradient(server)
    output = training.forward_backward_custom(data(), curved).result(5)
    np.testing.assert_allclose(server.gradient, gradient, rtol=1e-5, atol=1e-7)
    assert output.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    assert output.metrics["surrogate_loss:sum"] != output.metrics["loss:sum"]
    assert output.metrics["mean_prob:mean"] > 0
    assert [len(tensor.data) for tensor in output.logprobs] == [3, 2, 1]


def test_chunks_take_forward_numbers_first_and_backward_numbers_after() -> None:
    server = FakeTinker(flags={"fwdbwd_max_chunk_len": 2})
    with ServiceClient(base_url="http://f.test", api_key="k", timing=FAST, transport=server) as service:
        training = service.create_lora_training_client("m").result(5)
        _, gradient = direct_gradient(server)
        custom = training.forward_backward_custom(data(), curved)
        step = training.optim_step(types.AdamParams())
        custom.result(5)
        step.result(5)
    np.testing.assert_allclose(server.gradient, gradient, rtol=1e-5, atol=1e-7)
    assert server.submitted() == [2, 1, 4, 3, 5]
    passes = [seen.body["request"] for seen in server.of("forward_backward")]
    assert [(p.forward_only, len(p.data), p.loss_fn) for p in passes] == [
        (True, 1, "cross_entropy"), (True, 2, "cross_entropy"), (False, 1, "cross_entropy"), (False, 2, "cross_entropy")
    ]  # fmt: skip
    assert {key for p in passes for datum in p.data for key in datum.loss_fn_inputs} == {"target_tokens", "weights"}


def test_top_k_targets_have_log_probabilities_in_their_shape(training: TrainingClient) -> None:
    shapes: list[tuple[int, ...]] = []

    def loss(_: object, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        shapes.extend(tuple(tensor.shape) for tensor in logprobs)
        return -logprobs[0].sum(), {}

    targets = types.Datum(types.ModelInput.from_ints([1, 1]), {"target_tokens": [[1, 2, 3], [4, 5, 6]]})
    output = training.forward_backward_custom([targets], loss).result(5)
    assert shapes == [(2, 3)]
    assert output.metrics["loss:sum"] == pytest.approx(0.2 + 0.3 + 0.4 + 0.5 + 0.6 + 0.7)


def failing(_: object, __: object) -> Any:
    raise ZeroDivisionError("in the user's loss")


def constant(_: object, __: object) -> Any:
    return torch.tensor(1.0), {}


def vector(_: object, logprobs: list[torch.Tensor]) -> Any:
    return logprobs[0], {}


def not_finite(_: object, logprobs: list[torch.Tensor]) -> Any:
    return (logprobs[0] * float("nan")).sum(), {}


def only_a_loss(_: object, logprobs: list[torch.Tensor]) -> Any:
    return logprobs[0].sum()


def without_metrics(_: object, logprobs: list[torch.Tensor]) -> Any:
    return logprobs[0].sum(), None


def many_numbers(_: object, logprobs: list[torch.Tensor]) -> Any:
    return logprobs[0].sum(), {"all:sum": logprobs[0].detach()}


def exhausted(_: object, __: object) -> Any:
    return next(iter([]))


def leaving(_: object, __: object) -> Any:
    raise SystemExit(2)


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (failing, ZeroDivisionError, "in the user's loss"),
        (constant, ValueError, "does not depend on the log-probabilities"),
        (vector, ValueError, "must return \\(scalar tensor, metrics\\), not Tensor\\[3\\] and dict"),
        (not_finite, ValueError, "gradient of the custom loss is not finite for data\\[0\\]"),
        (only_a_loss, ValueError, "must return \\(scalar tensor, metrics\\), not Tensor\\[\\]"),
        (without_metrics, ValueError, "must return \\(scalar tensor, metrics\\), not Tensor\\[\\] and NoneType"),
        (many_numbers, ValueError, "metric 'all:sum' of the custom loss is no number"),
        (exhausted, RuntimeError, "the custom loss raised StopIteration"),
        (leaving, SystemExit, "2"),
    ],
)
def test_a_loss_that_fails_leaves_the_client_usable_and_no_gap_in_the_numbers(
    training: TrainingClient, server: FakeTinker, loss: Any, kind: type[BaseException], message: str
) -> None:
    future = training.forward_backward_custom(data(), loss)
    step = training.optim_step(types.AdamParams())
    with pytest.raises(kind, match=message):
        future.result(5)
    assert step.result(5).metrics == {"step:sum": 1.0}
    assert server.submitted() == [1, 2, 3]
    assert server.of("forward_backward")[1].body["request"].forward_only
    assert not server.gradient.any()


def test_a_forward_pass_that_fails_is_the_failure_of_the_call(training: TrainingClient, server: FakeTinker) -> None:
    server.results["s:train:0:1"] = {"error": "too long", "category": "user"}
    with pytest.raises(RequestFailedError, match="too long"):
        training.forward_backward_custom(data(), curved).result(5)
    server.script("forward_backward", status(400))
    with pytest.raises(Exception, match="Error code: 400"):
        training.forward_backward_custom(data(), curved).result(5)
    training.optim_step(types.AdamParams()).result(5)
    assert server.submitted() == [1, 2, 3, 4, 5]


def test_a_lost_server_is_not_asked_to_fill_gaps(training: TrainingClient, server: FakeTinker) -> None:
    server.always["forward_backward"] = no_connection()
    with pytest.raises(Exception, match="Connection error"):
        training.forward_backward_custom(data(), curved).result(5)
    assert set(server.submitted()) == {1}


def test_bad_arguments_fail_without_using_numbers(training: TrainingClient, server: FakeTinker) -> None:
    bare = types.Datum(types.ModelInput.from_ints([1]), {})
    with pytest.raises(ValueError, match=r"data\[0\].loss_fn_inputs has no 'target_tokens'"):
        training.forward_backward_custom([bare], curved).result(5)
    with pytest.raises(ValueError, match="must be a function or a LossHandle, not 7"):
        training.forward_backward_custom(data(), 7).result(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data is empty"):
        training.forward_backward_custom([], curved).result(5)
    with pytest.raises(ValueError, match="loss_type_input must be 'logprobs'"):
        training.forward_backward_custom(data(), curved, loss_type_input="logits")
    assert server.seen == []


def test_the_loss_runs_beside_the_loop_so_heartbeats_and_results_go_on(
    training: TrainingClient, service: ServiceClient
) -> None:
    inside, proceed = threading.Event(), threading.Event()

    def slow(_: object, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        inside.set()
        assert proceed.wait(5)
        return -logprobs[0].sum(), {}

    future = training.forward_backward_custom(data(), slow)
    assert inside.wait(5)
    assert service.create_lora_training_client("m").result(5).model_id == "s:train:1"
    proceed.set()
    future.result(5)


def test_a_loss_per_datum_is_summed_over_the_datums(service: ServiceClient, server: FakeTinker) -> None:
    def weighted(logprobs: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = -(advantages * logprobs).sum()
        return loss, {"custom/tokens:sum": torch.tensor(float(len(logprobs)))}

    handle = service.create_custom_loss(weighted, {"logprobs": 1, "advantages": 1}).result(5)
    assert isinstance(handle, LossHandle)
    training = service.create_lora_training_client("m").result(5)
    output = training.forward_backward_custom(data(), handle).result(5)
    expected = np.zeros(16)
    for i, targets in enumerate(TARGETS):
        np.subtract.at(expected, targets, 0.5 * (i + 1))
    np.testing.assert_allclose(server.gradient, expected, rtol=1e-6)
    assert output.metrics["custom/tokens:sum"] == 6.0
    wrong = service.create_custom_loss(weighted, {"logprobs": 1, "advantages": 2}).result(5)
    with pytest.raises(ValueError, match=r"data\[0\]: advantages has 1 dimensions, but weighted declares 2"):
        training.forward_backward_custom(data(), wrong).result(5)


def test_a_metric_may_be_a_tensor_that_has_a_gradient(training: TrainingClient) -> None:
    def loss(_: object, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total = -logprobs[0].sum()
        return total, {"mine:sum": total}

    output = training.forward_backward_custom(data(), loss).result(5)  # type: ignore[arg-type]
    assert output.metrics["mine:sum"] == output.metrics["loss:sum"]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"logprobs": 1}, "must name the parameters"),
        ({"logprobs": 0, "advantages": 1}, r"input_ranks\['logprobs'\] must be 1 or 2, not 0"),
        ({"logprobs": 1, "advantages": 3}, r"input_ranks\['advantages'\] must be 0, 1 or 2, not 3"),
    ],
)
def test_loss_handles_are_checked_when_made(service: ServiceClient, ranks: dict[str, int], message: str) -> None:
    def fn(logprobs: torch.Tensor, advantages: torch.Tensor) -> Any:
        return (logprobs * advantages).sum(), {}

    with pytest.raises(ValueError, match=message):
        service.create_custom_loss(fn, ranks).result(5)
