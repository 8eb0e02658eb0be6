"""The sequences that advance together: per sequence one slot, per property one array over the slots.

What happens on every step is arithmetic on these arrays; Python objects are touched when a sequence joins or leaves.
"""

# S slot, B running sequence of this step, M block, W drawn token, X stop token

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import pairwise

import numpy as np

from tinsmith.engine.block_pool import BLOCK_TOKENS
from tinsmith.engine.lora import LoraWeights
from tinsmith.engine.sampling_request import Sequence
from tinsmith.engine.shared_prefix import Group, find_groups
from tinsmith.engine.token_choice import ChoiceRules, stream, uniforms

_FIRST_WIDTH = 64


class DecodeBatch:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.sequences: list[Sequence | None] = [None] * capacity
        self.adapter_S = np.zeros(capacity, np.int64)
        """Sorting key: equal for equal weights."""
        self.newest_S = np.zeros(capacity, np.int64)
        """The last drawn token; its key and value are not in the cache yet."""
        self.cached_S = np.zeros(capacity, np.int64)
        """How many tokens the cache holds."""
        self.shift_S = np.zeros(capacity, np.int64)
        """What to add to a token's index for its position."""
        self.topk_S = np.zeros(capacity, np.int64)
        self.table_SM = np.zeros((capacity, 1), np.int64)
        self._num_blocks_S = np.zeros(capacity, np.int64)
        """How many blocks each has; for the time of a pass one more than the cached tokens fill."""
        self._drawn_S = np.zeros(capacity, np.int64)
        self._tokens_SW = np.zeros((capacity, _FIRST_WIDTH), np.int32)
        self._logprobs_SW = np.zeros((capacity, _FIRST_WIDTH), np.float32)
        self._rules = ChoiceRules.same(capacity, 1.0)
        self._stream_S = np.zeros(capacity, np.uint64)
        self._max_tokens_S = np.zeros(capacity, np.int64)
        self._stop_SX = np.full((capacity, 1), -1, np.int64)
        self._has_strings_S = np.zeros(capacity, bool)
        self._is_streamed_S = np.zeros(capacity, bool)
        self._joined_S = np.zeros(capacity, np.int64)
        self._num_joined = 0
        self._free = list(range(capacity - 1, -1, -1))
        self._rows: np.ndarray | None = None
        self._runs: list[tuple[LoraWeights | None, int]] | None = None
        """Of `_rows`."""
        self._groups: list[Group] | None = None
        """Of `_rows`."""

    @property
    def num_running(self) -> int:
        return self.capacity - len(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def rows(self) -> np.ndarray:
        """Slots in use, equal adapters together, the older first."""
        if self._rows is None:
            self._runs = self._groups = None
            used = np.array([slot for slot, sequence in enumerate(self.sequences) if sequence is not None], np.int64)
            self._rows = used[np.lexsort((self._joined_S[used], self.adapter_S[used]))]
        return self._rows

    def runs(self, slots_B: np.ndarray) -> list[tuple[LoraWeights | None, int]]:
        """Weights and number of slots of each stretch of equal adapters."""
        if slots_B is not self._rows:
            return self._find_runs(slots_B)
        if self._runs is None:
            self._runs = self._find_runs(slots_B)
        return self._runs

    def groups(self, slots_B: np.ndarray) -> list[Group]:
        """Which of these read the same blocks first; found anew only when sequences have joined or left."""
        if slots_B is not self._rows:
            return self._find_groups(slots_B)
        if self._groups is None:
            self._groups = self._find_groups(slots_B)
        return self._groups

    def _find_groups(self, slots_B: np.ndarray) -> list[Group]:
        return find_groups(self.table_SM[slots_B], self.cached_S[slots_B] // BLOCK_TOKENS)

    def _find_runs(self, slots_B: np.ndarray) -> list[tuple[LoraWeights | None, int]]:
        if not len(slots_B):
            return []
        adapter_B = self.adapter_S[slots_B]
        bounds = [0, *(np.flatnonzero(adapter_B[1:] != adapter_B[:-1]) + 1).tolist(), len(slots_B)]
        firsts = [self.sequences[int(slots_B[start])] for start in bounds[:-1]]
        lengths = [end - start for start, end in pairwise(bounds)]
        return [(s.request.weights, n) for s, n in zip(firsts, lengths, strict=True) if s is not None]

    def youngest(self, among: Items[int] | None = None) -> int:
        """The slot that joined last, of all or of some; there is one."""
        rows = self.rows() if among is None else np.array(among, np.int64)
        return int(rows[np.argmax(self._joined_S[rows])])

    def join(self, sequence: Sequence, blocks: Items[int], num_cached: int) -> int:
        """Takes over the use of the blocks. There must be a free slot."""
        slot = self._free.pop()
        request = sequence.request
        operation = request.operation
        self.sequences[slot] = sequence
        sequence.slot = slot
        self._num_joined += 1
        self._joined_S[slot] = self._num_joined
        self.adapter_S[slot] = request.adapter
        self.cached_S[slot] = num_cached
        self.shift_S[slot] = request.shift
        self.table_SM = _wide_enough(self.table_SM, len(blocks))
        self.table_SM[slot, : len(blocks)] = blocks
        self._num_blocks_S[slot] = len(blocks)
        self.topk_S[slot] = operation.topk_sample_logprobs
        self._rules.temperature_B[slot] = operation.temperature
        self._rules.top_k_B[slot] = operation.top_k
        self._rules.top_p_B[slot] = operation.top_p
        self._stream_S[slot] = stream(operation.seed, sequence.index)
        self._max_tokens_S[slot] = operation.max_tokens
        self._has_strings_S[slot] = request.stop_strings is not None
        self._is_streamed_S[slot] = operation.stream
        stop = operation.stop_token_ids
        self._stop_SX = _wide_enough(self._stop_SX, len(stop), fill=-1)
        self._stop_SX[slot] = -1
        self._stop_SX[slot, : len(stop)] = stop
        self._take_drawn(slot, sequence)
        self._rows = None
        return slot

    def leave(self, slot: int) -> list[int]:
        """Write what was drawn back to the sequence; returns its blocks."""
        sequence = self.sequences[slot]
        assert sequence is not None
        drawn = int(self._drawn_S[slot])
        sequence.tokens = self._tokens_SW[slot, :drawn].astype(np.int64)
        sequence.logprobs = self._logprobs_SW[slot, :drawn].copy()
        sequence.slot = None
        self.sequences[slot] = None
        self._free.append(slot)
        self._rows = None
        blocks: list[int] = self.table_SM[slot, : self._num_blocks_S[slot]].tolist()
        return blocks

    def needing_block(self) -> np.ndarray:
        """Slots whose next token does not fit into their blocks."""
        rows = self.rows()
        return rows[self.cached_S[rows] == self._num_blocks_S[rows] * BLOCK_TOKENS]

    def add_blocks(self, slots: np.ndarray, blocks: Items[int]) -> None:
        at = self._num_blocks_S[slots]
        self.table_SM = _wide_enough(self.table_SM, int(at.max(initial=0)) + 1)
        self.table_SM[slots, at] = blocks
        self._num_blocks_S[slots] += 1

    def draw_rules(self, slots: np.ndarray) -> tuple[ChoiceRules, np.ndarray]:
        """How each draws its next token, and the random number for it."""
        return self._rules[slots], uniforms(self._stream_S[slots], self._drawn_S[slots])

    def extend(self, slots: np.ndarray, tokens_B: np.ndarray, logprobs_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append one token to each. Returns which met a stop token and which are as long as they may be."""
        at = self._drawn_S[slots]
        width = int(at.max(initial=0)) + 1
        self._tokens_SW = _wide_enough(self._tokens_SW, width)
        self._logprobs_SW = _wide_enough(self._logprobs_SW, width)
        self._tokens_SW[slots, at] = tokens_B
        self._logprobs_SW[slots, at] = logprobs_B
        self.newest_S[slots] = tokens_B
        self._drawn_S[slots] = at + 1
        stopped_B = (self._stop_SX[slots] == tokens_B[:, None]).any(axis=1)
        return stopped_B, at + 1 >= self._max_tokens_S[slots]

    def with_strings(self, slots: np.ndarray) -> np.ndarray:
        """Which of these must look for stop strings."""
        return self._has_strings_S[slots]

    def streamed(self, slots: np.ndarray) -> np.ndarray:
        """Whose tokens are told one by one."""
        return self._is_streamed_S[slots]

    def tail(self, slot: int, num_tokens: int) -> list[int]:
        """The newest tokens that the sequence drew."""
        drawn = int(self._drawn_S[slot])
        tokens: list[int] = self._tokens_SW[slot, max(0, drawn - num_tokens) : drawn].tolist()
        return tokens

    def _take_drawn(self, slot: int, sequence: Sequence) -> None:
        """What it drew before it was interrupted, if it was."""
        drawn = len(sequence.tokens)
        self._drawn_S[slot] = drawn
        self._tokens_SW = _wide_enough(self._tokens_SW, drawn)
        self._logprobs_SW = _wide_enough(self._logprobs_SW, drawn)
        self._tokens_SW[slot, :drawn] = sequence.tokens
        self._logprobs_SW[slot, :drawn] = sequence.logprobs


def _wide_enough(array: np.ndarray, width: int, *, fill: int = 0) -> np.ndarray:
    """The same, or a copy at least twice as wide."""
    if width <= array.shape[1]:
        return array
    wider = np.full((array.shape[0], max(width, 2 * array.shape[1])), fill, array.dtype)
    wider[:, : array.shape[1]] = array
    return wider
