"""Which examples train in which step: a pure function of the seed, so that any step can be found again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random


@lru_cache(maxsize=4)
def epoch_order(num_examples: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of one epoch, the same on every machine and Python.

    Sorts by draws of `Random.random`, whose sequence Python guarantees; that of `Random.shuffle` it does not.
    """
    rng = Random(f"tinsmith/epoch/{seed}/{epoch}")
    keys = [rng.random() for _ in range(num_examples)]
    return tuple(sorted(range(num_examples), key=keys.__getitem__))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """All steps of a run. An epoch's last batch holds what is left, so that every example trains once per epoch."""

    num_examples: int
    batch_size: int
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_examples", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Sequence[int]:
        """Indices of the examples of `step` (from 0). Raises `IndexError` outside the run."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside the run's {self.num_steps} steps")
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_examples, seed=self.seed, epoch=epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


def hold_out(num_examples: int, *, test_size: int, seed: int) -> tuple[list[int], list[int]]:
    """Split indices into `(training, test)`, both in file order. Raises `ValueError` if nothing is left to train on."""
    if test_size >= num_examples:
        raise ValueError(f"test_size {test_size} leaves nothing of {num_examples} examples to train on")
    test = set(epoch_order(num_examples, seed=seed, epoch=-1)[:test_size])
    return [index for index in range(num_examples) if index not in test], sorted(test)
