"""LoRA over packed rows: adapters, and which rows belong to which of them.

    y = x W^T + b + (alpha / r) (x A^T) B^T            (Hu et al., arXiv 2106.09685)

Each adapter's weights live in one flat fp32 vector, its gradients in another of the same layout; matrices are views.
A batch is a row of tokens in contiguous segments, one adapter each (or none).
"""

# T token, I in features, O out features, R rank, P all parameters of one adapter

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tinsmith.types.errors import InvalidInput
from tinsmith.types.operations import LoraSpec


@dataclass(frozen=True, slots=True)
class LoraSite:
    """A linear layer that adapters may attach to."""

    name: str
    """Module path in the base model, e.g. `model.layers.0.self_attn.q_proj`."""
    group: str
    """`attn`, `mlp` or `unembed`."""
    num_in: int
    num_out: int
    num_experts: int | None = None
    """Experts that a router chooses among, each with a pair of its own; `None`: one pair for all rows."""

    @property
    def stack(self) -> tuple[int, ...]:
        """The dimensions of its matrices before the last two."""
        return () if self.num_experts is None else (self.num_experts,)

    @property
    def elements_per_rank(self) -> int:
        return math.prod(self.stack) * (self.num_in + self.num_out)


@dataclass(frozen=True, slots=True)
class MatrixPair:
    """A `[R, I]` and the transpose of B, `[R, O]`, of one site, views into a flat vector.

    Transposed, so that what belongs to one rank is contiguous in both: adapters of several ranks stack without strides.
    Of a site with E experts they are `[E, R, I]` and `[E, R, O]`.
    """

    a_RI: Tensor
    b_RO: Tensor

    def of_expert(self, expert: int | None) -> MatrixPair:
        """The pair of one expert; `None` for a site without experts."""
        return self if expert is None else MatrixPair(self.a_RI[expert], self.b_RO[expert])


