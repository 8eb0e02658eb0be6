"""Base products of passes without gradients, over weights that oneDNN has laid out beforehand where that is faster."""

# T row of the pass, I in features, O out features

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinsmith.engine.hardware import available_bytes

_MOST_ROWS = 512
"""For more rows torch's own product is as fast."""
_PACKED_AFTER = 3
"""Few-row passes before a layer's weights are laid out anew: an engine that only trains has no use for it."""
_MEMORY_SHARE = 0.2
"""Of the memory free at the first use: second copies of weights take no more."""


class PackingBudget:
    """How many more bytes of weights may be held a second time; one per base model."""

    def __init__(self, *, is_open: bool = True) -> None:
        """`is_open` false: never, so that a result does not depend on what was computed before it."""
        self._left: int | None = None if is_open else 0

    def pack(self, weight_OI: Tensor) -> Tensor | None:
        """The weight as oneDNN wants it, or `None` where that is not to be had or does not pay."""
        if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.bfloat16 or not _has_packed_products():
            return None
        if self._left is None:
            self._left = int(_MEMORY_SHARE * (available_bytes(weight_OI.device) or 0))
        if weight_OI.nbytes > self._left:
            return None
        self._left -= weight_OI.nbytes
        with torch.inference_mode(False):
            packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach())
        return packed


def _has_packed_products() -> bool:
    # what torch's own compiler emits for frozen models; builds without oneDNN lack it
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FrozenLinear:
    """`x W^T + b` for weights that never change. The second copy of the weights is made when it is first of use."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, budget: PackingBudget) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O
        self._budget = budget
        self._packed: Tensor | None = None
        self._num_uses = 0

    def __call__(self, x_TI: Tensor) -> Tensor:
        """A fresh tensor. No gradients."""
        if x_TI.shape[0] > _MOST_ROWS:
            return nn.functional.linear(x_TI, self._weight_OI, self._bias_O)
        self._num_uses += 1
        if self._num_uses == _PACKED_AFTER:
            self._packed = self._budget.pack(self._weight_OI)
        if self._packed is None:
            return nn.functional.linear(x_TI, self._weight_OI, self._bias_O)
        y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, self._bias_O, "none", [], "")
        return y_TO
