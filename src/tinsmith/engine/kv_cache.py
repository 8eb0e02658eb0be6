"""A paged cache of keys and values: per layer two pools of fixed-size blocks, read through tables of block numbers."""

# B sequence, M block of a sequence, L cached token (padded), K key head, D head size, T written row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.block_pool import BLOCK_TOKENS, BlockPool


@dataclass(slots=True)
class _Room:
    """Memory that stays in the processor's caches: a fresh result would cost as much as the copy itself."""

    rows: Tensor

    def take(self, pool: Tensor, num_blocks: int) -> Tensor:
        if len(self.rows) < num_blocks:
            with torch.inference_mode(False):
                self.rows = torch.empty((num_blocks, *pool.shape[1:]), dtype=pool.dtype, device=pool.device)
        return self.rows[:num_blocks]


@dataclass(frozen=True, slots=True)
class _Pool:
    """Keys or values of one layer, `[blocks, BLOCK_TOKENS, K, D]`, and where reads of it are put."""

    blocks: Tensor
    room: _Room

    def write(self, slots_T: Tensor, rows_TKD: Tensor) -> None:
        self.blocks.view(-1, *rows_TKD.shape[1:]).index_copy_(0, slots_T, rows_TKD)

    def read(self, table_BM: Tensor) -> Tensor:
        num_sequences, num_blocks = table_BM.shape
        out = self.room.take(self.blocks, table_BM.numel())
        torch.index_select(self.blocks, 0, table_BM.view(-1), out=out)
        return out.view(num_sequences, num_blocks * BLOCK_TOKENS, *self.blocks.shape[2:]).transpose(1, 2)


class KVCache:
    """The tensors behind a `BlockPool`. On a CPU memory is taken only as blocks are first written."""

    def __init__(self, *, bytes_max: int, bytes_per_token: int, device: torch.device) -> None:
        self.blocks = BlockPool(max(2, bytes_max // (bytes_per_token * BLOCK_TOKENS)))
        self.key_bytes = 1
        """What the keys of one token take in one layer, the largest; known once something was written."""
        self._device = device
        self._layers: dict[int, tuple[_Pool, _Pool]] = {}
        self._rooms: dict[tuple[str, torch.Size, torch.dtype], _Room] = {}

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store one row per slot; slot s is token s % BLOCK_TOKENS of block s // BLOCK_TOKENS."""
        if layer not in self._layers:
            with torch.inference_mode(False):  # pools outlive the pass that first writes to them
                self._layers[layer] = (self._pool("keys", k_TKD), self._pool("values", v_TKD))
            self.key_bytes = max(self.key_bytes, k_TKD[0].numel() * k_TKD.element_size())
        keys, values = self._layers[layer]
        keys.write(slots_T, k_TKD)
        values.write(slots_T, v_TKD)

    def read(self, layer: int, table_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, K, L, D]`, valid until the next read; cells nobody wrote hold anything finite."""
        keys, values = self._layers[layer]
        return keys.read(table_BM), values.read(table_BM)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        source, target = self._index(sources), self._index(targets)
        for pool in self._pools():
            pool.index_copy_(0, target, pool.index_select(0, source))

    def zero_stale(self) -> None:
        """Zero what blocks that changed hands still hold of others. Call before every pass that writes."""
        if blocks := self.blocks.stale():
            for pool in self._pools():
                pool.index_fill_(0, self._index(blocks), 0)

    def _pool(self, kind: str, like_TKD: Tensor) -> _Pool:
        # zeros, not empty: masked-out cells are still multiplied, and 0 * NaN would be NaN
        shape = torch.Size([self.blocks.num_blocks, BLOCK_TOKENS, *like_TKD.shape[1:]])
        empty = torch.empty((0, *shape[1:]), dtype=like_TKD.dtype, device=self._device)
        room = self._rooms.setdefault((kind, shape, like_TKD.dtype), _Room(empty))
        if self._device.type != "cpu":
            return _Pool(torch.zeros(shape, dtype=like_TKD.dtype, device=self._device), room)
        # numpy asks the system for zero pages, which take memory only once they are written
        num_bytes = int(np.prod(shape)) * like_TKD.element_size()
        return _Pool(torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(like_TKD.dtype).view(shape), room)

    def _pools(self) -> list[Tensor]:
        return [pool.blocks for layer in self._layers.values() for pool in layer]

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._device)
