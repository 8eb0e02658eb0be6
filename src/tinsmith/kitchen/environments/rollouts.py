"""Rollouts: a policy plays an environment, and what comes of it as a record and as training data.

A policy is any async function from prompt tokens to drawn tokens; nothing here knows a backend. What was drawn is
trained on token for token: it is never decoded and encoded again. Where a prompt goes on with what was drawn before,
the turns are one sequence; where it does not (a format that forgets earlier thoughts), they are several data, and
`num_splits` says how often.
"""

# N token

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np

from tinsmith.data import Message, ParsedAnswer, Renderer, Tool
from tinsmith.kitchen.environments.sequences import DrawnSequence, join_turns
from tinsmith.kitchen.ports.environment import Environment, EnvironmentGroup
from tinsmith.types import Datum, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One sequence that a policy drew."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of `tokens`, under the policy that drew them."""
    weights: str | None = None
    """Which weights drew it: a digest, a path, a step."""
    stop_reason: StopReason = "stop"
    """`length` where it was cut off."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logprobs):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.logprobs)} log-probabilities")


Policy: TypeAlias = Callable[[Sequence[int], list[int] | list[str], int], Awaitable[Draw]]
"""`await policy(prompt, stop, max_tokens)`: drawn tokens end with the stop token, if one was drawn."""

Ending: TypeAlias = Literal["done", "max_turns", "overlong", "timeout", "failed"]
"""Why a rollout ended: the environment said so; too many answers; no room for another; too slow; an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLimits:
    max_turns: int = 16
    max_tokens: int = 512
    """Of one answer."""
    max_context: int = 32_768
    """Of a prompt and its answer together; a rollout whose next prompt leaves no room ends as overlong."""
    timeout_s: float | None = None
    """Of the whole rollout."""
    overlong_reward: float | None = None
    """In place of all rewards of a rollout that ended as overlong; `None` keeps what it earned."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tokens", "max_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, not {self.timeout_s!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    prompt: tuple[int, ...]
    draw: Draw
    answer: ParsedAnswer
    reward: float

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.draw.tokens

    @property
    def logprobs(self) -> tuple[float, ...]:
        return self.draw.logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    messages: tuple[Message, ...]
    """The whole episode as people read it."""
    tools: tuple[Tool, ...]
    turns: tuple[Turn, ...]
    ending: Ending
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    """Of a rollout that failed."""
    extra_reward: float = 0.0
    """From its group, or a correction for its length."""

    @property
    def reward(self) -> float:
        return sum(turn.reward for turn in self.turns) + self.extra_reward

    @property
    def num_tokens(self) -> int:
        """Drawn, over all turns."""
        return sum(len(turn.draw.tokens) for turn in self.turns)

    @property
    def num_splits(self) -> int:
        """How often a prompt does not go on with what was drawn before."""
        return max(len(self.sequences()) - 1, 0)

    @property
    def is_overlong(self) -> bool:
        """Whether an answer was cut off, or there was no room for another."""
        return self.ending == "overlong" or any(turn.draw.stop_reason == "length" for turn in self.turns)

    def sequences(self) -> list[DrawnSequence]:
        """What was drawn, joined as far as prompts go on from what came before."""
        return join_turns(self.turns)

    def data(self, advantage: float | Sequence[float]) -> list[Datum]:
        """For `importance_sampling`, `ppo` or `cispo`: drawn tokens have the advantage, the rest has none.

        `advantage` is of the whole rollout, or one number per turn. Raises `ValueError` for another count of numbers.
        """
        per_turn = [advantage] * len(self.turns) if isinstance(advantage, (int, float)) else list(advantage)
        if len(per_turn) != len(self.turns):
            raise ValueError(f"{len(per_turn)} advantages for {len(self.turns)} turns")
        of_turn = np.asarray([*per_turn, 0.0])  # the last is of tokens that were given, whose turn is -1
        return [sequence.datum(of_turn[sequence.turns_N]) for sequence in self.sequences()]

    def record(self) -> dict[str, object]:
        """What a person wants to read of it, ready for JSON."""
        return {
            "messages": [message.as_dict() for message in self.messages if not message.images],
            "reward": self.reward,
            "turn_rewards": [turn.reward for turn in self.turns],
            "ending": self.ending,
            "metrics": dict(self.metrics),
            "tokens": self.num_tokens,
            "splits": self.num_splits,
            "faults": [fault for turn in self.turns for fault in turn.answer.faults],
            "weights": [turn.draw.weights for turn in self.turns],
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    rollouts: tuple[Rollout, ...]
    tags: Mapping[str, str]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(rollout.reward for rollout in self.rollouts)

    @property
    def is_informative(self) -> bool:
        """Whether rewards differ: otherwise no advantage within the group is other than 0."""
        return len(set(self.rewards)) > 1


async def roll_out(
    environment: Environment, policy: Policy, renderer: Renderer, limits: RolloutLimits | None = None
) -> Rollout:
    """Play one episode. Never raises for what the environment or the policy does: the ending tells it.

    Cancelling it closes the environment.
    """
    episode = _Episode(environment, policy, renderer, limits or RolloutLimits())
    try:
        try:
            await asyncio.wait_for(episode.play(), episode.limits.timeout_s)
        finally:
            await environment.close()
    except TimeoutError:
        episode.ending, episode.error = "timeout", f"not done after {episode.limits.timeout_s} s"
    except Exception as error:  # noqa: BLE001 - a task's boundary: one bad episode must not end the run
        episode.ending, episode.error = "failed", f"{type(error).__name__}: {error}"
    return episode.rollout()


async def roll_out_group(
    group: EnvironmentGroup,
    policy: Policy | Sequence[Policy],
    renderer: Renderer,
    limits: RolloutLimits | None = None,
) -> RolloutGroup:
    """All episodes of a group at the same time, in the order of `make`; then the group's own rewards.

    One policy plays them all, or one each. Raises what `make` and `rewards` raise, and `ValueError` for another count
    of policies or rewards than of episodes.
    """
    environments = group.make()
    policies = list(policy) if isinstance(policy, Sequence) else [policy] * len(environments)
    playing = zip(environments, policies, strict=True)
    rollouts = await asyncio.gather(*(roll_out(one, own, renderer, limits) for one, own in playing))
    extra = await group.rewards(rollouts)
    if len(extra) != len(rollouts):
        raise ValueError(f"the group gave {len(extra)} rewards to {len(rollouts)} rollouts")
    return RolloutGroup(
        rollouts=tuple(
            _rewarded(rollout, _finite(value, "the group's reward"))
            for rollout, value in zip(rollouts, extra, strict=True)
        ),
        tags=dict(group.tags),
    )


class _Episode:
    """A rollout in the making."""

    def __init__(self, environment: Environment, policy: Policy, renderer: Renderer, limits: RolloutLimits) -> None:
        self.limits = limits
        self.ending: Ending = "max_turns"
        self.error: str | None = None
        self._environment = environment
        self._policy = policy
        self._renderer = renderer
        self._messages: list[Message] = []
        self._tools: tuple[Tool, ...] = ()
        self._turns: list[Turn] = []
        self._metrics: dict[str, float] = {}

    async def play(self) -> None:
        first = await self._environment.start()
        self._messages, self._tools = list(first.messages), first.tools
        for _ in range(self.limits.max_turns):
            prompt = self._prompt()
            room = min(self.limits.max_tokens, self.limits.max_context - len(prompt))
            if room < 1:
                self.ending = "overlong"
                return
            draw = await self._policy(prompt, self._renderer.stop, room)
            answer = self._renderer.parse_answer(draw.tokens)
            self._messages.append(answer.message)
            result = await self._environment.step(answer)
            self._turns.append(
                Turn(prompt=tuple(prompt), draw=draw, answer=answer, reward=_finite(result.reward, "the reward"))
            )
            for name, value in result.metrics.items():
                self._metrics[name] = self._metrics.get(name, 0.0) + _finite(value, f"the metric {name!r}")
            if result.done:
                self.ending = "done"
                return
            self._messages += result.messages

    def rollout(self) -> Rollout:
        earned = sum(turn.reward for turn in self._turns)
        forfeit = self.limits.overlong_reward
        return Rollout(
            messages=tuple(self._messages),
            tools=self._tools,
            turns=tuple(self._turns),
            ending=self.ending,
            metrics=self._metrics,
            error=self.error,
            extra_reward=forfeit - earned if self.ending == "overlong" and forfeit is not None else 0.0,
        )

    def _prompt(self) -> list[int]:
        """The renderer's, unless it goes on with what was drawn: then the drawn tokens themselves."""
        rendered = self._renderer.generation_prompt(self._messages, tools=self._tools, source="the episode")
        if not self._turns:
            return rendered
        return _continued(self._turns[-1], rendered, self._renderer, self._messages, self._tools)


