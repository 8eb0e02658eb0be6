"""Between these environments and the kitchen's ports: a sampler as a policy, a task set as the reinforcement workflow's
source of episodes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from tinsmith.data import DataError, Message, ParsedAnswer
from tinsmith.kitchen.environments.environment import Environment, TaskSet
from tinsmith.kitchen.environments.rollouts import Draw, Policy
from tinsmith.kitchen.ports import Outcome, Sampler
from tinsmith.types import SamplingParams

T = TypeVar("T")


def sampler_policy(
    sampler: Sampler, *, temperature: float = 1.0, seed: int | None = None, weights: str | None = None
) -> Policy:
    """A policy for `roll_out` from the sampling port. With a seed, draw number n has seed `seed + n`."""
    numbers = count()

    async def draw(prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int) -> Draw:
        own_seed = None if seed is None else seed + next(numbers)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=stop, seed=own_seed)
        response = await sampler.sample(prompt, params, num_samples=1)
        sequence = response.sequences[0]
        return Draw(tokens=tuple(sequence.tokens), logprobs=tuple(sequence.logprobs or ()), weights=weights)

    return draw


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """Any task set as the environment port, whose episodes exchange text and block.

    Training goes round the tasks but the last `num_held_out`, which negative numbers name (-1 is the last). Raises
    `DataError` if nothing is left to train on. Tools have no place in this port: an environment with some is refused.
    """

    tasks: TaskSet
    num_held_out: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_held_out < len(self.tasks):
            raise DataError(f"num_held_out={self.num_held_out} leaves nothing of {len(self.tasks)} tasks to train on")

    def episode(self, index: int) -> TextEpisode:
        """Raises `IndexError` for a negative number beyond those held out."""
        if index < -self.num_held_out:
            raise IndexError(f"task {index}: {self.num_held_out} tasks are held out")
        place = index % (len(self.tasks) - self.num_held_out) if index >= 0 else len(self.tasks) + index
        return TextEpisode(environment=self.tasks.group(place, 1).make()[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEpisode:
    """One environment behind the port's blocking methods; it is closed when it says that it is done."""

    environment: Environment

    def start(self) -> Sequence[Message]:
        first = _wait(self.environment.start())
        if first.tools:
            raise DataError(f"the port takes no tools, and this environment offers {first.tools[0].name!r}")
        return first.messages

    def step(self, answer: str) -> Outcome:
        message = Message(role="assistant", content=answer)
        result = _wait(self.environment.step(ParsedAnswer(message=message, ended=True)))
        if result.done:
            _wait(self.environment.close())
        return Outcome(reward=result.reward, done=result.done, messages=result.messages)


def _wait(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end in a thread of its own: the caller's thread may have an event loop already."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()
