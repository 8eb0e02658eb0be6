"""Routed experts with adapters: every expert has a pair of matrices of its own, and the router stays frozen.

    y = sum over the chosen experts e of w_e * down_e(gate(up_e(x))),   each of up and down with its low-rank update

Each token is repeated for every expert that its router chose; the repeats are sorted by expert, and within an expert
they keep the order of the tokens, so that the rows of one adapter stay together. Base products run per expert, updates
per expert and adapter. Weights are stacked, as transformers keeps them: `gate_up_proj` and `down_proj`, `[E, O, I]`, or
`[E, I, O]` where the module says `is_transposed`.
"""

# T token, K expert chosen for a token, S chosen pair (T * K of them), E expert, I in features, O out features, H hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinsmith.engine.lora import LoraSite, Segment
from tinsmith.engine.lora_linear import LoraRouter

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Largest difference from the module's own output, relative to the largest value."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Which rows of one pass each expert gets."""

    num_choices: int
    """K."""
    order_S: Tensor
    """Sorted row -> its place among the pairs in token order (token * K + choice)."""
    places_S: Tensor
    """The inverse."""
    experts_S: Tensor
    """Of the sorted rows."""
    bounds: list[int]
    """The sorted rows of expert e are `[bounds[e], bounds[e + 1])`."""
    segments: list[Segment]
    """Sorted rows of one expert and one adapter."""


