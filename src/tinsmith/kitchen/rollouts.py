"""Rounds of episodes: what workflows draw from a sampler, by the one driver in `environments.rollouts`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, Protocol, TypeAlias

from tinsmith.data import Message, Renderer
from tinsmith.kitchen.advantages import Earned
from tinsmith.kitchen.environments import Draw, Policy, Rollout, RolloutLimits, SameTask, roll_out_group
from tinsmith.kitchen.environments.bridge import draw_of
from tinsmith.kitchen.ports import EnvironmentSource, Sampler
from tinsmith.types import SampleResponse, SamplingParams

Overlong: TypeAlias = Literal["keep", "zero", "drop"]


class SeedOf(Protocol):
    def __call__(self, group: int, turn: int, episode: int) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """Everything about one episode travels in one record."""

    group: int
    index: int
    """Within its group."""
    task: int
    """The number under which the environment knows it."""
    version: int
    """Optimizer rounds behind the weights that drew it."""
    rollout: Rollout

    @property
    def reward(self) -> float:
        return self.rollout.reward

    @property
    def is_whole(self) -> bool:
        """Whether it came to an end of its own: neither stuck nor failed."""
        return self.rollout.ending not in ("timeout", "failed")

    def earned(self, *, forfeit: bool) -> Earned:
        """`forfeit` takes all rewards away. What the group gives at the end counts for the last turn."""
        rewards = [0.0 if forfeit else turn.reward for turn in self.rollout.turns]
        if rewards and not forfeit:
            rewards[-1] += self.rollout.extra_reward
        return Earned(rewards=tuple(rewards), num_tokens=tuple(len(turn.tokens) for turn in self.rollout.turns))

    def row(self, *, step: int, advantage: float) -> dict[str, Any]:
        """As a person reads it."""
        messages, rollout = self.rollout.messages, self.rollout
        last = max((at for at, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
        return {
            "step": step,
            "group": self.group,
            "episode": self.index,
            "task": self.task,
            "version": self.version,
            "prompt": "\n".join(f"{message.role}: {_said(message)}" for message in messages[:last]),
            "answer": _said(messages[last]) if last < len(messages) else "",
            "reward": self.reward,
            "advantage": advantage,
            "tokens": rollout.num_tokens,
            "stop_reason": rollout.turns[-1].draw.stop_reason if rollout.turns else None,
            "ending": rollout.ending,
            "metrics": dict(rollout.metrics),
            "faults": [fault for turn in rollout.turns for fault in turn.answer.faults],
            "error": rollout.error,
        }


def _said(message: Message) -> str:
    calls = [
        f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})" for call in message.tool_calls
    ]
    return "\n".join(filter(None, [message.content, *calls]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """How episodes are drawn."""

    source: EnvironmentSource
    renderer: Renderer
    group_size: int
    groups: int
    temperature: float
    limits: RolloutLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    version: int
    groups: tuple[tuple[Episode, ...], ...]

    @property
    def episodes(self) -> list[Episode]:
        return [episode for group in self.groups for episode in group]

    @property
    def whole(self) -> list[Episode]:
        """Those to learn from."""
        return [episode for episode in self.episodes if episode.is_whole]


async def draw_batch(spec: RolloutSpec, sampler: Sampler, *, first_task: int, version: int, seed_of: SeedOf) -> Batch:
    """All groups of one round at once; `seed_of` fixes every draw.

    An episode that is stuck or fails in its environment says so in its ending. Raises what the sampler raises.
    """
    drawing = (
        _draw_group(spec, sampler, number, first_task + number, version, seed_of) for number in range(spec.groups)
    )
    return Batch(version=version, groups=tuple(await asyncio.gather(*drawing)))


async def _draw_group(
    spec: RolloutSpec, sampler: Sampler, group: int, task: int, version: int, seed_of: SeedOf
) -> tuple[Episode, ...]:
    made = spec.source.group(task, spec.group_size)
    draws = _GroupDraws(
        spec, sampler, lambda turn, episode: seed_of(group=group, turn=turn, episode=episode),
        weights=f"round {version}", has_one_prompt=isinstance(made, SameTask),
    )  # fmt: skip
    try:
        drawn = await roll_out_group(
            made, [draws.policy(index) for index in range(spec.group_size)], spec.renderer, spec.limits
        )
    finally:
        draws.close()
    if draws.failure is not None:
        raise draws.failure
    return tuple(
        Episode(group=group, index=index, task=task, version=version, rollout=rollout)
        for index, rollout in enumerate(drawn.rollouts)
    )


class _GroupDraws:
    """The policies of a group's episodes. First answers to one prompt come from one request.

    A failing sampler is no fault of an episode: it is kept in `failure`, to end the round.
    """

    def __init__(
        self,
        spec: RolloutSpec,
        sampler: Sampler,
        seed_of: Callable[[int, int], int],
        *,
        weights: str,
        has_one_prompt: bool,
    ) -> None:
        self.failure: Exception | None = None
        self._spec, self._sampler, self._seed_of, self._weights = spec, sampler, seed_of, weights
        self._has_one_prompt = has_one_prompt
        self._first: dict[tuple[int, ...], asyncio.Task[SampleResponse]] = {}

    def policy(self, index: int) -> Policy:
        turns = count()

        async def draw(prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int) -> Draw:
            turn = next(turns)
            try:
                if turn == 0 and self._has_one_prompt:
                    drawn = (await self._shared(prompt, stop, max_tokens)).sequences[index]
                else:
                    seed = self._seed_of(turn, index)
                    drawn = (await self._ask(prompt, stop, max_tokens, seed=seed, num_samples=1)).sequences[0]
                return draw_of(drawn, weights=self._weights)
            except Exception as error:
                self.failure = self.failure or error
                raise

        return draw

    async def _shared(self, prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int) -> SampleResponse:
        key = tuple(prompt)
        if key not in self._first:
            size = self._spec.group_size
            asking = self._ask(prompt, stop, max_tokens, seed=self._seed_of(0, 0), num_samples=size)
            self._first[key] = asyncio.create_task(asking)
        return await asyncio.shield(self._first[key])

    async def _ask(
        self, prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int, *, seed: int, num_samples: int
    ) -> SampleResponse:
        params = SamplingParams(max_tokens=max_tokens, temperature=self._spec.temperature, seed=seed, stop=stop)
        return await self._sampler.sample(prompt, params, num_samples=num_samples)

    def close(self) -> None:
        """Give up what nobody waits for any more."""
        for task in self._first.values():
            task.cancel()
