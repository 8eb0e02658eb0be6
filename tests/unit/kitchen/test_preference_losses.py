"""Every preference loss, value and gradient, against its formula in torch's float64 and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from tinsmith.kitchen import RECIPES, ConfigError
from tinsmith.kitchen.preferences import WITHOUT_REFERENCE, PairScores, PreferenceLoss, make_loss, preference_loss
from tinsmith.types import Datum, ModelInput, TensorData

BETA, GAMMA = 0.3, 0.7
Formula = Callable[..., torch.Tensor]


def dpo(c: Any, r: Any, rc: Any, rr: Any, nc: Any, nr: Any) -> torch.Tensor:
    return -logsigmoid(BETA * ((c - rc) - (r - rr))).mean()


def ipo(c: Any, r: Any, rc: Any, rr: Any, nc: Any, nr: Any) -> torch.Tensor:
    return (((c - rc) - (r - rr) - 1 / (2 * BETA)) ** 2).mean()


def simpo(c: Any, r: Any, rc: Any, rr: Any, nc: Any, nr: Any) -> torch.Tensor:
    return -logsigmoid(BETA * (c / nc - r / nr) - GAMMA).mean()


def orpo(c: Any, r: Any, rc: Any, rr: Any, nc: Any, nr: Any) -> torch.Tensor:
    def log_odds(x: torch.Tensor) -> torch.Tensor:
        return x - torch.log(1 - torch.exp(x))

    return (-(c / nc) - BETA * logsigmoid(log_odds(c / nc) - log_odds(r / nr))).mean()


def kto(c: Any, r: Any, rc: Any, rr: Any, nc: Any, nr: Any) -> torch.Tensor:
    of_chosen, of_rejected = c - rc, r - rr
    good = 1 - torch.sigmoid(BETA * (of_chosen - of_rejected.mean().clamp(min=0).detach()))
    bad = 1 - torch.sigmoid(BETA * (of_chosen.mean().clamp(min=0).detach() - of_rejected))
    return torch.cat([good, bad]).mean()


FORMULAS: dict[str, Formula] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo, "kto": kto}


def test_every_loss_has_its_formula_here() -> None:
    assert FORMULAS.keys() == set(get_args(PreferenceLoss))


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("seed", range(4))
def test_ck_41_a_preference_loss_is_its_formula(kind: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_pairs = int(rng.integers(1, 6))
    tokens = rng.integers(1, 9, size=(2, num_pairs)).astype(np.float64)
    sums = -rng.uniform(0.2, 3.0, size=(2, num_pairs)) * tokens
    reference = sums + rng.normal(size=(2, num_pairs))
    chosen, rejected = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in sums)
    expected = FORMULAS[kind](chosen, rejected, *torch.from_numpy(reference), *torch.from_numpy(tokens))
    expected.backward()
    scores = PairScores(
        chosen_P=sums[0], rejected_P=sums[1], reference_chosen_P=reference[0], reference_rejected_P=reference[1],
        chosen_tokens_P=tokens[0], rejected_tokens_P=tokens[1],
    )  # fmt: skip
    found = preference_loss(kind, scores, beta=BETA, gamma=GAMMA)
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert found.d_chosen_P == pytest.approx(chosen.grad.numpy(), rel=1e-9)
    assert found.d_rejected_P == pytest.approx(rejected.grad.numpy(), rel=1e-9)


@pytest.mark.parametrize("kind", FORMULAS)
def test_gradients_lie_on_the_answers_and_go_up_for_the_chosen(kind: Any) -> None:
    def datum(weights: list[float]) -> Datum:
        inputs = {
            "target_tokens": TensorData.from_numpy(np.arange(len(weights))),
            "weights": TensorData.from_numpy(np.asarray(weights, dtype=np.float32)),
        }
        return Datum(model_input=ModelInput.from_ints(list(range(len(weights)))), loss_fn_inputs=inputs)

    data = [datum([0, 1, 1]), datum([0, 1, 0])]
    logprobs = [np.full(3, -0.5, dtype=np.float32)] * 2
    reference = (-1.0, -0.5) if kind not in WITHOUT_REFERENCE else (0.0, 0.0)
    found = make_loss(kind, [reference], beta=BETA, gamma=GAMMA)(data, logprobs)
    chosen, rejected = found.gradients
    assert chosen[0] == rejected[0] == rejected[2] == 0
    assert chosen[1] == chosen[2] < 0 < rejected[1]


def test_gamma_of_another_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gamma=0.25 is of loss='simpo', not of 'dpo'"):
        RECIPES["dpo"].make({"gamma": 0.25})
