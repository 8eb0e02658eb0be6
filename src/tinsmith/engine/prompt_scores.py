"""What a request wants to know of its prompt: scores of given tokens, likely tokens, alternative draws.

Row i of the prompt predicts token i + 1. Rows are scored in order, chunk by chunk as the prompt is computed; what was
scored once stays, whatever becomes of the keys and values.
"""

# N prompt token, K target or alternative per position, M (row, token) pair to score, C row of a chunk, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tinsmith.engine.token_choice import ChoiceRules, Distribution, stream, uniforms
from tinsmith.types.operations import Sample
from tinsmith.types.results import PromptAltTokens, TopkLogprobs
from tinsmith.types.tensor import TensorData

_ALT_STREAM = 2**32
"""Sample indices of alternative draws begin here, beyond those of any sequence."""


@dataclass(slots=True)
class _Pairs:
    """Tokens to score, in order of their rows, and where each score goes."""

    rows_M: np.ndarray
    tokens_M: np.ndarray
    cells_M: np.ndarray
    scores: np.ndarray
    """Flat results, fp32; cells not asked for keep their first value."""

    def within(self, start: int, end: int) -> slice:
        first, last = np.searchsorted(self.rows_M, [start, end])
        return slice(int(first), int(last))


class PromptScores:
    """Filled in between `next_row` and `end_row`."""

    def __init__(self, operation: Sample) -> None:
        self._operation = operation
        self.end_row = len(operation.prompt) - 1
        first = self._first_recent_row()
        self._logprobs = self._prompt_pairs(first) if operation.prompt_logprobs else None
        self._targets = _target_pairs(operation.target_prompt_logprobs) if operation.target_prompt_logprobs else None
        k = operation.topk_prompt_logprobs
        self._topk_from = first if k else self.end_row
        self._topk_ids = np.zeros((self.end_row + 1, k), np.int64)
        self._topk_scores = np.full((self.end_row + 1, k), TopkLogprobs.UNUSED_LOGPROB, np.float32)
        k = operation.prompt_alt_tokens_k
        self._alt_from = 0 if k else self.end_row
        self._alt_ids = np.zeros((self.end_row, k), np.int64)
        self._alt_scores = np.zeros((self.end_row, k), np.float32)
        starts = [int(p.rows_M[0]) for p in (self._logprobs, self._targets) if p is not None and len(p.rows_M)]
        self.next_row = min(*starts, self._topk_from, self._alt_from, self.end_row)
        """The first row whose scores are still missing."""

    @property
    def is_complete(self) -> bool:
        return self.next_row >= self.end_row

    def pairs(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (ascending) and tokens to score among rows `[start, end)`."""
        parts = [(p.rows_M[s], p.tokens_M[s]) for p, s in self._parts(start, end)]
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        rows_M = np.concatenate([rows for rows, _ in parts])
        order = np.argsort(rows_M, kind="stable")
        return rows_M[order], np.concatenate([tokens for _, tokens in parts])[order]

    def put_pairs(self, start: int, end: int, scores_M: np.ndarray) -> None:
        """The scores of `pairs(start, end)`."""
        parts = self._parts(start, end)
        if not parts:
            return
        order = np.argsort(np.concatenate([p.rows_M[s] for p, s in parts]), kind="stable")
        in_parts = np.empty_like(scores_M)
        in_parts[order] = scores_M
        at = 0
        for pairs, rows in parts:
            count = rows.stop - rows.start
            pairs.scores[pairs.cells_M[rows]] = in_parts[at : at + count]
            at += count

    def distribution_rows(self, start: int, end: int) -> tuple[int, int]:
        """The part of `[start, end)` for which whole distributions are needed."""
        return max(start, min(self._topk_from, self._alt_from, end)), end

    def put_distributions(self, start: int, logits_CV: Tensor) -> None:
        """Rows from `start` on."""
        operation, end = self._operation, start + len(logits_CV)
        first = max(0, self._topk_from - start)
        if self._topk_from < end:
            plain = Distribution(logits_CV[first:], np.ones(end - start - first))
            at = slice(start + first + 1, end + 1)
            self._topk_ids[at], self._topk_scores[at] = plain.topk(operation.topk_prompt_logprobs)
        if self._alt_from < end:
            self._put_alternatives(start, logits_CV)

    def _put_alternatives(self, start: int, logits_CV: Tensor) -> None:
        operation, count = self._operation, len(logits_CV)
        rules = ChoiceRules.same(count, operation.temperature)
        distribution = Distribution(logits_CV, rules.temperature_B)
        rows_C = np.arange(start, start + count)
        for k in range(operation.prompt_alt_tokens_k):
            tokens_C = distribution.choose(rules, uniforms(stream(operation.seed, _ALT_STREAM + k), rows_C))
            self._alt_ids[rows_C, k] = tokens_C
            self._alt_scores[rows_C, k] = distribution.logprobs_of(tokens_C)

    # ---- results ----

    @property
    def prompt_logprobs(self) -> np.ndarray | None:
        return None if self._logprobs is None else self._logprobs.scores

    @property
    def topk(self) -> TopkLogprobs | None:
        return TopkLogprobs(self._topk_ids, self._topk_scores) if self._operation.topk_prompt_logprobs else None

    @property
    def targets(self) -> TensorData | None:
        """As they were asked for: same shape, and sparse if the question was."""
        asked = self._operation.target_prompt_logprobs
        if asked is None or self._targets is None:
            return None
        return TensorData(self._targets.scores, "float32", asked.shape, *(asked.csr_indices or (None, None)))

    @property
    def alternatives(self) -> PromptAltTokens | None:
        if not self._operation.prompt_alt_tokens_k:
            return None
        return PromptAltTokens(TensorData.from_numpy(self._alt_ids), TensorData.from_numpy(self._alt_scores))

    # ---- what was asked ----

    def _first_recent_row(self) -> int:
        last_n = self._operation.prompt_logprobs_last_n
        return 0 if last_n is None else max(0, self.end_row - last_n)

    def _prompt_pairs(self, first: int) -> _Pairs:
        tokens = self._operation.prompt[first + 1 :]
        given = np.flatnonzero(tokens >= 0)
        scores = np.full(self.end_row + 1, np.nan, np.float32)
        return _Pairs(first + given, tokens[given], first + given + 1, scores)

    def _parts(self, start: int, end: int) -> Sequence[tuple[_Pairs, slice]]:
        given = [(p, p.within(start, end)) for p in (self._logprobs, self._targets) if p is not None]
        return [(pairs, rows) for pairs, rows in given if rows.stop > rows.start]


def _target_pairs(asked: TensorData) -> _Pairs:
    """The cells that are not -1, in order of their rows."""
    tokens = asked.flat
    indices = asked.csr_indices
    if indices is not None:
        rows = np.repeat(np.arange(len(indices[0]) - 1), np.diff(indices[0]))
    else:
        assert asked.shape is not None
        rows = np.repeat(np.arange(asked.shape[0]), asked.shape[1])
    cells = np.flatnonzero(tokens >= 0)
    return _Pairs(rows[cells], tokens[cells], cells, np.zeros(len(tokens), np.float32))


def scores_of(operation: Sample) -> PromptScores | None:
    """`None` if nothing was asked."""
    wants = (
        operation.prompt_logprobs
        or operation.topk_prompt_logprobs
        or operation.target_prompt_logprobs is not None
        or operation.prompt_alt_tokens_k
    )
    return PromptScores(operation) if wants else None
