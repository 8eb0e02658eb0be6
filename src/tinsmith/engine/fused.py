"""Norms and gated activations in one pass over memory instead of eight.

Between its matrix products a transformer layer reads and writes the same rows again and again; in bfloat16 on a CPU
that costs as much as the products. The functions here are compiled by torch in the background while the engine already
works, and take the place of the model's own layers when they are ready. Rounding differs between the two, so only
bfloat16 models use them: in float32 the same run gives the same bits.
"""

# T row, H hidden, F feed-forward

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


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


class FusedKernels:
    """The compiled functions, once `compile_in_background` is done."""

    def __init__(self) -> None:
        self.norm_forward: Callable[..., tuple[Tensor, Tensor]] = norm_forward
        self.norm_backward: Callable[..., Tensor] = norm_backward
        self.gate_forward: Callable[..., Tensor] = gate_forward
        self.gate_backward: Callable[..., tuple[Tensor, Tensor]] = gate_backward
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


_PLAIN: dict[str, Callable[..., Any]] = {
    "norm_forward": norm_forward,
    "norm_backward": norm_backward,
    "gate_forward": gate_forward,
    "gate_backward": gate_backward,
}


def _sample_arguments(name: str, hidden_size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    # the sizes differ from each other and from 1, or the compiler would take them for always equal
    rows = next(n for n in (33, 34) if n != hidden_size)
    x, y, z = (torch.ones(rows, hidden_size, dtype=dtype) for _ in range(3))
    weight_H, scale = torch.ones(hidden_size, dtype=dtype), torch.ones(rows, 1)
    return {
        "norm_forward": (x, weight_H, 1e-6),
        "norm_backward": (x, y, weight_H, scale),
        "gate_forward": (x, y),
        "gate_backward": (x, y, z),
    }[name]


@cache
def _compiled(name: str, hidden_size: int, dtype: torch.dtype) -> Callable[..., Any]:
    """Compiled once per process, for every situation it will meet: nothing is compiled later while somebody waits."""
    plain, arguments = _PLAIN[name], _sample_arguments(name, hidden_size, dtype)
    function = torch.compile(plain, dynamic=True)
    with torch.no_grad():
        function(*arguments)
    with torch.inference_mode():
        function(*(a.clone() if isinstance(a, Tensor) and a.ndim > 1 else a for a in arguments))

    def call(first: Tensor, *others: Any) -> Any:
        return function(first, *others) if first.shape[0] > 1 else plain(first, *others)

    return call


class FusedRMSNorm(nn.Module):
    """Takes the place of a norm whose weight is frozen."""

    weight: nn.Parameter

    def __init__(self, norm: nn.Module, kernels: FusedKernels) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, norm.weight)
        self._weight_H = self.weight.detach()
        self.variance_epsilon = cast(float, norm.variance_epsilon)
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._kernels.norm_forward(_rows(x), self._weight_H, self.variance_epsilon)[0].view(x.shape)
        result: Tensor = _Norm.apply(x, self.weight.detach(), self.variance_epsilon, self._kernels)
        return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_H, eps, kernels):  # type: ignore[no-untyped-def]
        y, scale = kernels.norm_forward(_rows(x), weight_H, eps)
        ctx.save_for_backward(x, weight_H, scale)
        ctx.kernels = kernels
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight_H, scale = ctx.saved_tensors
        return ctx.kernels.norm_backward(_rows(grad), _rows(x), weight_H, scale).view(x.shape), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kernels):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.gate_forward(_rows(gate), _rows(up)).view(gate.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = ctx.kernels.gate_backward(_rows(grad), _rows(gate), _rows(up))
        return grad_gate.view(gate.shape), grad_up.view(up.shape), None


def _rows(x: Tensor) -> Tensor:
    """`[rows, last]`, contiguous and unknown to autograd: the one form the functions are compiled for."""
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def fuse_layers(model: nn.Module, kernels: FusedKernels) -> int:
    """Put the functions where the model computes exactly them; returns how many places.

    Norms and feed-forward blocks of the Llama form are tried, each on random rows: a look-alike that computes something
    else stays as it is.
    """
    count = 0
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            fused = FusedRMSNorm(module, kernels)
            if _agree(module.forward, fused.forward, module.weight.shape[0], module.weight.dtype):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, fused)
                count += 1
        elif _is_gated(module):
            forward = MethodType(_gated_forward(kernels), module)
            if _agree(module.forward, forward, module.gate_proj.in_features, module.gate_proj.weight.dtype):
                module.forward = forward
                count += 1
    return count


def _agree(one: Callable[..., Any], other: Callable[..., Any], width: int, dtype: torch.dtype) -> bool:
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        expected, got = one(rows), other(rows)
    return bool((expected.float() - got.float()).abs().max() <= 0.02 * expected.float().abs().max())


def _is_gated(module: nn.Module) -> bool:
    return type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation") and all(
        isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")
    )


def _gated_forward(kernels: FusedKernels) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():
            product = _Gate.apply(gate, up, kernels)
        else:
            product = kernels.gate_forward(_rows(gate), _rows(up)).view(gate.shape)
        result: Tensor = self.down_proj(product)
        return result

    return forward
