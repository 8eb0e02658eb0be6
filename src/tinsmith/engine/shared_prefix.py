"""Running sequences that begin alike, samples of one prompt above all, read their common beginning once per step.

The softmax over all keys of a query is put together from two parts, the blocks shared by its group and its own:

    out = w out_shared + (1 - w) out_own,   w = sigmoid(lse_shared - lse_own)

where lse is the log of the sum of exponentials of a part's scores (Juravsky et al., arXiv 2402.05099).
"""

# B sequence, M block, L cached token (padded), T packed row, P group, Q sequence of a group (padded), C = P * Q cell,
# N real cell, H query head, K key head, G query heads per key head, D head size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.attend import ScoreRule, attend_part
from tinsmith.engine.block_pool import BLOCK_TOKENS
from tinsmith.engine.cached_attention import CachedTile, plan_decode, tile_bytes
from tinsmith.engine.kv_cache import KVCache

_LEVELS_TRIED = 8
_LEAST_SAVED = 64
_LEAST_SAVED_PER_SEQUENCE = 3
"""Blocks of a step: with fewer, putting two parts together costs more than reading them again."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences `[start, end)` of the batch, whose first blocks are the same."""

    start: int
    end: int
    num_blocks: int

    @property
    def saved(self) -> int:
        """Blocks that need not be read again."""
        return (self.end - self.start - 1) * self.num_blocks


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTile:
    """Groups whose common beginnings are read together."""

    rows_C: Tensor
    """Packed row of each query, groups padded to the largest by repeating a real one."""
    real_N: Tensor | None
    """The cells that are no padding; `None`: all."""
    table_PM: Tensor
    hidden_PL: Tensor | None
    """Added to scores: -inf beyond the end of a group's blocks; `None` if all have equally many."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPlan:
    """The running sequences of a pass in two parts."""

    own: tuple[CachedTile, ...]
    """Every sequence over the blocks that are its alone; the newest token is among them."""
    prefixes: tuple[PrefixTile, ...]

    @staticmethod
    def suits(rule: ScoreRule) -> bool:
        """Whether a layer's scores can be taken apart."""
        return rule.is_plain and rule.window is None


def find_groups(table_BM: np.ndarray, full_B: np.ndarray) -> list[Group]:
    """Neighbours whose tables begin alike, looking at no more than the `full` first blocks of each.

    Where groups lie within groups, those that save the most.
    """
    if len(full_B) < 2 or not full_B.any():
        return []
    table_BM = table_BM[:, : int(full_B.max())]
    either = np.minimum(full_B[1:], full_B[:-1])
    same = (table_BM[1:] == table_BM[:-1]) & (np.arange(table_BM.shape[1]) < either[:, None])
    common = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    levels = np.unique(common[common > 0])
    if len(levels) > _LEVELS_TRIED:
        levels = levels[np.linspace(0, len(levels) - 1, _LEVELS_TRIED).astype(int)]
    tried = [_groups_at(int(level), common) for level in levels]
    return max(tried, key=_saved, default=[])


def _groups_at(level: int, common: np.ndarray) -> list[Group]:
    """Groups of neighbours that share at least `level` blocks; `common` of each with the next."""
    bounds = [0, *(np.flatnonzero(common < level) + 1).tolist(), len(common) + 1]
    return [Group(start, end, int(common[start : end - 1].min())) for start, end in pairwise(bounds) if end - start > 1]


def _saved(groups: Sequence[Group]) -> int:
    return sum(group.saved for group in groups)