@dataclass(frozen=True)
class LoraLayout:
    """Where each matrix of an adapter of one shape lies in its flat vector."""

    sites: tuple[LoraSite, ...]
    spec: LoraSpec

    def __post_init__(self) -> None:
        if not any(self.trains(site) for site in self.sites):
            raise InvalidInput(
                f"lora_config trains nothing on this base model: train_attn={self.spec.train_attn}, "
                f"train_mlp={self.spec.train_mlp}, train_unembed={self.spec.train_unembed}, but it has adapter sites "
                f"only in {sorted({site.group for site in self.sites})}"
            )

    def trains(self, site: LoraSite) -> bool:
        return bool(getattr(self.spec, f"train_{site.group}"))

    @property
    def scale(self) -> float:
        return self.spec.alpha / self.spec.rank

    @property
    def trained_groups(self) -> tuple[bool, bool, bool]:
        return self.spec.train_attn, self.spec.train_mlp, self.spec.train_unembed

    @cached_property
    def num_parameters(self) -> int:
        return sum(self.spec.rank * s.elements_per_rank for s in self.sites if self.trains(s))

    def views(self, flat_P: Tensor) -> list[MatrixPair | None]:
        """Per site of the base model the pair of matrices, or `None` where this adapter does not train."""
        pairs: list[MatrixPair | None] = []
        rank, at = self.spec.rank, 0
        for site in self.sites:
            if not self.trains(site):
                pairs.append(None)
                continue
            middle = at + rank * site.num_in * math.prod(site.stack)
            end = at + rank * site.elements_per_rank
            a_RI = flat_P[at:middle].view(*site.stack, rank, site.num_in)
            pairs.append(MatrixPair(a_RI, flat_P[middle:end].view(*site.stack, rank, site.num_out)))
            at = end
        return pairs

    def named_views(self, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
        """`(site name + ".lora_A" or ".lora_B", matrix)` in layout order; `[R, I]` and `[O, R]`, or stacks of them."""
        for site, pair in zip(self.sites, self.views(flat_P), strict=True):
            if pair is not None:
                yield f"{site.name}.lora_A", pair.a_RI
                yield f"{site.name}.lora_B", pair.b_RO.mT

    def initial_weights(self, device: torch.device) -> Tensor:
        """A uniform in ±1/sqrt(I) (Kaiming with a = sqrt 5, as PEFT), B zero; fixed by the seed and the site's name."""
        flat_P = torch.zeros(self.num_parameters, dtype=torch.float32)
        for site, pair in zip(self.sites, self.views(flat_P), strict=True):
            if pair is not None:
                bound = 1 / math.sqrt(site.num_in)
                pair.a_RI.uniform_(-bound, bound, generator=_site_generator(self.spec.seed, site.name))
        return flat_P.to(device)


def _site_generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class LoraWeights:
    """One version of an adapter's weights. Never written to once `freeze` was called."""

    def __init__(self, layout: LoraLayout, flat_P: Tensor) -> None:
        self.layout = layout
        self.flat_P = flat_P
        self.is_frozen = False
        self.version = 0
        """Counts the times the master weights were written."""
        self.masters = layout.views(flat_P)
        self._compute: dict[torch.dtype, list[MatrixPair | None]] = {torch.float32: self.masters}

    def pairs(self, dtype: torch.dtype) -> list[MatrixPair | None]:
        """The matrices in the dtype they are multiplied in; for fp32 they are views of the master weights."""
        if dtype not in self._compute:
            self._compute[dtype] = self.layout.views(self.flat_P.to(dtype))
        return self._compute[dtype]

    def changed(self) -> None:
        """Forget the low-precision copies after the master weights were written."""
        self.version += 1
        self._compute = {torch.float32: self.masters}

    def freeze(self) -> LoraWeights:
        self.is_frozen = True
        return self

    def digest(self) -> str:
        """SHA-256 over shape and values: equal digests compute equal logits."""
        spec = self.layout.spec
        sites = ",".join(site.name for site in self.layout.sites if self.layout.trains(site))
        head = f"{spec.rank}:{spec.alpha}:{sites}:".encode()
        return hashlib.sha256(head + self.flat_P.cpu().numpy().tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `[start, end)` of the packed batch, all of one adapter."""

    start: int
    end: int
    weights: LoraWeights | None
    """`None`: the base model alone."""
    grads: list[MatrixPair | None] | None = None
    """Where the backward pass adds this adapter's gradients; `None` for frozen weights."""
    expert: int | None = None
    """Of rows that a router sent to an expert, which one."""

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def scale(self) -> float:
        return 1.0 if self.weights is None else self.weights.layout.scale

    def attaches_to(self, site: int) -> bool:
        return self.weights is not None and self.weights.masters[site] is not None

    def trains_same_sites_as(self, other: Segment) -> bool:
        return (
            self.weights is not None
            and other.weights is not None
            and self.weights.layout.trained_groups == other.weights.layout.trained_groups
        )

    def add_update(self, y_TO: Tensor, x_TI: Tensor, site: int) -> Tensor:
        """Add the low-rank update to this segment's rows of `y`, in place. Returns x A^T, for `add_gradients`."""
        pair = self._pair(site, x_TI.dtype)
        h_tR = x_TI[self.start : self.end] @ pair.a_RI.T
        y_TO[self.start : self.end].addmm_(h_tR.to(y_TO.dtype), pair.b_RO.to(y_TO.dtype), alpha=self.scale)
        return h_tR

    def add_gradients(self, grad_TI: Tensor, grad_TO: Tensor, x_TI: Tensor, h_tR: Tensor, site: int) -> None:
        """Add the update's part to the input gradient, and the weight gradients to `grads`, all in place."""
        rows = slice(self.start, self.end)
        pair = self._pair(site, grad_TI.dtype)
        g_tO = grad_TO[rows].to(pair.b_RO.dtype)
        gh_tR = (g_tO @ pair.b_RO.T) * self.scale
        grad_TI[rows].addmm_(gh_tR, pair.a_RI)
        grads = self.grads[site] if self.grads is not None else None
        if grads is not None:
            total = grads.of_expert(self.expert)
            _accumulate(total.a_RI, gh_tR.T, x_TI[rows])
            _accumulate(total.b_RO, h_tR.T, g_tO, self.scale)

    def _pair(self, site: int, dtype: torch.dtype) -> MatrixPair:
        assert self.weights is not None
        pair = self.weights.pairs(dtype)[site]
        assert pair is not None
        return pair.of_expert(self.expert)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add a product to an fp32 gradient. Low-precision factors are multiplied as they are and rounded once."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)
