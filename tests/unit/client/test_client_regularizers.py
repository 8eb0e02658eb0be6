"""Regularizers: values by hand, gradients against torch's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.unit.client.fake_tinker import FakeTinker
from tinsmith.client import TrainingClient, regularizers
from tinsmith.client.regularizers import RegularizerSpec, regularized
from tinsmith.types import Datum, ModelInput

LOGPROBS = [[-0.5, -1.0], [-2.0, -0.25]]
REFERENCE = [[-0.7, -0.9], [-1.0, -0.5]]


def data() -> list[Datum]:
    return [
        Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "logprobs": reference}) for reference in REFERENCE
    ]


def tensors() -> list[torch.Tensor]:
    return [torch.tensor(row, requires_grad=True) for row in LOGPROBS]


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def base(_: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return -torch.stack([lp.sum() for lp in logprobs]).sum(), {"mine:sum": 1.0}


PAIRS = list(zip(flat(LOGPROBS), flat(REFERENCE), strict=True))
REVERSE = sum(math.exp(p) * (p - q) for p, q in PAIRS)
FORWARD = sum(math.exp(q) * (q - p) for p, q in PAIRS)


@pytest.mark.parametrize(
    ("term", "value"),
    [
        (regularizers.l1(), 3.75),
        (regularizers.l2(), 5.3125),
        (regularizers.elastic_net(0.25), 0.25 * 3.75 + 0.75 * 5.3125),
        (regularizers.entropy(), sum(math.exp(p) * p for p in flat(LOGPROBS))),
        (regularizers.kl("reverse"), REVERSE),
        (regularizers.kl("forward"), FORWARD),
        (regularizers.kl("symmetric"), (REVERSE + FORWARD) / 2),
        (regularizers.consistency(), 1.5**2 + 0.75**2),
        (regularizers.orthogonality(), (0.5 * 2.0 + 1.0 * 0.25) ** 2 / (1.25 * 4.0625)),
        (regularizers.gradient_penalty(base, target=0.5), 1.5**2),
    ],
)
def test_terms_have_the_values_one_computes_by_hand(term: Any, value: float) -> None:
    assert float(term(data(), tensors()).detach()) == pytest.approx(value, rel=1e-5)


def test_the_total_is_the_base_and_the_weighted_terms_and_tells_each() -> None:
    async def constant(_: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        return logprobs[0].sum() * 0 + 7.0

    specs = [
        RegularizerSpec(fn=regularizers.l2(), weight=0.1, name="l2"),
        RegularizerSpec(fn=constant, weight=2.0, name="constant"),
    ]
    logprobs = tensors()
    loss, metrics = regularized(base, specs)(data(), logprobs)
    assert float(loss.detach()) == pytest.approx(3.75 + 0.53125 + 14.0)
    assert metrics["base_loss:sum"] == pytest.approx(3.75)
    assert metrics["mine:sum"] == 1.0
    assert metrics["reg/l2/value:sum"] == pytest.approx(5.3125)
    assert metrics["reg/l2/contribution:sum"] == pytest.approx(0.53125)
    assert metrics["reg/l2/grad_norm:max"] == pytest.approx(0.2 * math.sqrt(5.3125))
    assert metrics["reg/constant/grad_norm:max"] == 0.0
    loss.backward()
    expected = [[-1 + 0.2 * value for value in row] for row in LOGPROBS]
    for lp, row in zip(logprobs, expected, strict=True):
        assert lp.grad is not None
        torch.testing.assert_close(lp.grad, torch.tensor(row))


def test_a_regularized_loss_trains(training: TrainingClient, server: FakeTinker) -> None:
    loss = regularized(base, [RegularizerSpec(fn=regularizers.l1(), weight=1.0, name="l1")])
    one = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})
    result = training.forward_backward_custom([one], loss).result(20)
    assert result.metrics["loss:sum"] == pytest.approx(2 * 0.7)
    assert result.metrics["reg/l1/contribution:sum"] == pytest.approx(0.7)
    assert server.gradient[2] == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegularizerSpec(fn=regularizers.l1(), weight=1.0, name="a:b"), "without :"),
        (lambda: regularized(base, [RegularizerSpec(fn=regularizers.l1(), weight=1.0, name="a")] * 2), "own"),
        (lambda: regularizers.elastic_net(2.0), "l1_ratio"),
        (lambda: regularizers.kl("sideways"), "sideways"),  # type: ignore[arg-type]
        (lambda: regularizers.consistency()(data()[:1], tensors()[:1]), "pairs"),
        (lambda: regularizers.kl(reference="none")(data(), tensors()), "has no 'none'"),
        (
            lambda: regularized(base, [RegularizerSpec(fn=lambda *_: 3.0, weight=1.0, name="a")])(data(), tensors()),  # type: ignore[arg-type,return-value]
            "scalar tensor",
        ),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
