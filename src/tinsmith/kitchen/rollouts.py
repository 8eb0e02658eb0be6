"""Episodes: drawing them, and what is trained of them."""

# T token of a whole sequence, N = T - 1 its positions

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from tinsmith.data import ChatTemplateRenderer, Message
from tinsmith.kitchen.ports import Environment, EnvironmentSource, Sampler
from tinsmith.types import Datum, ModelInput, SampledSequence, SamplingParams, TensorData

T = TypeVar("T")
Overlong: TypeAlias = Literal["keep", "zero", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One answer, token for token, and the prompt it was drawn after."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    stop_reason: str


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
    messages: tuple[Message, ...]
    """The whole conversation."""
    turns: tuple[Turn, ...]
    reward: float

    @property
    def is_overlong(self) -> bool:
        """Whether an answer was cut off."""
        return any(turn.stop_reason == "length" for turn in self.turns)

    def row(self, *, step: int, advantage: float) -> dict[str, Any]:
        """As a person reads it."""
        return {
            "step": step,
            "group": self.group,
            "episode": self.index,
            "task": self.task,
            "version": self.version,
            "prompt": "\n".join(f"{message.role}: {message.content}" for message in self.messages[:-1]),
            "answer": self.messages[-1].content,
            "reward": self.reward,
            "advantage": advantage,
            "tokens": sum(len(turn.tokens) for turn in self.turns),
            "stop_reason": self.turns[-1].stop_reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One sequence to train on: an episode's turns joined, where each prompt goes on from the answer before it."""

    tokens: tuple[int, ...]
    logprobs_N: np.ndarray
    """Of the drawn tokens at their positions, float32; 0 elsewhere."""
    drawn_N: np.ndarray
    """1 where the target is a drawn token, else 0; float32."""
    episode: Episode

    def datum(self, advantages_N: np.ndarray, *, loss_fn: str) -> Datum:
        inputs = {
            "target_tokens": TensorData.from_numpy(np.asarray(self.tokens[1:], dtype=np.int64)),
            "logprobs": TensorData.from_numpy(self.logprobs_N),
            "advantages": TensorData.from_numpy((advantages_N * self.drawn_N).astype(np.float32)),
        }
        if loss_fn == "gspo":
            inputs["sequence_ratio_mask"] = TensorData.from_numpy(self.drawn_N)
        return Datum(model_input=ModelInput.from_ints(self.tokens[:-1]), loss_fn_inputs=inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """How episodes are drawn."""

    source: EnvironmentSource
    renderer: ChatTemplateRenderer
    group_size: int
    groups: int
    max_tokens: int
    temperature: float
    max_turns: int
    timeout_s: float | None
    """Of one group; a group that takes longer is left out and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    version: int
    groups: tuple[tuple[Episode, ...], ...]
    num_stuck: int
    """Groups that were left out because they took too long."""

    @property
    def episodes(self) -> list[Episode]:
        return [episode for group in self.groups for episode in group]


async def draw_batch(
    spec: RolloutSpec, sampler: Sampler, *, first_task: int, version: int, seed_of: Callable[..., int]
) -> Batch:
    """All groups of one step at once. `seed_of(group, turn, episode)` fixes every draw."""

    async def group(number: int) -> tuple[Episode, ...] | None:
        try:
            async with asyncio.timeout(spec.timeout_s):
                return await _draw_group(spec, sampler, number, first_task + number, version, seed_of)
        except TimeoutError:
            return None

    drawn = await asyncio.gather(*(group(number) for number in range(spec.groups)))
    found = tuple(episodes for episodes in drawn if episodes is not None)
    return Batch(version=version, groups=found, num_stuck=len(drawn) - len(found))


async def _draw_group(
    spec: RolloutSpec, sampler: Sampler, group: int, task: int, version: int, seed_of: Callable[..., int]
) -> tuple[Episode, ...]:
    """The first answers come from one request: they have one prompt."""
    environments = [spec.source.episode(task) for _ in range(spec.group_size)]
    messages = [tuple(await _settled(environment.start())) for environment in environments]
    prompt = spec.renderer.generation_prompt(messages[0], source=f"task {task}")
    params = SamplingParams(
        max_tokens=spec.max_tokens, temperature=spec.temperature, seed=seed_of(group, 0, 0), stop=spec.renderer.stop
    )
    first = await sampler.sample(prompt, params, num_samples=spec.group_size)
    blank = Episode(group=group, index=0, task=task, version=version, messages=(), turns=(), reward=0.0)
    playing = (
        _play(
            spec,
            sampler,
            environment,
            start,
            (tuple(prompt), sequence),
            partial(_params, params, seed_of, group, index),
            replace(blank, index=index),
        )
        for index, (environment, start, sequence) in enumerate(
            zip(environments, messages, first.sequences, strict=True)
        )
    )
    return tuple(await asyncio.gather(*playing))


async def _settled(value: T | Awaitable[T]) -> T:
    return await value if isinstance(value, Awaitable) else value


def _params(params: SamplingParams, seed_of: Callable[..., int], group: int, index: int, turn: int) -> SamplingParams:
    return params.model_copy(update={"seed": seed_of(group, turn, index)})


async def _play(
    spec: RolloutSpec,
    sampler: Sampler,
    environment: Environment,
    messages: tuple[Message, ...],
    first: tuple[tuple[int, ...], SampledSequence],
    params_of: Callable[[int], SamplingParams],
    episode: Episode,
) -> Episode:
    prompt, sequence = first
    turns: list[Turn] = []
    reward = 0.0
    while True:
        turn = _turn(spec, prompt, sequence)
        turns.append(turn)
        outcome = await _settled(environment.step(turn.text))
        reward += outcome.reward
        messages = (*messages, Message(role="assistant", content=turn.text), *outcome.messages)
        if outcome.done or len(turns) == spec.max_turns:
            kept = messages[: len(messages) - len(outcome.messages)]
            return replace(episode, messages=kept, turns=tuple(turns), reward=reward)
        prompt = tuple(spec.renderer.generation_prompt(messages, source=f"task {episode.task}"))
        sequence = (await sampler.sample(prompt, params_of(len(turns)), num_samples=1)).sequences[0]


def _turn(spec: RolloutSpec, prompt: tuple[int, ...], sequence: SampledSequence) -> Turn:
    return Turn(
        prompt=prompt,
        tokens=tuple(sequence.tokens),
        logprobs=tuple(sequence.logprobs or ()),
        text=spec.renderer.parse_response(sequence.tokens).content,
        stop_reason=sequence.stop_reason,
    )


def join_turns(episode: Episode) -> list[Trained]:
    """One sequence where every prompt begins with all tokens before it; else a new one begins there."""
    joined: list[Trained] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    drawn: list[float] = []
    for turn in episode.turns:
        if tokens and list(turn.prompt[: len(tokens)]) != tokens:
            joined.append(_trained(tokens, logprobs, drawn, episode))
            tokens, logprobs, drawn = [], [], []
        given = len(turn.prompt) - len(tokens)
        tokens = [*turn.prompt, *turn.tokens]
        logprobs = [*logprobs, *[0.0] * given, *turn.logprobs]
        drawn = [*drawn, *[0.0] * given, *[1.0] * len(turn.tokens)]
    return [*joined, _trained(tokens, logprobs, drawn, episode)]


def _trained(tokens: list[int], logprobs: list[float], drawn: list[float], episode: Episode) -> Trained:
    """Position i has token i + 1 as its target."""
    return Trained(
        tokens=tuple(tokens),
        logprobs_N=np.asarray(logprobs[1:], dtype=np.float32),
        drawn_N=np.asarray(drawn[1:], dtype=np.float32),
        episode=episode,
    )


def group_advantages(rewards: Sequence[float], *, normalize: bool) -> list[float]:
    """Reward less the mean of its group (GRPO, arXiv 2402.03300); `normalize` divides by the standard deviation."""
    values = np.asarray(rewards, dtype=np.float64)
    centred = values - values.mean()
    if normalize and (spread := float(values.std())) > 0:
        centred = centred / spread
    return [float(value) for value in centred]
