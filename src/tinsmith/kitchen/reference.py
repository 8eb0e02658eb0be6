"""Models that only score: the reference of a penalty, a teacher, or several of them.

A mixture of teachers is the model whose next-token distribution is the weighted mean of theirs (not of their
log-probabilities). Where every prompt has its own teacher, that one alone scores it.
"""

# T token of a sequence, K likeliest tokens of a position

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

import numpy as np

from tinsmith.kitchen.ports import Sampler

TopK: TypeAlias = list[tuple[int, float]]
"""Tokens and their probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    samplers: tuple[Sampler, ...]
    weights: tuple[float, ...] = (1.0,)
    """One per sampler; they add up to 1."""
    of_prompt: tuple[int, ...] = ()
    """Which sampler alone each prompt has; empty for the mixture of all."""

    def of_task(self, task: int) -> list[tuple[float, Sampler]]:
        """Weights and samplers that score task `task`; tasks go round the prompts."""
        if self.of_prompt:
            return [(1.0, self.samplers[self.of_prompt[task % len(self.of_prompt)]])]
        return list(zip(self.weights, self.samplers, strict=True))

    def answering(self, task: int, size: int, rng: Random) -> list[tuple[Sampler, int]]:
        """Who gives how many of `size` answers: drawn by weight."""
        members = self.of_task(task)
        drawn = rng.choices(range(len(members)), [weight for weight, _ in members], k=size)
        return [(sampler, drawn.count(at)) for at, (_, sampler) in enumerate(members) if at in drawn]

    async def logprobs(self, tokens: Sequence[int], *, task: int) -> np.ndarray:
        """Of each token after the first, float64 `[T - 1]`."""
        members = self.of_task(task)
        scored = await asyncio.gather(*(_scores(sampler, tokens) for _, sampler in members))
        if len(members) == 1:
            return scored[0]
        logs = [np.log(weight) + scores for (weight, _), scores in zip(members, scored, strict=True)]
        found: np.ndarray = np.logaddexp.reduce(logs)
        return found

    async def top_k(self, tokens: Sequence[int], k: int, *, task: int) -> list[TopK]:
        """Of each token after the first; tokens beyond the `k` of a teacher count as impossible to it."""
        members = self.of_task(task)

        async def one(weight: float, sampler: Sampler) -> list[dict[int, float]]:
            rows = await sampler.topk_logprobs(tokens, k)
            return [{token: weight * float(np.exp(logprob)) for token, logprob in row or []} for row in rows[1:]]

        parts = await asyncio.gather(*(one(weight, sampler) for weight, sampler in members))
        return [_likeliest(rows, k) for rows in zip(*parts, strict=True)]


async def _scores(sampler: Sampler, tokens: Sequence[int]) -> np.ndarray:
    return np.asarray([value or 0.0 for value in await sampler.compute_logprobs(tokens)][1:], dtype=np.float64)


def _likeliest(rows: Sequence[dict[int, float]], k: int) -> TopK:
    total: dict[int, float] = {}
    for row in rows:
        for token, probability in row.items():
            total[token] = total.get(token, 0.0) + probability
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))[:k]
