"""What comes back from training and sampling."""

# N token positions, K alternatives per position

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from pydantic import BaseModel

from tinsmith.types.tensor import TensorData

StopReason: TypeAlias = Literal["length", "stop"]
LossFnOutput: TypeAlias = dict[str, TensorData]


@dataclass(slots=True)
class ForwardBackwardOutput:
    """Result of `forward` and `forward_backward`, datums in the order they were given.

    `metrics` holds `name:reduction` keys; `loss:sum` is always there. Losses are sums over tokens.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss_sum(self) -> float:
        """The loss as trained on: a sum over tokens and datums."""
        return self.metrics["loss:sum"]

    @property
    def loss(self) -> float:
        """`loss_sum` per unit of weight where the server reports `weight:sum`, else per token."""
        for key in ("weight:sum", "tokens:sum"):
            if self.metrics.get(key):
                return self.loss_sum / self.metrics[key]
        return self.loss_sum

    @property
    def logprobs(self) -> list[TensorData]:
        """Per datum, the log-probabilities of its target tokens, `[N]` or `[N, K]`."""
        return [output["logprobs"] for output in self.loss_fn_outputs]

    @property
    def per_token_metrics(self) -> list[LossFnOutput]:
        """Per datum, every array the server returned beside the log-probabilities."""
        return [{k: v for k, v in output.items() if k != "logprobs"} for output in self.loss_fn_outputs]


class OptimStepResponse(BaseModel):
    metrics: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class TopkLogprobs:
    """The K most likely tokens at N positions; row i is unused where `token_ids[i, 0] == 0` and logprob is -99999."""

    token_ids: np.ndarray
    logprobs: np.ndarray

    UNUSED_LOGPROB = -99999.0

    def rows(self) -> list[list[tuple[int, float]] | None]:
        rows: list[list[tuple[int, float]] | None] = []
        for ids, logprobs in zip(self.token_ids.tolist(), self.logprobs.tolist(), strict=True):
            cells = [(i, lp) for i, lp in zip(ids, logprobs, strict=True) if lp != self.UNUSED_LOGPROB]
            rows.append(cells or None)
        return rows


@dataclass(frozen=True, slots=True)
class PromptAltTokens:
    """Independent draws at each prompt position after the first, `[N-1, K]` each."""

    tokens: TensorData
    logprobs: TensorData


@dataclass
class SampledSequence:
    """One drawn continuation. `logprobs_np` is as long as `tokens_np`."""

    stop_reason: StopReason
    sequence_id: str = ""
    tokens_np: np.ndarray | None = None
    logprobs_np: np.ndarray | None = None
    topk_logprobs_np: TopkLogprobs | None = None

    @cached_property
    def tokens(self) -> list[int]:
        return [] if self.tokens_np is None else self.tokens_np.tolist()

    @cached_property
    def logprobs(self) -> list[float] | None:
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    @cached_property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        return None if self.topk_logprobs_np is None else self.topk_logprobs_np.rows()


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnToken:
    """The newest token of one sequence of a streamed request. The whole `SampleResponse` still comes at the end."""

    index: int
    """Of the sequence among the request's."""
    token: int
    logprob: float
    topk: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its position, the best first, if the request asked for them."""
    stop_reason: StopReason | None = None
    """Set on a sequence's last token."""


@dataclass
class SampleResponse:
    """`prompt_logprobs_np` has one entry per prompt token, NaN where there is none (the first, always)."""

    sequences: Sequence[SampledSequence]
    prompt_logprobs_np: np.ndarray | None = None
    topk_prompt_logprobs_np: TopkLogprobs | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        if self.prompt_logprobs_np is None:
            return None
        return [None if value != value else value for value in self.prompt_logprobs_np.tolist()]

    @cached_property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        return None if self.topk_prompt_logprobs_np is None else self.topk_prompt_logprobs_np.rows()
