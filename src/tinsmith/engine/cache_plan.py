"""Which rows of a pass read the key-value cache, and how: prompt chunks, and running sequences apart or in groups."""

# T packed row, B running sequence, M block, H query head, D head size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.attend import ScoreRule
from tinsmith.engine.cached_attention import CachedTile, cached_attention, plan_decode
from tinsmith.engine.kv_cache import KVCache
from tinsmith.engine.shared_prefix import Group, SharedPlan, plan_shared, shared_attention


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """One query for each running sequence, in packed rows from `first_row` on; planned when a layer first needs it."""

    first_row: int
    lengths_B: np.ndarray
    """Tokens of each, the new one included."""
    table_BM: np.ndarray
    groups: Sequence[Group]
    key_bytes: int
    """What the keys of one token take in one layer."""
    device: torch.device

    @cached_property
    def separate(self) -> tuple[CachedTile, ...]:
        tiles = plan_decode(
            self.first_row, self.lengths_B, self.table_BM, bytes_per_token=self.key_bytes, device=self.device
        )
        return tuple(tiles)

    @cached_property
    def shared(self) -> SharedPlan | None:
        return plan_shared(
            self.first_row,
            self.lengths_B,
            self.table_BM,
            self.groups,
            bytes_per_token=self.key_bytes,
            device=self.device,
        )


@dataclass(frozen=True, slots=True, eq=False)
class CachePlan:
    """Where one pass writes its keys and values, and which of its rows read the cache."""

    slots_T: Tensor
    """For each packed row the slot that takes its key and value, int64."""
    chunk_tiles: Sequence[CachedTile] = field(default_factory=tuple)
    """Prompt chunks whose beginning was computed before."""
    decode: DecodeRows | None = None

    def only_tile(self, rule: ScoreRule) -> CachedTile | None:
        """The tile that holds all rows of the pass, one query per sequence in their order, if it is like that."""
        decode = self.decode
        if self.chunk_tiles or decode is None or decode.first_row or self._shared(rule) is not None:
            return None
        return decode.separate[0] if len(decode.separate) == 1 else None

    def attend(self, layer: int, q_THD: Tensor, cache: KVCache, rule: ScoreRule, out_THD: Tensor) -> None:
        """Compute all rows that read the cache and put them into `out [T, H, D]`."""
        cached_attention(layer, q_THD, cache, self.chunk_tiles, rule, out_THD)
        if self.decode is None:
            return
        if (shared := self._shared(rule)) is not None:
            shared_attention(layer, q_THD, cache, shared, rule, out_THD)
        else:
            cached_attention(layer, q_THD, cache, self.decode.separate, rule, out_THD)

    def _shared(self, rule: ScoreRule) -> SharedPlan | None:
        return self.decode.shared if self.decode is not None and SharedPlan.suits(rule) else None
