"""Many short segments at once: neighbours are padded to one length and multiplied in batched products.

Alone, a segment of 64 rows costs nine small products per layer, each more call than work.
"""

# T packed row, S segment of a group, L padded length, I in features, O out features, R largest rank of the group

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from tinsmith.engine.lora import LoraWeights, Segment

_LEAST_MEMBERS = 3
_MOST_ROWS = 256
"""A longer segment fills a product of its own."""
_MOST_PADDING = 1.25
"""Padded rows of a group, as a multiple of its real ones."""
_STACK_ELEMENTS = 2**27
"""A group's matrices; more are multiplied one by one, large as they are then."""
_ELEMENTS_KEPT = 2**27
"""Over the stacks of all groups seen lately."""


class WeightStacks:
    """The matrices of several adapters side by side, in the dtype they are multiplied in; smaller ranks are padded."""

    def __init__(self, weights: Sequence[LoraWeights]) -> None:
        self.device = weights[0].flat_P.device
        self.num_elements = _num_elements(weights)
        self._weights = tuple(weights)
        self._rank = max(w.layout.spec.rank for w in weights)
        self._stacks: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._versions: dict[tuple[int, torch.dtype], tuple[int, ...]] = {}

    def at(self, site: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A `[S, R, I]` and B transposed, `[S, R, O]`, as they are at present."""
        versions = tuple(w.version for w in self._weights)
        if self._versions.get((site, dtype)) != versions:
            self._fill(site, dtype)
            self._versions[site, dtype] = versions
        return self._stacks[site, dtype]

    def _fill(self, site: int, dtype: torch.dtype) -> None:
        pairs = [pair for w in self._weights if (pair := w.masters[site]) is not None]
        if (site, dtype) not in self._stacks:
            self._stacks[site, dtype] = (
                _zeros_like(pairs[0].a_RI, len(pairs), self._rank, dtype),
                _zeros_like(pairs[0].b_RO, len(pairs), self._rank, dtype),
            )
        a_SRI, b_SRO = self._stacks[site, dtype]
        for a_RI, b_RO, pair in zip(a_SRI, b_SRO, pairs, strict=True):
            rank = pair.a_RI.shape[0]
            a_RI[:rank].copy_(pair.a_RI)
            b_RO[:rank].copy_(pair.b_RO)


def _zeros_like(matrix_RI: Tensor, count: int, rank: int, dtype: torch.dtype) -> Tensor:
    return matrix_RI.new_zeros(count, rank, matrix_RI.shape[1], dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Padding:
    """How rows and padded places belong together."""

    rows_P: Tensor
    """Row, from the group's start, that fills each of the `S * L` places; places beyond a segment repeat its last."""
    places_T: Tensor
    """The place of each row."""


@dataclass(frozen=True, slots=True, eq=False)
class SegmentGroup:
    """Consecutive segments of adapters that train the same sites; computes what they would compute one by one."""

    segments: tuple[Segment, ...]
    stacks: WeightStacks
    length: int
    padding: _Padding | None
    """`None`: all segments have `length` rows."""
    scale_SL1: Tensor
    """alpha / r of each segment, fp32; 0 for places beyond it. `[S, 1, 1]` without padding."""

    @property
    def start(self) -> int:
        return self.segments[0].start

    @property
    def end(self) -> int:
        return self.segments[-1].end

    def attaches_to(self, site: int) -> bool:
        return self.segments[0].attaches_to(site)

    def add_update(self, y_TO: Tensor, x_TI: Tensor, site: int) -> Tensor:
        a_SRI, b_SRO = self.stacks.at(site, x_TI.dtype)
        h_SLR = torch.bmm(self._padded(x_TI), a_SRI.transpose(1, 2)).mul_(self.scale_SL1)
        self._add(y_TO, h_SLR, b_SRO)
        return h_SLR

    def add_gradients(self, grad_TI: Tensor, grad_TO: Tensor, x_TI: Tensor, h_SLR: Tensor, site: int) -> None:
        a_SRI, b_SRO = self.stacks.at(site, grad_TI.dtype)
        g_SLO = self._padded(grad_TO)
        gh_SLR = torch.bmm(g_SLO, b_SRO.transpose(1, 2)).mul_(self.scale_SL1)
        self._add(grad_TI, gh_SLR, a_SRI)
        if all(segment.grads is None for segment in self.segments):
            return
        grad_a_SRI = torch.bmm(gh_SLR.transpose(1, 2), self._padded(x_TI))
        grad_b_SRO = torch.bmm(h_SLR.transpose(1, 2), g_SLO)
        for segment, grad_a_RI, grad_b_RO in zip(self.segments, grad_a_SRI, grad_b_SRO, strict=True):
            pair = segment.grads[site] if segment.grads is not None else None
            if pair is not None:
                rank = pair.a_RI.shape[0]
                pair.a_RI.add_(grad_a_RI[:rank])
                pair.b_RO.add_(grad_b_RO[:rank])

    def _padded(self, x_TI: Tensor) -> Tensor:
        rows = x_TI[self.start : self.end]
        if self.padding is not None:
            rows = rows.index_select(0, self.padding.rows_P)
        return rows.view(len(self.segments), self.length, -1)

    def _add(self, y_TO: Tensor, h_SLR: Tensor, b_SRO: Tensor) -> None:
        rows = y_TO[self.start : self.end]
        if self.padding is None:
            rows.view(len(self.segments), self.length, -1).baddbmm_(h_SLR, b_SRO)
        else:
            rows.add_(torch.bmm(h_SLR, b_SRO).flatten(0, 1).index_select(0, self.padding.places_T))


Part: TypeAlias = Segment | SegmentGroup


@dataclass(slots=True)
class SegmentPlanner:
    """Finds the groups in the segments of a pass. Keeps the stacks of the adapters it saw last."""

    _stacks: OrderedDict[tuple[int, ...], WeightStacks] = field(default_factory=OrderedDict)

    def plan(self, segments: Sequence[Segment]) -> list[Part]:
        """The segments with an adapter, grouped where it pays."""
        parts: list[Part] = []
        for run in _runs(segments):
            parts.extend([self._group(run)] if _pays(run) else run)
        return parts

    def _group(self, run: Sequence[Segment]) -> SegmentGroup:
        lengths = [segment.num_rows for segment in run]
        longest = max(lengths)
        stacks = self._stacks_of(run)
        scale_SL1 = torch.tensor([segment.scale for segment in run], dtype=torch.float32)[:, None, None]
        if min(lengths) == longest:
            return SegmentGroup(tuple(run), stacks, longest, None, scale_SL1.to(stacks.device))
        lengths_S = torch.tensor(lengths)
        is_real_SL = torch.arange(longest) < lengths_S[:, None]
        padding = _padding(lengths_S, is_real_SL, stacks.device)
        return SegmentGroup(tuple(run), stacks, longest, padding, (scale_SL1 * is_real_SL[..., None]).to(stacks.device))

    def _stacks_of(self, run: Sequence[Segment]) -> WeightStacks:
        weights = [segment.weights for segment in run if segment.weights is not None]
        key = tuple(map(id, weights))  # the stacks hold them, so that no other object can have their ids
        if key not in self._stacks:
            self._stacks[key] = WeightStacks(weights)
            while sum(stacks.num_elements for stacks in self._stacks.values()) > _ELEMENTS_KEPT:
                self._stacks.popitem(last=False)
        self._stacks.move_to_end(key)
        return self._stacks[key]


def _runs(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Neighbours that may form a group: short, of the same sites, and not too different in length."""
    run: list[Segment] = []
    for segment in segments:
        if segment.weights is None:
            continue
        if run and not _fits(run, segment):
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def _fits(run: Sequence[Segment], segment: Segment) -> bool:
    lengths = [s.num_rows for s in (*run, segment)]
    return (
        run[-1].end == segment.start
        and max(lengths) <= _MOST_ROWS
        and len(lengths) * max(lengths) <= _MOST_PADDING * sum(lengths)
        and run[-1].trains_same_sites_as(segment)
    )


def _pays(run: Sequence[Segment]) -> bool:
    return len(run) >= _LEAST_MEMBERS and _num_elements([s.weights for s in run if s.weights]) <= _STACK_ELEMENTS


def _num_elements(weights: Sequence[LoraWeights]) -> int:
    """Of the stacked matrices, padding included."""
    layout = weights[0].layout
    return len(weights) * max(w.layout.spec.rank for w in weights) * layout.num_parameters // layout.spec.rank


def _padding(lengths_S: Tensor, is_real_SL: Tensor, device: torch.device) -> _Padding:
    starts_S = lengths_S.cumsum(0) - lengths_S
    places_L = torch.arange(is_real_SL.shape[1])
    rows_SL = starts_S[:, None] + torch.minimum(places_L, lengths_S[:, None] - 1)
    return _Padding(rows_SL.flatten().to(device), is_real_SL.flatten().nonzero().flatten().to(device))
