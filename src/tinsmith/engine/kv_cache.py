"""A paged cache of keys and values: per layer two pools of fixed-size blocks, read through tables of block numbers."""

# B sequence, M block of a sequence, L cached token (padded), K key head, D head size, T written row

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.block_pool import BLOCK_TOKENS, BlockPool


class KVCache:
    """The tensors behind a `BlockPool`. On a CPU memory is taken only as blocks are first written."""

    def __init__(self, *, bytes_max: int, bytes_per_token: int, device: torch.device) -> None:
        self.blocks = BlockPool(max(2, bytes_max // (bytes_per_token * BLOCK_TOKENS)))
        self._device = device
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._scratch: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    @property
    def key_bytes(self) -> int:
        """What the keys of one token take in one layer; the largest layer counts, 1 before anything was written."""
        return max((pool[0, 0].numel() * pool.element_size() for pool in self._keys.values()), default=1)

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store one row per slot; slot s is token s % BLOCK_TOKENS of block s // BLOCK_TOKENS."""
        if layer not in self._keys:
            with torch.inference_mode(False):  # pools outlive the pass that first writes to them
                self._keys[layer] = self._pool(k_TKD)
                self._values[layer] = self._pool(v_TKD)
        for pool, rows in ((self._keys[layer], k_TKD), (self._values[layer], v_TKD)):
            pool.view(-1, *rows.shape[1:]).index_copy_(0, slots_T, rows)

    def read(self, layer: int, table_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, K, L, D]`, valid until the next read; cells nobody wrote hold anything finite."""
        return self._gather("k", self._keys[layer], table_BM), self._gather("v", self._values[layer], table_BM)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        source, target = self._index(sources), self._index(targets)
        for pool in self._pools():
            pool.index_copy_(0, target, pool.index_select(0, source))

    def zero_stale(self) -> None:
        """Zero what blocks that changed hands still hold of others. Call before every pass that writes."""
        if blocks := self.blocks.stale():
            for pool in self._pools():
                pool.index_fill_(0, self._index(blocks), 0)

    def _gather(self, name: str, pool: Tensor, table_BM: Tensor) -> Tensor:
        num_sequences, num_blocks = table_BM.shape
        out = self._room(name, pool, table_BM.numel())
        torch.index_select(pool, 0, table_BM.view(-1), out=out)
        return out.view(num_sequences, num_blocks * BLOCK_TOKENS, *pool.shape[2:]).transpose(1, 2)

    def _room(self, name: str, pool: Tensor, num_blocks: int) -> Tensor:
        """Memory that stays in the processor's caches: a fresh result would cost as much as the copy itself."""
        shape = pool.shape[1:]
        scratch = self._scratch.get((name, shape, pool.dtype))
        if scratch is None or len(scratch) < num_blocks:
            with torch.inference_mode(False):
                scratch = torch.empty((num_blocks, *shape), dtype=pool.dtype, device=pool.device)
            self._scratch[name, shape, pool.dtype] = scratch
        return scratch[:num_blocks]

    def _pool(self, like_TKD: Tensor) -> Tensor:
        # zeros, not empty: masked-out cells are still multiplied, and 0 * NaN would be NaN
        shape = (self.blocks.num_blocks, BLOCK_TOKENS, *like_TKD.shape[1:])
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=like_TKD.dtype, device=self._device)
        # numpy asks the system for zero pages, which take memory only once they are written
        num_bytes = int(np.prod(shape)) * like_TKD.element_size()
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(like_TKD.dtype).view(shape)

    def _pools(self) -> list[Tensor]:
        return [*self._keys.values(), *self._values.values()]

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._device)