def is_experts(name: str, module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer, whatever it looks like inside."""
    return name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")


def can_adapt(module: nn.Module) -> bool:
    """Whether a module of experts computes exactly what `LoraExperts` does, tried on random rows."""
    weights = [getattr(module, name, None) for name in EXPERT_PARAMETERS]
    if not all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in weights):
        return False
    if not (getattr(module, "has_gate", False) and callable(getattr(module, "_apply_gate", None))):
        return False
    return not getattr(module, "has_post_expert_norm", False) and _agree(module)


def expert_sites(name: str, module: nn.Module) -> list[LoraSite]:
    """The two sites of a module of experts, in the order of `EXPERT_PARAMETERS`."""
    sites = []
    for parameter in EXPERT_PARAMETERS:
        num_experts, first, second = getattr(module, parameter).shape
        num_in, num_out = (first, second) if _is_transposed(module) else (second, first)
        sites.append(LoraSite(f"{name}.{parameter}", "mlp", num_in, num_out, num_experts))
    return sites


class LoraExperts:
    """Takes the place of the forward pass of a module of experts."""

    def __init__(self, module: Any, site: int, router: LoraRouter) -> None:
        """`site` is the number of its first site; the other follows."""
        self._module = module
        self._sites = (site, site + 1)
        self._router = router

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden [T, H]`, `index`, `weights [T, K]` -> `[T, H]`."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        module = self._module
        routing = route(top_k_index, module.gate_up_proj.shape[0], self._router.segments_at(self._sites[0]))
        gated_SI = module._apply_gate(self._product(0, _Dispatch.apply(x_TH, routing), routing))
        y_SH = _Collect.apply(self._product(1, gated_SI, routing), routing)
        y_TKH = y_SH.view(*top_k_weights.shape, -1) * top_k_weights[..., None]
        return y_TKH.sum(dim=1).to(hidden_states.dtype).view(hidden_states.shape)

    def _product(self, which: int, x_SI: Tensor, routing: Routing) -> Tensor:
        name = EXPERT_PARAMETERS[which]
        weight = getattr(self._module, name)
        weight_EIO = weight if _is_transposed(self._module) else weight.transpose(1, 2)
        bias_EO = getattr(self._module, f"{name}_bias", None)
        y_SO: Tensor = _ExpertProduct.apply(x_SI, weight_EIO, bias_EO, self._sites[which], routing)
        return y_SO


def route(index_TK: Tensor, num_experts: int, segments: Sequence[Segment]) -> Routing:
    """Sort the chosen pairs by expert; `segments` are those of the tokens, in packed order."""
    num_tokens, num_choices = index_TK.shape
    expert_S = index_TK.reshape(-1)
    order_S = torch.argsort(expert_S, stable=True)
    places_S = torch.empty_like(order_S)
    places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    # regions of tokens: before the first segment, in it, between it and the second, in the second, ...
    edges = torch.tensor([edge for s in segments for edge in (s.start, s.end)], device=index_TK.device)
    tokens_T = torch.arange(num_tokens, device=index_TK.device)
    region_T = torch.searchsorted(edges, tokens_T, right=True) if segments else torch.zeros_like(tokens_T)
    num_regions = 2 * len(segments) + 1
    cell_S = expert_S * num_regions + region_T.repeat_interleave(num_choices)
    counts = torch.bincount(cell_S, minlength=num_experts * num_regions).cpu().numpy()
    ends = counts.cumsum()
    parts = []
    for cell in np.flatnonzero(counts).tolist():
        expert, region = divmod(cell, num_regions)
        if region % 2:
            whole = segments[region // 2]
            end = int(ends[cell])
            parts.append(Segment(end - int(counts[cell]), end, whole.weights, whole.grads, expert))
    return Routing(
        num_choices=num_choices,
        order_S=order_S,
        places_S=places_S,
        experts_S=expert_S[order_S],
        bounds=[0, *ends[num_regions - 1 :: num_regions].tolist()],
        segments=parts,
    )


def product_per_expert(x_SI: Tensor, weight_EIO: Tensor, bounds: Sequence[int]) -> Tensor:
    """Each expert's rows with its matrix: `[S, O]`."""
    y_SO = x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            torch.mm(x_SI[start:end], weight_EIO[expert], out=y_SO[start:end])
    return y_SO


def grouped_product(x_SI: Tensor, weight_EIO: Tensor, bounds: Sequence[int]) -> Tensor:
    """The same in one call."""
    ends = torch.tensor(bounds[1:], dtype=torch.int32, device=x_SI.device)
    return torch.nn.functional.grouped_mm(x_SI, weight_EIO, offs=ends)


def _product_of(x_SI: Tensor, weight_EIO: Tensor, bounds: Sequence[int]) -> Tensor:
    is_grouped = x_SI.device.type == "cuda" and hasattr(torch.nn.functional, "grouped_mm")
    product = grouped_product if is_grouped else product_per_expert
    return product(x_SI, weight_EIO, bounds)


class _Dispatch(torch.autograd.Function):
    """Rows `[T, H]` of tokens -> `[S, H]`, repeated and sorted. Sums come back in the order of the choices."""

    @staticmethod
    def forward(ctx, x_TH, routing):  # type: ignore[no-untyped-def]
        ctx.routing = routing
        return x_TH.index_select(0, routing.order_S // routing.num_choices)

    @staticmethod
    def backward(ctx, grad_SH):  # type: ignore[no-untyped-def]
        routing: Routing = ctx.routing
        grad_TKH = grad_SH.index_select(0, routing.places_S).view(-1, routing.num_choices, grad_SH.shape[-1])
        return grad_TKH.sum(dim=1), None


class _Collect(torch.autograd.Function):
    """Sorted rows `[S, O]` back into the order of the tokens."""

    @staticmethod
    def forward(ctx, y_SO, routing):  # type: ignore[no-untyped-def]
        ctx.routing = routing
        return y_SO.index_select(0, routing.places_S)

    @staticmethod
    def backward(ctx, grad_SO):  # type: ignore[no-untyped-def]
        return grad_SO.index_select(0, ctx.routing.order_S), None


class _ExpertProduct(torch.autograd.Function):
    """Base product per expert, then each expert's and adapter's update in place; weight gradients go to the buffers."""

    @staticmethod
    def forward(ctx, x_SI, weight_EIO, bias_EO, site, routing):  # type: ignore[no-untyped-def]
        y_SO = _product_of(x_SI, weight_EIO, routing.bounds)
        if bias_EO is not None:
            y_SO.add_(bias_EO.index_select(0, routing.experts_S))
        low_rank = [segment.add_update(y_SO, x_SI, site) for segment in routing.segments]
        ctx.save_for_backward(x_SI, weight_EIO, *low_rank)
        ctx.site, ctx.routing = site, routing
        return y_SO

    @staticmethod
    def backward(ctx, grad_SO):  # type: ignore[no-untyped-def]
        x_SI, weight_EIO, *low_rank = ctx.saved_tensors
        routing: Routing = ctx.routing
        grad_SI = _product_of(grad_SO.contiguous(), weight_EIO.transpose(1, 2), routing.bounds)
        for segment, h_tR in zip(routing.segments, low_rank, strict=True):
            segment.add_gradients(grad_SI, grad_SO, x_SI, h_tR, ctx.site)
        return grad_SI, None, None, None, None


def _agree(module: nn.Module) -> bool:
    gate_up: Tensor = module.gate_up_proj  # type: ignore[assignment]
    hidden = gate_up.shape[1 if _is_transposed(module) else 2]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, hidden, generator=generator).to(gate_up)
    index = torch.arange(16, device=gate_up.device).view(8, 2) * 3 % gate_up.shape[0]
    weights = torch.rand(8, 2, generator=generator).to(gate_up)
    with torch.inference_mode():
        try:
            expected = module(rows, index, weights)
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):  # it is called in another way
            return False
        got = LoraExperts(module, 0, LoraRouter()).forward(rows, index, weights)
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return False
    return bool((expected.float() - got.float()).abs().max() <= _AGREEMENT[gate_up.dtype] * expected.abs().max())


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))
