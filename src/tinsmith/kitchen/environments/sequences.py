"""Sequences to train on: the turns of a rollout joined, token for token as they were drawn."""

# N = positions of a sequence: one less than its tokens; position i has token i + 1 as its target

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tinsmith.types import Datum, ModelInput, TensorData


class DrawnTurn(Protocol):
    """What joining needs of a turn."""

    @property
    def prompt(self) -> tuple[int, ...]: ...

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def logprobs(self) -> tuple[float, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSequence:
    """Turns, each of whose prompts goes on with all that came before it."""

    tokens: tuple[int, ...]
    logprobs_N: np.ndarray
    """Of the drawn tokens at their positions, float32; 0 elsewhere."""
    turns_N: np.ndarray
    """The number of the turn that drew the target, -1 where it was given; int64."""

    @property
    def drawn_N(self) -> np.ndarray:  # noqa: N802 - a shape
        """1 where the target was drawn, else 0; float32."""
        found: np.ndarray = (self.turns_N >= 0).astype(np.float32)
        return found

    @property
    def num_drawn(self) -> int:
        return int((self.turns_N >= 0).sum())

    def datum(self, advantages_N: np.ndarray, *, loss_fn: str = "importance_sampling") -> Datum:
        """What a policy loss reads. Advantages count where the target was drawn."""
        inputs = {
            "target_tokens": TensorData.from_numpy(np.asarray(self.tokens[1:], dtype=np.int64)),
            "logprobs": TensorData.from_numpy(self.logprobs_N),
            "advantages": TensorData.from_numpy((advantages_N * self.drawn_N).astype(np.float32)),
        }
        if loss_fn == "gspo":
            inputs["sequence_ratio_mask"] = TensorData.from_numpy(self.drawn_N)
        return Datum(model_input=ModelInput.from_ints(self.tokens[:-1]), loss_fn_inputs=inputs)


def join_turns(turns: Sequence[DrawnTurn]) -> list[DrawnSequence]:
    """One sequence where every prompt begins with all tokens before it; else a new one begins there."""
    joined: list[DrawnSequence] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    owners: list[int] = []
    for number, turn in enumerate(turns):
        if tokens and list(turn.prompt[: len(tokens)]) != tokens:
            joined.append(_sequence(tokens, logprobs, owners))
            tokens, logprobs, owners = [], [], []
        num_given = len(turn.prompt) - len(tokens)
        tokens = [*turn.prompt, *turn.tokens]
        logprobs += [*[0.0] * num_given, *turn.logprobs]
        owners += [*[-1] * num_given, *[number] * len(turn.tokens)]
    return [*joined, _sequence(tokens, logprobs, owners)] if tokens else joined


def _sequence(tokens: list[int], logprobs: list[float], owners: list[int]) -> DrawnSequence:
    return DrawnSequence(
        tokens=tuple(tokens),
        logprobs_N=np.asarray(logprobs[1:], dtype=np.float32),
        turns_N=np.asarray(owners[1:], dtype=np.int64),
    )
