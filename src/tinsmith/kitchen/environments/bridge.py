"""Between environments and the kitchen's ports: a sampler as a policy, a task set as a source without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from tinsmith.data import DataError
from tinsmith.kitchen.environments.rollouts import Draw, Policy
from tinsmith.kitchen.ports import Sampler
from tinsmith.kitchen.ports.environment import EnvironmentGroup, TaskSet
from tinsmith.types import SampledSequence, SamplingParams


def draw_of(sequence: SampledSequence, *, weights: str | None = None) -> Draw:
    """Raises `ValueError` if the sampler gave no log-probabilities, or another count of them."""
    return Draw(
        tokens=tuple(sequence.tokens),
        logprobs=tuple(sequence.logprobs or ()),
        weights=weights,
        stop_reason=sequence.stop_reason,
    )


def sampler_policy(
    sampler: Sampler, *, temperature: float = 1.0, seed: int | None = None, weights: str | None = None
) -> Policy:
    """A policy for `roll_out` from the sampling port. With a seed, draw number n has seed `seed + n`."""
    numbers = count()

    async def draw(prompt: Sequence[int], stop: list[int] | list[str], max_tokens: int) -> Draw:
        own_seed = None if seed is None else seed + next(numbers)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=stop, seed=own_seed)
        response = await sampler.sample(prompt, params, num_samples=1)
        return draw_of(response.sequences[0], weights=weights)

    return draw


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """Any task set as the port `environment`: training goes round the tasks but the last `num_held_out`.

    Negative numbers name those (-1 is the last). Raises `DataError` if nothing is left to train on.
    """

    tasks: TaskSet
    num_held_out: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_held_out < len(self.tasks):
            raise DataError(f"num_held_out={self.num_held_out} leaves nothing of {len(self.tasks)} tasks to train on")

    def group(self, index: int, size: int) -> EnvironmentGroup:
        """Raises `IndexError` for a negative number beyond those held out."""
        if index < -self.num_held_out:
            raise IndexError(f"task {index}: {self.num_held_out} tasks are held out")
        place = index % (len(self.tasks) - self.num_held_out) if index >= 0 else len(self.tasks) + index
        return self.tasks.group(place, size)
