"""The linear layers that adapters attach to."""

# T packed token, I in features, O out features

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tinsmith.engine.lora import Segment
from tinsmith.engine.lora_groups import Part, SegmentPlanner
from tinsmith.engine.packed_weights import FrozenLinear, PackingBudget


@dataclass(slots=True)
class LoraRouter:
    """The segments of the batch that is passing through the base model now. One per base model."""

    packing: PackingBudget = field(default_factory=PackingBudget)
    _planner: SegmentPlanner = field(default_factory=SegmentPlanner)
    _parts: Sequence[Part] = field(default_factory=tuple)
    _segments: Sequence[Segment] = field(default_factory=tuple)

    def route(self, segments: Sequence[Segment]) -> None:
        """For the pass that follows; nothing for the base model alone."""
        self._parts = self._planner.plan(segments) if segments else ()
        self._segments = segments

    def active(self, site: int) -> list[Part]:
        return [part for part in self._parts if part.attaches_to(site)]

    def segments_at(self, site: int) -> list[Segment]:
        """The same, one by one: for layers whose rows do not lie in packed order."""
        return [segment for segment in self._segments if segment.attaches_to(site)]


class LoraLinear(nn.Module):
    """A frozen linear layer plus, per segment of the batch, the low-rank update of that segment's adapter."""

    def __init__(self, base: nn.Linear, site: int, router: LoraRouter) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self._site = site
        self._router = router
        self._frozen = FrozenLinear(self.weight, self.bias, router.packing)

    def forward(self, x: Tensor) -> Tensor:
        parts = self._router.active(self._site)
        if not torch.is_grad_enabled():
            x_TI = x.reshape(-1, x.shape[-1])
            frozen_TO = self._frozen(x_TI)
            for part in parts:
                part.add_update(frozen_TO, x_TI, self._site)
            return frozen_TO.view(*x.shape[:-1], -1)
        if not parts:
            return nn.functional.linear(x, self.weight, self.bias)
        y_TO: Tensor = _SegmentedLinear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self._site, parts)
        return y_TO.view(*x.shape[:-1], -1)


class _SegmentedLinear(Function):
    """Base product for all rows at once, then each segment's update in place.

    The backward pass adds weight gradients straight into the segments' fp32 buffers, and returns the input's.
    One function for all segments: slices under autograd would each cost a full-size buffer in the backward pass.
    """

    @staticmethod
    def forward(ctx, x_TI, weight_OI, bias_O, site, parts):  # type: ignore[no-untyped-def]
        y_TO = nn.functional.linear(x_TI, weight_OI, bias_O)
        low_rank = [part.add_update(y_TO, x_TI, site) for part in parts]
        ctx.save_for_backward(x_TI, weight_OI, *low_rank)
        ctx.site, ctx.parts = site, parts
        return y_TO

    @staticmethod
    def backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
        x_TI, weight_OI, *low_rank = ctx.saved_tensors
        grad_TI = grad_TO @ weight_OI
        for part, h_tR in zip(ctx.parts, low_rank, strict=True):
            part.add_gradients(grad_TI, grad_TO, x_TI, h_tR, ctx.site)
        return grad_TI, None, None, None, None
