"""New tokens attending to what the key-value cache holds of their sequences, themselves included.

Sequences of similar length are read together, a tile at a time; a tile is small enough for the processor's caches.
"""

# B sequence, Q query of a sequence (padded), M block, L cached token (padded), C = B * Q cell, N real cell,
# T packed row, H query head, K key head, D head size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.attend import ScoreRule, attend_chunk, attend_grouped
from tinsmith.engine.block_pool import BLOCK_TOKENS, blocks_for
from tinsmith.engine.kv_cache import KVCache

_TILE_BYTES = {"cpu": 2**20}
"""Keys gathered at once. On a CPU a tile that fits the second-level cache reads twice as fast as one that does not."""
_TILE_BYTES_ELSEWHERE = 2**26
_MAX_PADDING = 1.25
"""Sequences share a tile while the longest is at most this much (and a block) longer than the shortest."""
_MASK_CELLS = 2**20
"""Queries times keys of one tile of prompt chunks."""
_SHORT_CHUNK = 32
"""Chunks of at most this many tokens are computed together."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedTile:
    """The queries of some sequences over the cached keys of the same."""

    rows_C: Tensor
    """Packed row of each query; padding repeats a real one."""
    real_N: Tensor | None
    """The cells that are no padding; `None`: all."""
    table_BM: Tensor
    """Block numbers per sequence, padded with 0."""
    ages_BQL: Tensor
    """How many positions before its query each cached token lies; negative: after it, or not there."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _hidden: dict[tuple[torch.dtype, int | None], Tensor] = field(default_factory=dict)

    def hidden(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """What to add to scores so that only visible tokens count, `[B, Q, L]`: attention kernels take it as it is."""
        key = (dtype, window)
        if key not in self._hidden:
            zeros = torch.zeros(self.ages_BQL.shape, dtype=dtype, device=self.ages_BQL.device)
            self._hidden[key] = zeros.masked_fill_(~self.visible(window), float("-inf"))
        return self._hidden[key]

    def visible(self, window: int | None) -> Tensor:
        """Which cached tokens each query sees, bool `[B, Q, L]`."""
        if window not in self._masks:
            mask = self.ages_BQL >= 0
            self._masks[window] = mask & (self.ages_BQL < window) if window else mask
        return self._masks[window]


@dataclass(frozen=True, slots=True, eq=False)
class CachedChunk:
    """Consecutive new tokens of a sequence whose beginning is in the cache."""

    first_row: int
    """Packed row of the first."""
    start: int
    """Position of the first in its sequence."""
    length: int
    blocks: np.ndarray
    """Of the sequence, at least up to the chunk's end."""

    @property
    def end(self) -> int:
        return self.start + self.length


def decode_attention(layer: int, q_BHD: Tensor, cache: KVCache, tile: CachedTile, rule: ScoreRule) -> Tensor:
    """A pass of nothing but one query per sequence, all in one tile and in its order -> `[B, H, D]`."""
    k_BKLD, v_BKLD = cache.read(layer, tile.table_BM)
    return attend_grouped(q_BHD, k_BKLD, v_BKLD, tile.hidden(q_BHD.dtype, rule.window)[:, 0], rule)


def cached_attention(
    layer: int, q_THD: Tensor, cache: KVCache, tiles: Sequence[CachedTile], rule: ScoreRule, out_THD: Tensor
) -> None:
    """Compute the rows of all tiles and put them into `out [T, H, D]`."""
    for tile in tiles:
        k_BKLD, v_BKLD = cache.read(layer, tile.table_BM)
        q_CHD = q_THD.index_select(0, tile.rows_C)
        num_sequences, num_queries = tile.ages_BQL.shape[:2]
        if num_queries == 1:
            hidden_BL = tile.hidden(q_CHD.dtype, rule.window)[:, 0]
            out_CHD = attend_grouped(q_CHD, k_BKLD, v_BKLD, hidden_BL, rule)
        else:
            q_BHQD = q_CHD.view(num_sequences, num_queries, *q_CHD.shape[1:]).transpose(1, 2)
            out_CHD = (
                attend_chunk(q_BHQD, k_BKLD, v_BKLD, tile.visible(rule.window), rule).transpose(1, 2).flatten(0, 1)
            )
        rows = tile.rows_C
        if tile.real_N is not None:
            rows, out_CHD = rows.index_select(0, tile.real_N), out_CHD.index_select(0, tile.real_N)
        out_THD.index_copy_(0, rows, out_CHD)


# ---- planning ----


def tile_bytes(device: torch.device) -> int:
    """Of keys that are gathered at once."""
    return _TILE_BYTES.get(device.type, _TILE_BYTES_ELSEWHERE)


def plan_decode(
    first_row: int, lengths_B: np.ndarray, table_BM: np.ndarray, *, bytes_per_token: int, device: torch.device
) -> list[CachedTile]:
    """One query per sequence, in packed rows from `first_row` on; `lengths` count the new token.

    `bytes_per_token`: of the keys of one layer.
    """
    blocks_B = -(-lengths_B // BLOCK_TOKENS)
    order = np.argsort(-blocks_B, kind="stable")
    most = tile_bytes(device) // (bytes_per_token * BLOCK_TOKENS)
    tiles = []
    at = 0
    while at < len(order):
        longest = int(blocks_B[order[at]])
        end = min(len(order), at + max(1, most // longest))
        chosen = np.sort(order[at : at + int(np.count_nonzero(blocks_B[order[at:end]] * _MAX_PADDING + 1 >= longest))])
        ages_B1L = lengths_B[chosen, None, None] - 1 - np.arange(longest * BLOCK_TOKENS)
        tiles.append(
            CachedTile(
                torch.from_numpy(chosen + first_row).to(device),
                None,
                torch.from_numpy(np.ascontiguousarray(table_BM[chosen, :longest])).to(device),
                torch.from_numpy(ages_B1L).to(device),
            )
        )
        at += len(chosen)
    return tiles


def plan_chunks(chunks: Sequence[CachedChunk], *, device: torch.device) -> list[CachedTile]:
    """Chunks of a few tokens share tiles, longer ones are cut into tiles of their own."""
    tiles: list[CachedTile] = []
    short: dict[tuple[int, int], list[CachedChunk]] = {}
    for chunk in chunks:
        if chunk.length <= _SHORT_CHUNK:
            key = (chunk.length.bit_length(), blocks_for(chunk.end).bit_length())
            short.setdefault(key, []).append(chunk)
        else:
            tiles.extend(_tile([part], device) for part in _cut(chunk))
    for alike in short.values():
        most = max(1, _MASK_CELLS // (_SHORT_CHUNK * max(c.end for c in alike)))
        tiles.extend(_tile(alike[at : at + most], device) for at in range(0, len(alike), most))
    return tiles


def _cut(chunk: CachedChunk) -> list[CachedChunk]:
    size = max(1, _MASK_CELLS // chunk.end)
    return [
        CachedChunk(chunk.first_row + at, chunk.start + at, min(size, chunk.length - at), chunk.blocks)
        for at in range(0, chunk.length, size)
    ]


def _tile(chunks: Sequence[CachedChunk], device: torch.device) -> CachedTile:
    lengths_B = np.array([c.length for c in chunks])
    num_queries = int(lengths_B.max())
    num_blocks = max(blocks_for(c.end) for c in chunks)
    table_BM = np.zeros((len(chunks), num_blocks), dtype=np.int64)
    for row, chunk in zip(table_BM, chunks, strict=True):
        row[: blocks_for(chunk.end)] = chunk.blocks[: blocks_for(chunk.end)]
    at_BQ = np.minimum(np.arange(num_queries), lengths_B[:, None] - 1)
    rows_BQ = at_BQ + np.array([c.first_row for c in chunks])[:, None]
    positions_BQ = at_BQ + np.array([c.start for c in chunks])[:, None]
    ages_BQL = positions_BQ[:, :, None] - np.arange(num_blocks * BLOCK_TOKENS)
    real_N = np.flatnonzero(np.arange(num_queries) < lengths_B[:, None])
    return CachedTile(
        torch.from_numpy(rows_BQ.reshape(-1)).to(device),
        None if len(real_N) == rows_BQ.size else torch.from_numpy(real_N).to(device),
        torch.from_numpy(table_BM).to(device),
        torch.from_numpy(ages_BQL.astype(np.int32)).to(device),
    )
