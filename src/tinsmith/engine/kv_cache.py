"""A paged cache of keys and values: a pool of fixed-size blocks, lent to sequences and shared between them."""

# B sequence, L cached token (padded), K key head, D head size, T written row

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

BLOCK_TOKENS = 16


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order, and how many tokens they hold."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Where one pass writes and, for decoding, what it reads."""

    slots_T: Tensor
    """For each packed row the slot that takes its key and value, int64."""
    table_BM: Tensor | None = None
    """Block numbers per sequence, padded with 0."""
    valid_BL: Tensor = field(default_factory=lambda: torch.empty(0))
    """Which of the M * BLOCK_TOKENS read tokens exist, bool."""
    ages_BL: Tensor = field(default_factory=lambda: torch.empty(0))
    """How many positions before the newest token each lies."""


class KVCache:
    """Blocks are counted by their users; a block with one user is written in place, a shared one is copied first."""

    def __init__(self, *, bytes_max: int, bytes_per_token: int, device: torch.device) -> None:
        self.num_blocks = max(2, bytes_max // (bytes_per_token * BLOCK_TOKENS))
        self._device = device
        # block 0 is never lent and stays zero: tables are padded with it
        self._free = list(range(self.num_blocks - 1, 0, -1))
        self._users = [0] * self.num_blocks
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def blocks_needed(self, table: BlockTable, num_new: int) -> int:
        """How many free blocks it takes to append `num_new` tokens, a copy of a shared last block included."""
        needed = -(-(table.num_tokens + num_new) // BLOCK_TOKENS) - len(table.blocks)
        return needed + (1 if num_new and self._must_copy_last(table) else 0)

    def append(self, table: BlockTable, num_new: int) -> list[int]:
        """Make room for `num_new` tokens and return their slots. The caller made sure that enough blocks are free."""
        if num_new and self._must_copy_last(table):
            self._copy_last(table)
        end = table.num_tokens + num_new
        while len(table.blocks) * BLOCK_TOKENS < end:
            block = self._free.pop()
            self._users[block] = 1
            table.blocks.append(block)
        positions = range(table.num_tokens, end)
        table.num_tokens = end
        return [table.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in positions]

    def fork(self, table: BlockTable) -> BlockTable:
        """A second sequence with the same tokens so far; nothing is copied until one of them grows."""
        for block in table.blocks:
            self._users[block] += 1
        return BlockTable(list(table.blocks), table.num_tokens)

    def release(self, table: BlockTable, *, scrub: bool = False) -> None:
        """Give the blocks back. `scrub` zeroes them, so that a NaN never meets the next borrower's masked-out cells."""
        for block in table.blocks:
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free.append(block)
                if scrub:
                    self._zero(block)
        table.blocks, table.num_tokens = [], 0

    def plan_decode(self, tables: list[BlockTable]) -> CachePlan:
        """Append one token to each table and plan reading all of them. `tables` is not empty."""
        slots = [self.append(table, 1)[0] for table in tables]
        most = max(len(table.blocks) for table in tables)
        table_BM = torch.tensor([t.blocks + [0] * (most - len(t.blocks)) for t in tables], device=self._device)
        lengths_B = torch.tensor([t.num_tokens for t in tables], device=self._device)
        at_L = torch.arange(most * BLOCK_TOKENS, device=self._device)
        ages_BL = lengths_B[:, None] - 1 - at_L[None, :]
        return CachePlan(torch.tensor(slots, device=self._device), table_BM, ages_BL >= 0, ages_BL)

    def write(self, layer: int, plan: CachePlan, k_TKD: Tensor, v_TKD: Tensor) -> None:
        if layer not in self._keys:
            with torch.inference_mode(False):  # pools outlive the pass that first writes to them
                self._keys[layer] = self._pool(k_TKD)
                self._values[layer] = self._pool(v_TKD)
        self._keys[layer].index_copy_(0, plan.slots_T, k_TKD)
        self._values[layer].index_copy_(0, plan.slots_T, v_TKD)

    def read(self, layer: int, plan: CachePlan) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, K, L, D]` of the planned sequences; rows that are not valid hold anything finite."""
        assert plan.table_BM is not None
        return self._gather(self._keys[layer], plan.table_BM), self._gather(self._values[layer], plan.table_BM)

    def _gather(self, pool: Tensor, table_BM: Tensor) -> Tensor:
        num_sequences, num_blocks = table_BM.shape
        blocks = pool.view(self.num_blocks, BLOCK_TOKENS, *pool.shape[1:]).index_select(0, table_BM.reshape(-1))
        return blocks.view(num_sequences, num_blocks * BLOCK_TOKENS, *pool.shape[1:]).transpose(1, 2)

    def _pool(self, like_TKD: Tensor) -> Tensor:
        # zeros, not empty: masked-out cells are still multiplied, and 0 * NaN would be NaN
        shape = (self.num_blocks * BLOCK_TOKENS, *like_TKD.shape[1:])
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=like_TKD.dtype, device=self._device)
        # numpy asks the system for zero pages, which take memory only once they are written
        num_bytes = int(np.prod(shape)) * like_TKD.element_size()
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(like_TKD.dtype).view(shape)

    def _must_copy_last(self, table: BlockTable) -> bool:
        return table.num_tokens % BLOCK_TOKENS != 0 and self._users[table.blocks[-1]] > 1

    def _copy_last(self, table: BlockTable) -> None:
        old, new = table.blocks[-1], self._free.pop()
        self._users[old] -= 1
        self._users[new] = 1
        table.blocks[-1] = new
        for pool in (*self._keys.values(), *self._values.values()):
            pool[_slots(new)] = pool[_slots(old)]

    def _zero(self, block: int) -> None:
        for pool in (*self._keys.values(), *self._values.values()):
            pool[_slots(block)] = 0


def _slots(block: int) -> slice:
    return slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
