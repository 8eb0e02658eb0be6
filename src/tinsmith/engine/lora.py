"""LoRA over packed rows: which rows belong to which adapter, and the linear layer that honours it.

    y = x W^T + b + (alpha / r) (x A^T) B^T            (Hu et al., arXiv 2106.09685)

Each adapter's weights live in one flat fp32 vector, its gradients in another of the same layout; matrices are views.
A batch is a row of tokens in contiguous segments, one adapter each (or none).
"""

# T token, I in features, O out features, R rank, P all parameters of one adapter

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True, slots=True)
class MatrixPair:
    """A `[R, I]` and B `[O, R]` of one site, views into a flat vector."""

    a_RI: Tensor
    b_OR: Tensor


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

    @cached_property
    def num_parameters(self) -> int:
        return sum(self.spec.rank * (s.num_in + s.num_out) for s in self.sites if self.trains(s))

    def views(self, flat_P: Tensor) -> list[MatrixPair | None]:
        """Per site of the base model the pair of matrices, or `None` where this adapter does not train."""
        pairs: list[MatrixPair | None] = []
        rank, at = self.spec.rank, 0
        for site in self.sites:
            if not self.trains(site):
                pairs.append(None)
                continue
            middle, end = at + rank * site.num_in, at + rank * (site.num_in + site.num_out)
            pairs.append(MatrixPair(flat_P[at:middle].view(rank, site.num_in), flat_P[middle:end].view(-1, rank)))
            at = end
        return pairs

    def named_views(self, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
        """`(site name + ".lora_A" or ".lora_B", matrix)` in layout order."""
        for site, pair in zip(self.sites, self.views(flat_P), strict=True):
            if pair is not None:
                yield f"{site.name}.lora_A", pair.a_RI
                yield f"{site.name}.lora_B", pair.b_OR

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
        self._compute: dict[torch.dtype, list[MatrixPair | None]] = {}

    def pairs(self, dtype: torch.dtype) -> list[MatrixPair | None]:
        """The matrices in the dtype they are multiplied in; for fp32 they are views of the master weights."""
        if dtype not in self._compute:
            self._compute[dtype] = self.layout.views(self.flat_P.to(dtype))
        return self._compute[dtype]

    def changed(self) -> None:
        """Forget the low-precision copies after the master weights were written."""
        self._compute = {dtype: pairs for dtype, pairs in self._compute.items() if dtype == torch.float32}

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


@dataclass(slots=True)
class LoraRouter:
    """The segments of the batch that is passing through the base model now. One per base model."""

    segments: Sequence[Segment] = field(default_factory=tuple)

    def active(self, site: int) -> list[Segment]:
        return [s for s in self.segments if s.weights is not None and s.weights.pairs(torch.float32)[site] is not None]


class LoraLinear(nn.Module):
    """A frozen linear layer plus, per segment of the batch, the low-rank update of that segment's adapter."""

    def __init__(self, base: nn.Linear, site: int, router: LoraRouter) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self._site = site
        self._router = router

    def forward(self, x: Tensor) -> Tensor:
        segments = self._router.active(self._site)
        if not segments:
            return nn.functional.linear(x, self.weight, self.bias)
        y_TO: Tensor = _SegmentedLinear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self._site, segments)
        return y_TO.view(*x.shape[:-1], -1)


class _SegmentedLinear(torch.autograd.Function):
    """Base product for all rows at once, then each segment's update in place.

    The backward pass adds weight gradients straight into the segments' fp32 buffers, and returns the input's.
    One function for all segments: slices under autograd would each cost a full-size buffer in the backward pass.
    """

    @staticmethod
    def forward(ctx, x_TI, weight_OI, bias_O, site, segments):  # type: ignore[no-untyped-def]
        y_TO = nn.functional.linear(x_TI, weight_OI, bias_O)
        low_rank = add_updates(y_TO, x_TI, site, segments)
        ctx.save_for_backward(x_TI, weight_OI, *low_rank)
        ctx.site, ctx.segments = site, segments
        return y_TO

    @staticmethod
    def backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
        x_TI, weight_OI, *low_rank = ctx.saved_tensors
        grad_TI = grad_TO @ weight_OI
        backward_updates(grad_TI, grad_TO, x_TI, low_rank, ctx.site, ctx.segments)
        return grad_TI, None, None, None, None


def add_updates(y_TO: Tensor, x_TI: Tensor, site: int, segments: Sequence[Segment]) -> list[Tensor]:
    """Add each segment's low-rank update to its rows of `y`, in place. Returns x A^T per segment."""
    low_rank = []
    for segment in segments:
        pair, scale = _compute_pair(segment, site, x_TI.dtype)
        h_tR = x_TI[segment.start : segment.end] @ pair.a_RI.T
        y_TO[segment.start : segment.end].addmm_(h_tR.to(y_TO.dtype), pair.b_OR.T.to(y_TO.dtype), alpha=scale)
        low_rank.append(h_tR)
    return low_rank


def backward_updates(
    grad_TI: Tensor,
    grad_TO: Tensor,
    x_TI: Tensor,
    low_rank: Sequence[Tensor],
    site: int,
    segments: Sequence[Segment],
) -> None:
    """Add the updates' part to the input gradient, and the weight gradients to the segments' buffers, all in place."""
    for segment, h_tR in zip(segments, low_rank, strict=True):
        rows = slice(segment.start, segment.end)
        pair, scale = _compute_pair(segment, site, grad_TI.dtype)
        g_tO = grad_TO[rows].to(pair.b_OR.dtype)
        gh_tR = (g_tO @ pair.b_OR) * scale
        grad_TI[rows].addmm_(gh_tR, pair.a_RI)
        grads = segment.grads[site] if segment.grads is not None else None
        if grads is not None:
            _accumulate(grads.a_RI, gh_tR.T, x_TI[rows])
            _accumulate(grads.b_OR, g_tO.T, h_tR, scale)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add a product to an fp32 gradient. Low-precision factors are multiplied as they are and rounded once."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def _compute_pair(segment: Segment, site: int, dtype: torch.dtype) -> tuple[MatrixPair, float]:
    assert segment.weights is not None
    pair = segment.weights.pairs(dtype)[site]
    assert pair is not None
    return pair, segment.weights.layout.scale
