"""Advantages against their formulas, written out plainly in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tinsmith.kitchen.advantages import Advantages, Earned, gae


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 of arXiv 1506.02438 term by term."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas))) for t in range(len(deltas))
    ]


def test_ck_42_gae_is_its_formula() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rewards, values = rng.normal(size=(2, rng.integers(1, 9)))
        gamma, lam = rng.uniform(0.5, 1.0, size=2)
        found = gae(rewards, values, gamma=gamma, lam=lam)
        assert found == pytest.approx(plain_gae(list(rewards), list(values), gamma, lam), abs=1e-12)


def test_ck_42_without_discount_gae_is_reward_less_the_mean_of_the_others() -> None:
    group = [Earned(rewards=(reward,), num_tokens=(size,)) for reward, size in ((1.0, 3), (0.0, 1), (0.5, 2))]
    plain = Advantages(rule="gae", gamma=1.0, lam=1.0).of_group(group)
    others = Advantages(rule="leave_one_out").of_group(group)
    for first, second, expected in zip(plain, others, (0.75, -0.75, 0.0), strict=True):
        assert first == pytest.approx(second)
        assert first == pytest.approx(np.full(len(first), expected))


def test_ck_42_gae_gives_tokens_far_from_the_reward_less_of_it() -> None:
    group = [Earned(rewards=(1.0,), num_tokens=(3,)), Earned(rewards=(0.0,), num_tokens=(2,))]
    first, second = Advantages(rule="gae", gamma=1.0, lam=0.5).of_group(group)
    assert first == pytest.approx([0.25, 0.5, 1.0])
    assert second == pytest.approx([-0.5, -1.0])


def test_ck_42_gae_of_several_turns_compares_with_those_who_came_so_far() -> None:
    """The baseline of the second turn is the only other episode that had one."""
    group = [
        Earned(rewards=(0.0, 0.5), num_tokens=(1, 1)),
        Earned(rewards=(0.0, 0.0), num_tokens=(1, 1)),
        Earned(rewards=(1.0,), num_tokens=(1,)),
    ]
    first, second, third = Advantages(rule="gae", gamma=1.0, lam=1.0).of_group(group)
    assert first == pytest.approx([0.5 - 0.5, 0.5 - 0.0])
    assert second == pytest.approx([0.0 - 0.75, 0.0 - 0.5])
    assert third == pytest.approx([1.0 - 0.25])


def test_ck_42_group_advantages_are_centred_and_may_have_unit_spread() -> None:
    group = [Earned(rewards=(reward,), num_tokens=(2,)) for reward in (1.0, 0.0, 0.0, 1.0)]
    assert [float(a[0]) for a in Advantages().of_group(group)] == [0.5, -0.5, -0.5, 0.5]
    assert [float(a[0]) for a in Advantages(normalize=True).of_group(group)] == [1.0, -1.0, -1.0, 1.0]
    same = [Earned(rewards=(0.3,), num_tokens=(2,))] * 3
    assert not any(a.any() for a in Advantages(normalize=True).of_group(same))


@pytest.mark.parametrize("rule", ["group", "leave_one_out", "gae"])
def test_an_episode_without_company_has_no_advantage(rule: str) -> None:
    (alone,) = Advantages(rule=rule).of_group([Earned(rewards=(1.0,), num_tokens=(4,))])  # type: ignore[arg-type]
    assert alone.tolist() == [0.0] * 4