def _continued(
    last: Turn, rendered: list[int], renderer: Renderer, messages: Sequence[Message], tools: Sequence[Tool]
) -> list[int]:
    """`rendered`, with the last answer as it was drawn if only the tokens of that answer differ.

    The same text can be drawn in other tokens than it encodes to; a prompt with the drawn ones is what the model knows.
    """
    drawn = [*last.prompt, *last.draw.tokens]
    stop = last.draw.tokens[-1] if last.draw.tokens else None
    if rendered[: len(drawn)] == drawn or stop is None or stop not in renderer.stop:
        return rendered
    index = max(place for place, message in enumerate(messages) if message.role == "assistant")
    if renderer.generation_prompt(messages[:index], tools=tools) != list(last.prompt):
        return rendered  # an earlier turn was replaced already, or the format rewrites what came before
    start = len(last.prompt)
    if rendered[:start] != list(last.prompt) or stop not in rendered[start:]:
        return rendered
    end = rendered.index(stop, start) + 1
    is_same = renderer.parse_answer(rendered[start:end]) == last.answer
    return [*drawn, *rendered[end:]] if is_same else rendered


def _rewarded(rollout: Rollout, extra: float) -> Rollout:
    return replace(rollout, extra_reward=rollout.extra_reward + extra)


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}, not a finite number")
    return float(value)
