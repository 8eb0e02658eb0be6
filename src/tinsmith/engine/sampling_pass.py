"""One pass of the sampler as tensors: chunks of prompts and the newest tokens of running sequences, in one packed row.

First the prompts that start here, then further chunks of prompts, then running sequences; within each, equal adapters
lie together.
"""

# T packed row, S slot, B running sequence

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.attention import PassLayout
from tinsmith.engine.block_pool import BLOCK_TOKENS
from tinsmith.engine.cache_plan import CachePlan, DecodeRows
from tinsmith.engine.cached_attention import CachedChunk, plan_chunks
from tinsmith.engine.decode_batch import DecodeBatch
from tinsmith.engine.kv_cache import KVCache
from tinsmith.engine.lora import LoraWeights, Segment
from tinsmith.engine.sampling_request import Chunk
from tinsmith.engine.self_attention import plan_blocks
from tinsmith.engine.vision import ImageRows


@dataclass(frozen=True, slots=True, eq=False)
class PackedPass:
    ids_T: Tensor
    positions_T: Tensor
    """`[3, T]` if a prompt with pictures is among the chunks."""
    images: tuple[ImageRows, ...]
    segments: list[Segment]
    layout: PassLayout
    chunks: list[Chunk]
    """In packed order."""
    first_rows: list[int]
    """Packed row of each chunk's first token."""
    num_chunk_rows: int
    """Rows from here on are those of the running sequences."""


def pack_pass(
    chunks: Sequence[Chunk], batch: DecodeBatch, slots_B: np.ndarray, cache: KVCache, device: torch.device
) -> PackedPass:
    ordered = sorted(chunks, key=lambda c: (c.start > 0, c.prefill.request.adapter))
    lengths = [c.length for c in ordered]
    first_rows = [0, *np.cumsum(lengths).tolist()]
    num_chunk_rows = first_rows.pop()
    cached_B = batch.cached_S[slots_B]
    decode_slots_B = batch.table_SM[slots_B, cached_B // BLOCK_TOKENS] * BLOCK_TOKENS + cached_B % BLOCK_TOKENS
    ids_T = np.concatenate([*(c.prefill.pending.tokens[c.start : c.end] for c in ordered), batch.newest_S[slots_B]])
    positions = [*(c.prefill.request.positions(c.start, c.end) for c in ordered), cached_B + batch.shift_S[slots_B]]
    if any(p.ndim == 2 for p in positions):
        positions = [np.broadcast_to(p, (3, p.shape[-1])) for p in positions]
    slots_T = np.concatenate([*(_slots(c) for c in ordered), decode_slots_B])
    fresh = [c.length for c in ordered if c.start == 0]
    tiles = plan_chunks(
        [
            CachedChunk(row, c.start, c.length, np.asarray(c.prefill.blocks))
            for row, c in zip(first_rows, ordered, strict=True)
            if c.start > 0
        ],
        device=device,
    )
    decode = None
    if len(slots_B):
        table_BM = batch.table_SM[slots_B]
        decode = DecodeRows(num_chunk_rows, cached_B + 1, table_BM, batch.groups(slots_B), cache.key_bytes, device)
    layout = PassLayout(
        blocks=plan_blocks(fresh, device) if fresh else (),
        cache=cache,
        plan=CachePlan(torch.from_numpy(slots_T).to(device), tiles, decode),
    )
    runs = [(c.prefill.request.weights, c.length) for c in ordered] + batch.runs(slots_B)
    return PackedPass(
        ids_T=torch.from_numpy(ids_T).to(device),
        positions_T=torch.from_numpy(np.concatenate(positions, axis=-1)).to(device),
        images=tuple(rows for first, c in zip(first_rows, ordered, strict=True) for rows in c.image_rows(first)),
        segments=segments_of(runs),
        layout=layout,
        chunks=ordered,
        first_rows=first_rows,
        num_chunk_rows=num_chunk_rows,
    )


def segments_of(runs: Sequence[tuple[LoraWeights | None, int]]) -> list[Segment]:
    """Contiguous rows of the same weights, from `(weights, rows)` in packed order."""
    segments: list[Segment] = []
    at = 0
    for weights, length in runs:
        if segments and segments[-1].weights is weights:
            segments[-1] = Segment(segments[-1].start, at + length, weights)
        else:
            segments.append(Segment(at, at + length, weights))
        at += length
    return segments


def _slots(chunk: Chunk) -> np.ndarray:
    positions = np.arange(chunk.start, chunk.end)
    return np.asarray(chunk.prefill.blocks)[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