def plan_shared(
    first_row: int,
    lengths_B: np.ndarray,
    table_BM: np.ndarray,
    groups: Sequence[Group],
    *,
    bytes_per_token: int,
    device: torch.device,
) -> SharedPlan | None:
    """As `plan_decode`; `None` if it does not pay."""
    if _saved(groups) < max(_LEAST_SAVED, _LEAST_SAVED_PER_SEQUENCE * len(lengths_B)):
        return None
    prefix_B = np.zeros(len(lengths_B), np.int64)
    for group in groups:
        prefix_B[group.start : group.end] = group.num_blocks
    own_B = lengths_B - prefix_B * BLOCK_TOKENS
    at_BM = prefix_B[:, None] + np.arange(-(-int(own_B.max()) // BLOCK_TOKENS))
    own_BM = np.take_along_axis(table_BM, np.minimum(at_BM, table_BM.shape[1] - 1), axis=1)
    own = plan_decode(first_row, own_B, own_BM, bytes_per_token=bytes_per_token, device=device)
    most = max(1, tile_bytes(device) // (bytes_per_token * BLOCK_TOKENS))
    ordered = sorted(groups, key=lambda g: (g.num_blocks, g.end - g.start))
    prefixes = []
    at = 0
    while at < len(ordered):
        end = at + 1
        while end < len(ordered) and ordered[end].num_blocks * (end + 1 - at) <= most:
            end += 1
        prefixes.append(_prefix_tile(ordered[at:end], first_row, table_BM, device))
        at = end
    return SharedPlan(tuple(own), tuple(prefixes))


def _prefix_tile(groups: Sequence[Group], first_row: int, table_BM: np.ndarray, device: torch.device) -> PrefixTile:
    sizes_P = np.array([g.end - g.start for g in groups])
    blocks_P = np.array([g.num_blocks for g in groups])
    starts_P = np.array([g.start for g in groups])
    at_Q = np.arange(int(sizes_P.max()))
    rows_PQ = starts_P[:, None] + np.minimum(at_Q, sizes_P[:, None] - 1) + first_row
    real_N = np.flatnonzero(at_Q < sizes_P[:, None])
    inside_PM = np.arange(int(blocks_P.max())) < blocks_P[:, None]
    table_PM = np.where(inside_PM, table_BM[starts_P, : inside_PM.shape[1]], 0)
    hidden_PL = None
    if not inside_PM.all():
        hidden_PL = torch.from_numpy(np.where(inside_PM, 0.0, -np.inf).repeat(BLOCK_TOKENS, axis=1)).to(device)
    return PrefixTile(
        torch.from_numpy(rows_PQ.reshape(-1)).to(device),
        None if len(real_N) == rows_PQ.size else torch.from_numpy(real_N).to(device),
        torch.from_numpy(table_PM).to(device),
        hidden_PL,
    )


def shared_attention(
    layer: int, q_THD: Tensor, cache: KVCache, plan: SharedPlan, rule: ScoreRule, out_THD: Tensor
) -> None:
    """Compute the rows of all running sequences and put them into `out [T, H, D]`."""
    lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
    for own in plan.own:
        k_BKLD, v_BKLD = cache.read(layer, own.table_BM)
        q_BHD = q_THD.index_select(0, own.rows_C)
        q_BKGD = q_BHD.view(len(q_BHD), k_BKLD.shape[1], -1, q_BHD.shape[2])
        out_BKGD, lse_BKG = attend_part(q_BKGD, k_BKLD, v_BKLD, own.hidden(q_THD.dtype)[:, None], rule)
        out_THD.index_copy_(0, own.rows_C, out_BKGD.reshape(len(q_BHD), -1, out_BKGD.shape[-1]))
        lse_TH.index_copy_(0, own.rows_C, lse_BKG.flatten(1))
    for prefix in plan.prefixes:
        _add_prefix(layer, q_THD, cache, prefix, rule, out_THD, lse_TH)


def _add_prefix(
    layer: int,
    q_THD: Tensor,
    cache: KVCache,
    tile: PrefixTile,
    rule: ScoreRule,
    out_THD: Tensor,
    lse_TH: Tensor,
) -> None:
    k_PKLD, v_PKLD = cache.read(layer, tile.table_PM)
    num_groups, num_key_heads = k_PKLD.shape[:2]
    q_CHD = q_THD.index_select(0, tile.rows_C)
    # the sequences of a group and the query heads of one key head are all just queries over the same keys
    q_PQKGD = q_CHD.view(num_groups, -1, num_key_heads, q_CHD.shape[1] // num_key_heads, q_CHD.shape[2])
    hidden = None if tile.hidden_PL is None else tile.hidden_PL[:, None, None].to(q_THD.dtype)
    q_PKXD = q_PQKGD.transpose(1, 2).flatten(2, 3)
    out_PKXD, lse_PKX = attend_part(q_PKXD, k_PKLD, v_PKLD, hidden, rule)
    shape = (num_groups, num_key_heads, -1, q_PQKGD.shape[3])
    out_CHD = out_PKXD.reshape(*shape, out_PKXD.shape[-1]).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    lse_CH = lse_PKX.reshape(shape).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    rows = tile.rows_C
    if tile.real_N is not None:
        rows, out_CHD, lse_CH = (x.index_select(0, tile.real_N) for x in (rows, out_CHD, lse_CH))
    share_NH = torch.sigmoid(lse_CH - lse_TH.index_select(0, rows)).to(out_CHD.dtype)
    own_NHD = out_THD.index_select(0, rows)
    out_THD.index_copy_(0, rows, own_NHD.lerp_(out_CHD, share_NH[:, :, None]))
