"""Every preference loss, value and gradient, against its formula in torch's float64 and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from tinsmith.kitchen import RECIPES, ConfigError
from tinsmith.kitchen.preferences import WITHOUT_REFERENCE, PairScores, PreferenceLoss, make_loss, preference_loss
from tinsmith.kitchen.recipes import DpoConfig
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


@pytest.mark.parametrize(("chosen", "rejected"), [(-1.0, 0.0), (0.0, -1.0), (0.0, 0.0), (1e-7, 1e-7)])
def test_orpo_of_an_answer_that_is_certain_is_finite(chosen: float, rejected: float) -> None:
    zero, tokens = np.zeros(1), np.full(1, 3.0)
    scores = PairScores(
        chosen_P=np.full(1, chosen), rejected_P=np.full(1, rejected),
        reference_chosen_P=zero, reference_rejected_P=zero, chosen_tokens_P=tokens, rejected_tokens_P=tokens,
    )  # fmt: skip
    found = preference_loss("orpo", scores, beta=0.1, gamma=0.0)
    assert np.isfinite([found.loss, found.metrics["margin"]]).all()
    assert np.isfinite([found.d_chosen_P, found.d_rejected_P]).all()
    assert found.d_chosen_P[0] < 0 < found.d_rejected_P[0]
    assert np.sign(found.metrics["margin"]) == np.sign(chosen - rejected)


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


def test_the_margin_is_the_difference_of_the_rewards_that_the_loss_compares() -> None:
    scores = PairScores(
        chosen_P=np.asarray([-8.0]), rejected_P=np.asarray([-3.0]), reference_chosen_P=np.asarray([-10.0]),
        reference_rejected_P=np.asarray([-2.0]), chosen_tokens_P=np.asarray([8.0]), rejected_tokens_P=np.asarray([1.0]),
    )  # fmt: skip
    rewards = {"dpo": (2.0, -1.0), "kto": (2.0, -1.0), "simpo": (-1.0, -3.0)}
    for kind, (chosen, rejected) in rewards.items():
        found = preference_loss(cast(PreferenceLoss, kind), scores, beta=BETA, gamma=GAMMA).metrics
        assert (found["chosen_reward"], found["rejected_reward"]) == pytest.approx((BETA * chosen, BETA * rejected))
        assert found["margin"] == pytest.approx(BETA * (chosen - rejected))


def test_likelier_counts_pairs_by_log_probability_per_token_without_a_reference() -> None:
    scores = PairScores(
        chosen_P=np.asarray([-8.0, -8.0]), rejected_P=np.asarray([-3.0, -3.0]),
        reference_chosen_P=np.asarray([-10.0, -10.0]), reference_rejected_P=np.asarray([-2.0, -2.0]),
        chosen_tokens_P=np.asarray([8.0, 2.0]), rejected_tokens_P=np.asarray([1.0, 1.0]),
    )  # fmt: skip
    found = preference_loss("dpo", scores, beta=BETA, gamma=GAMMA)
    assert (found.metrics["accuracy"], scores.likelier) == (1.0, 0.5)


def test_a_loss_brings_its_own_defaults_and_what_is_set_counts() -> None:
    def keys(**settings: Any) -> tuple[float, float]:
        config = DpoConfig.model_validate({**RECIPES["dpo"].all_defaults(), **settings})
        return config.beta, config.learning_rate

    assert keys() == keys(loss="ipo") == keys(loss="kto") == (0.1, 1e-3)
    assert keys(loss="simpo") == (2.0, 2e-3)
    assert keys(loss="orpo") == (0.1, 2e-3)
    assert keys(loss="simpo", beta=0.1, learning_rate=1e-3) == (0.1, 1e-3)
