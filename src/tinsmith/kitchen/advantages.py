"""Advantages of drawn tokens, from rewards alone.

The Tinker API trains log-probabilities and has no value head, so there is no learned critic here. What stands in its
place is a baseline from the other episodes of a group:

    group           reward less the group's mean                                  (GRPO, arXiv 2402.03300)
    leave_one_out   reward less the mean of the others                            (RLOO, arXiv 2402.14740)
    gae             generalized advantage estimation per token (arXiv 1506.02438); in place of a critic stands the mean
                    reward of the others from the same turn on: V is constant within a turn and sees none of its tokens

With one turn, gamma = 1 and lambda = 1, `gae` is `leave_one_out`; a smaller lambda gives tokens far from the reward
less of it, which is all that GAE can do without a critic.
"""

# T drawn token of an episode, E episode of a group

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

AdvantageRule: TypeAlias = Literal["group", "leave_one_out", "gae"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Earned:
    """What an episode earned, and by how many tokens: one entry per turn."""

    rewards: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def total(self) -> float:
        return float(sum(self.rewards))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """How a workflow turns rewards of a group into advantages."""

    rule: AdvantageRule = "group"
    normalize: bool = False
    """Divide by the standard deviation of the group's rewards."""
    gamma: float = 1.0
    """gae: discount per token."""
    lam: float = 1.0
    """gae: decay of the estimator per token."""

    def of_group(self, group: Sequence[Earned]) -> list[np.ndarray]:
        """For each episode one number per drawn token, float64 `[T]`; all 0 where there is nothing to compare with."""
        totals_E = np.asarray([episode.total for episode in group], dtype=np.float64)
        if len(group) < 2:
            return [np.zeros(sum(episode.num_tokens)) for episode in group]
        scale = float(totals_E.std()) if self.normalize else 1.0
        scale = scale if scale > 0 else 1.0
        if self.rule == "gae":
            return [self._gae(group, index) / scale for index in range(len(group))]
        centred_E = totals_E - totals_E.mean()
        if self.rule == "leave_one_out":
            centred_E = centred_E * len(group) / (len(group) - 1)
        return [
            np.full(sum(episode.num_tokens), value / scale) for episode, value in zip(group, centred_E, strict=True)
        ]

    def _gae(self, group: Sequence[Earned], index: int) -> np.ndarray:
        own, others = group[index], [episode for number, episode in enumerate(group) if number != index]
        rewards_T = np.zeros(sum(own.num_tokens))
        values_T = np.zeros(len(rewards_T))
        start = 0
        for turn, (reward, size) in enumerate(zip(own.rewards, own.num_tokens, strict=True)):
            values_T[start : start + size] = _others_value(others, turn)
            start += size
            if len(rewards_T):
                rewards_T[max(start - 1, 0)] += reward
        return gae(rewards_T, values_T, gamma=self.gamma, lam=self.lam)


def gae(rewards_T: np.ndarray, values_T: np.ndarray, *, gamma: float, lam: float) -> np.ndarray:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, V after the end 0.

    Equation 16 of arXiv 1506.02438, of one episode that ends.
    """
    found_T = np.zeros(len(rewards_T))
    following = value_after = 0.0
    for t in reversed(range(len(rewards_T))):
        delta = rewards_T[t] + gamma * value_after - values_T[t]
        following = delta + gamma * lam * following
        found_T[t], value_after = following, values_T[t]
    return found_T


def _others_value(others: Sequence[Earned], turn: int) -> float:
    """Mean reward from `turn` on of the episodes that came so far; 0 if none did."""
    rest = [sum(episode.rewards[turn:]) for episode in others if len(episode.rewards) > turn]
    return float(np.mean(rest)) if rest else 0.0
