"""Training data out of a teacher's answers: the tokens that it drew, or its distribution at each of them."""

# N position of a datum, K likeliest tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinsmith.data import to_datum
from tinsmith.kitchen.reference import TopK
from tinsmith.types import Datum, ModelInput, TensorData


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAnswer:
    prompt: str
    """As a person reads it."""
    text: str
    tokens: tuple[int, ...]
    """Prompt and answer."""
    num_prompt: int
    top_k: tuple[TopK, ...] = ()
    """The teacher's distribution at each token of the answer; empty to learn the tokens themselves."""

    @property
    def num_trained(self) -> int:
        return len(self.tokens) - self.num_prompt

    def datum(self, scale: float) -> Datum:
        """Every token of the answer has weight `scale`, shared out by the teacher's probabilities over its `K` best.

        Probabilities of the K are scaled to add up to 1, so the loss is the cross-entropy with the teacher cut off
        after K tokens: forward KL plus a constant.
        """
        weights_N = [0.0] * self.num_prompt + [scale] * self.num_trained
        if not self.top_k:
            return to_datum(self.tokens, weights_N)
        K = max(len(row) for row in self.top_k)
        targets_NK = np.zeros((len(self.tokens) - 1, K), dtype=np.int64)
        weights_NK = np.zeros((len(self.tokens) - 1, K), dtype=np.float32)
        for position, row in enumerate(self.top_k, start=self.num_prompt - 1):
            total = sum(probability for _, probability in row)
            for place, (token, probability) in enumerate(row):
                targets_NK[position, place] = token
                weights_NK[position, place] = scale * probability / total
        return Datum(
            model_input=ModelInput.from_ints(self.tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": TensorData.from_numpy(targets_NK),
                "weights": TensorData.from_numpy(weights_NK),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilledDataset:
    answers: tuple[TeacherAnswer, ...]

    def data(self, indices: Sequence[int]) -> tuple[list[Datum], int]:
        """Datums of one batch and the number of tokens they train; the loss is the mean over those."""
        answers = [self.answers[index] for index in indices]
        num_trained = sum(answer.num_trained for answer in answers)
        return [answer.datum(1.0 / num_trained) for answer in answers], num_trained
