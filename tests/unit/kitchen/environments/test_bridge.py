from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tinsmith.data import ChatTemplateRenderer, ChatTokenizer, DataError, load_tokenizer
from tinsmith.kitchen.environments import (
    QuestionTasks,
    TaskSource,
    roll_out_group,
    sampler_policy,
)
from tinsmith.kitchen.evaluators import NumericEvaluator
from tinsmith.models import TINY
from tinsmith.types import SampledSequence, SampleResponse, SamplingParams

SCORE = NumericEvaluator().score
SUMS = QuestionTasks(pairs=[(f"{n} + 1?", str(n + 1)) for n in range(5)], score=SCORE)


@dataclass
class Sevens:
    """A sampler that always says 7."""

    tokenizer: ChatTokenizer
    asked: list[SamplingParams] = field(default_factory=list)

    def sample(self, prompt: Sequence[int], params: SamplingParams, *, num_samples: int) -> Any:
        self.asked.append(params)
        tokens = [*self.tokenizer("7", add_special_tokens=False)["input_ids"], next(iter(params.stop or []))]
        sequence = SampledSequence(
            stop_reason="stop",
            tokens_np=np.asarray(tokens, dtype=np.int64),
            logprobs_np=np.full(len(tokens), -0.25, dtype=np.float32),
        )

        async def answer() -> SampleResponse:
            return SampleResponse(sequences=[sequence])

        return answer()

    def compute_logprobs(self, tokens: Sequence[int]) -> Any:
        raise NotImplementedError


def test_a_sampler_becomes_a_policy_with_a_seed_per_draw() -> None:
    renderer = ChatTemplateRenderer(load_tokenizer(TINY))
    sampler = Sevens(load_tokenizer(TINY))
    tasks = QuestionTasks(pairs=[("3 + 4?", "7")], score=SCORE)
    policy = sampler_policy(sampler, temperature=0.5, seed=100, weights="step 3")
    group = asyncio.run(roll_out_group(tasks.group(0, 3), policy, renderer))
    assert group.rewards == (1.0, 1.0, 1.0)
    assert [params.seed for params in sampler.asked] == [100, 101, 102]
    assert {params.temperature for params in sampler.asked} == {0.5}
    assert group.rollouts[0].turns[0].draw.logprobs == (-0.25, -0.25)
    assert group.rollouts[0].record()["weights"] == ["step 3"]


def test_a_task_set_goes_round_and_holds_out_its_last_tasks() -> None:
    source = TaskSource(tasks=SUMS, num_held_out=2)
    asked = {}
    for index in (0, 2, 3, -1, -2):
        (environment,) = source.group(index, 1).make()
        asked[index] = asyncio.run(environment.start()).messages[-1].content
    assert asked == {0: "0 + 1?", 2: "2 + 1?", 3: "0 + 1?", -1: "4 + 1?", -2: "3 + 1?"}
    with pytest.raises(IndexError, match="task -3: 2 tasks are held out"):
        source.group(-3, 1)
    with pytest.raises(DataError, match="num_held_out=5 leaves nothing of 5 tasks"):
        TaskSource(tasks=SUMS, num_held_out=5)
