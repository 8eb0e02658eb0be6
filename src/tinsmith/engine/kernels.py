"""Arithmetic between matrix products, each function one pass over memory once torch has compiled it.

Between its products a transformer layer reads and writes the same rows again and again; in bfloat16 on a CPU that costs
as much as the products. The functions are compiled in the background while the engine already works. Rounding differs
between compiled and plain, so only bfloat16 models use the former: in float32 the same run gives the same bits.
"""

# T row, H hidden or query head, D head size, X sequence and head, Q query of a tile, S key of a tile

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Kernel = Callable[..., Any]


def norm_forward(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467), and 1 / rms per row in fp32."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight_H, scale


def norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, scale: Tensor) -> Tensor:
    weighted = grad.float() * weight_H.float()
    wide = x.float()
    shared = (weighted * wide).mean(-1, keepdim=True) * scale.pow(3)
    return (weighted * scale - wide * shared).to(x.dtype)


def gate_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202)."""
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)


def gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide, g = gate.float(), grad.float()
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    return (g * up.float() * (sigmoid + silu * (1 - sigmoid))).to(gate.dtype), (g * silu).to(gate.dtype)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864), the two halves of a head being the pairs."""
    half = x_THD.shape[-1] // 2
    turned = torch.cat((-x_THD[..., half:], x_THD[..., :half]), dim=-1)
    return (x_THD.float() * cos_TD[:, None].float() + turned.float() * sin_TD[:, None].float()).to(x_THD.dtype)


def row_dots(one_THD: Tensor, other_THD: Tensor) -> Tensor:
    """rowsum(one * other) in fp32, `[T, H, 1]`."""
    return (one_THD.float() * other_THD.float()).sum(-1, keepdim=True)


def tile_slopes(
    scores_XQS: Tensor, dots_XQS: Tensor, normalizer_XQ1: Tensor, mean_XQ1: Tensor, mask_QS: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention weights of one tile, and what its unscaled scores gain the loss, both in the dtype of `dots`.

    `scores` fp32 q k^T; `dots` dO v^T; `mean` rowsum(dO * O); `mask` is added to the scores; `scale` a scalar tensor.
    """
    p_XQS = torch.exp(scores_XQS * scale - normalizer_XQ1 + mask_QS)
    slopes_XQS = p_XQS * (dots_XQS.float() - mean_XQ1) * scale
    return p_XQS.to(dots_XQS.dtype), slopes_XQS.to(dots_XQS.dtype)


def _tile_slopes_in_place(
    scores_XQS: Tensor, dots_XQS: Tensor, normalizer_XQ1: Tensor, mean_XQ1: Tensor, mask_QS: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The same without a compiler; overwrites the scores."""
    p_XQS = scores_XQS.mul_(scale).sub_(normalizer_XQ1).add_(mask_QS).exp_()
    slopes_XQS = (dots_XQS.float() - mean_XQ1).mul_(p_XQS).mul_(scale)
    return p_XQS.to(dots_XQS.dtype), slopes_XQS.to(dots_XQS.dtype)


class FusedKernels:
    """The functions in their plain form, and the compiled ones once `compile_in_background` is done."""

    def __init__(self) -> None:
        self.norm_forward: Kernel = norm_forward
        self.norm_backward: Kernel = norm_backward
        self.gate_forward: Kernel = gate_forward
        self.gate_backward: Kernel = gate_backward
        self.rotate: Kernel = rotate
        self.row_dots: Kernel = row_dots
        self.tile_slopes: Kernel = _tile_slopes_in_place
        self.is_compiled = False

    def compile_in_background(self, hidden_size: int, dtype: torch.dtype) -> threading.Thread | None:
        """`None` if there is no C++ compiler. A failure to compile is logged and changes nothing.

        A process must not end while its compiler runs, save by `os._exit`: torch aborts then.
        """
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return None
        thread = threading.Thread(target=self._compile, args=(hidden_size, dtype), name="tinsmith-compile", daemon=True)
        thread.start()
        return thread

    def _compile(self, hidden_size: int, dtype: torch.dtype) -> None:
        try:
            compiled = {name: _compiled(name, hidden_size, dtype) for name in _PLAIN}
        except Exception as error:  # noqa: BLE001 - compilers fail in every way; the model's own layers stay in use
            logger.warning("layers are not compiled and run slower: %s", str(error).splitlines()[0])
            return
        for name, function in compiled.items():
            setattr(self, name, function)
        self.is_compiled = True


_PLAIN: dict[str, Kernel] = {
    "norm_forward": norm_forward,
    "norm_backward": norm_backward,
    "gate_forward": gate_forward,
    "gate_backward": gate_backward,
    "rotate": rotate,
    "row_dots": row_dots,
    "tile_slopes": tile_slopes,
}


def _sample_arguments(name: str, hidden_size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    # the sizes differ from each other and from 1, or the compiler would take them for always equal
    rows, heads, keys = (n + (n == hidden_size) * 10 for n in (33, 5, 36))
    x, y, z = (torch.ones(rows, hidden_size, dtype=dtype) for _ in range(3))
    weight_H, scale = torch.ones(hidden_size, dtype=dtype), torch.ones(rows, 1)
    scores, per_query = torch.ones(heads, rows, keys), torch.ones(heads, rows, 1)
    table, heads_THD = torch.ones(rows, 24, dtype=dtype), torch.ones(rows, heads, 24, dtype=dtype)
    return {
        "norm_forward": (x, weight_H, 1e-6),
        "norm_backward": (x, y, weight_H, scale),
        "gate_forward": (x, y),
        "gate_backward": (x, y, z),
        "rotate": (heads_THD, table, table.clone()),
        "row_dots": (heads_THD, heads_THD.clone()),
        "tile_slopes": (scores, scores.to(dtype), per_query, per_query.clone(), scores[0].clone(), torch.tensor(0.5)),
    }[name]


@cache
def _compiled(name: str, hidden_size: int, dtype: torch.dtype) -> Kernel:
    """Compiled once per process, for every situation it will meet: nothing is compiled later while somebody waits."""
    plain, arguments = _PLAIN[name], _sample_arguments(name, hidden_size, dtype)
    function = torch.compile(plain, dynamic=True)
    with torch.no_grad():
        function(*arguments)
    with torch.inference_mode():
        function(*(a.clone() if isinstance(a, Tensor) and a.ndim > 1 else a for a in arguments))

    def call(first: Tensor, *others: Any) -> Any:
        return function(first, *others) if min(first.shape) > 1 else plain(first, *others)

    return call
