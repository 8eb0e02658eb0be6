"""Norms, gated activations and rotary embeddings of a loaded model, replaced by one pass over memory each.

They take the place of the model's own code where a trial shows that it computes the same: a look-alike that computes
something else stays as it is.
"""

# T row, H hidden or query head, K key head, D head size

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinsmith.engine.kernels import FusedKernels

_ROTATION = "apply_rotary_pos_emb"
"""What the families of transformers call the function that rotates queries and keys."""
_ROTATED_AT_LEAST = 2**16
"""Smaller queries are rotated by the model's own function: a compiled call costs more than its few operations."""


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


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_THD, cos_TD, sin_TD, kernels):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos_TD, sin_TD)
        ctx.kernels = kernels
        return kernels.rotate(x_THD.detach().contiguous(), cos_TD, sin_TD)

    @staticmethod
    def backward(ctx, grad_THD):  # type: ignore[no-untyped-def]
        cos_TD, sin_TD = ctx.saved_tensors
        # the transpose: the same with the halves of the sine exchanged and negated
        back_TD = -sin_TD.roll(sin_TD.shape[1] // 2, dims=1)
        return ctx.kernels.rotate(grad_THD.contiguous(), cos_TD, back_TD), None, None, None


def _rotated(x_1HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, kernels: FusedKernels) -> Tensor:
    y_THD: Tensor = _Rotation.apply(x_1HTD[0].transpose(0, 1), cos_TD, sin_TD, kernels)
    return y_THD.transpose(0, 1)[None]


def fuse_layers(model: nn.Module, kernels: FusedKernels) -> int:
    """Put the functions where the model computes exactly them, tried on random rows; returns how many places."""
    count = fuse_rotations(model, kernels)
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


def fuse_rotations(model: nn.Module, kernels: FusedKernels) -> int:
    """Let attention modules call another `apply_rotary_pos_emb`, where theirs is the common one; returns how many.

    The module of transformers stays as it is: the forward function of each of our modules gets globals of its own.
    """
    forwards: dict[FunctionType, FunctionType | None] = {}
    count = 0
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or _ROTATION not in forward.__code__.co_names:
            continue
        if "forward" in vars(module) or not callable(forward.__globals__.get(_ROTATION)):
            continue
        if forward not in forwards:
            forwards[forward] = _rotating(forward, kernels)
        rotating = forwards[forward]
        if rotating is not None:
            module.forward = MethodType(rotating, module)
            count += 1
    return count


def _rotating(forward: FunctionType, kernels: FusedKernels) -> FunctionType | None:
    """The same function with our rotation, or `None` where the model's own computes something else."""
    original = forward.__globals__[_ROTATION]
    if not _rotates_commonly(original):
        return None

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_common = not args and not kwargs and q.dtype == k.dtype == torch.bfloat16
        is_common &= q.ndim == k.ndim == 4 and q.shape[0] == 1 and cos.shape == (1, q.shape[2], q.shape[3])
        if not is_common or q.numel() < _ROTATED_AT_LEAST:
            return original(q, k, cos, sin, *args, **kwargs)
        return _rotated(q, cos[0], sin[0], kernels), _rotated(k, cos[0], sin[0], kernels)

    names = {**forward.__globals__, _ROTATION: rotation}
    rotating = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rotating.__kwdefaults__ = forward.__kwdefaults__
    return rotating


def _rotates_commonly(original: Callable[..., Any]) -> bool:
    rng = torch.Generator().manual_seed(0)
    q_1HTD, k_1KTD, cos_1TD, sin_1TD = (
        torch.randn(shape, generator=rng) for shape in ((1, 4, 7, 16), (1, 2, 7, 16), (1, 7, 16), (1, 7, 16))
    )
    plain = FusedKernels()
    try:
        expected = original(q_1HTD, k_1KTD, cos_1TD, sin_1TD)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # called in another way
    got = [_rotated(x, cos_1TD[0], sin_1TD[0], plain) for x in (q_1HTD, k_1KTD)]
    return len(expected) == 2 and all(
        e.shape == g.shape and torch.allclose(e, g, atol=1e-5) for e, g in zip(expected, got, strict=True)
    )


def _agree(one: Callable[..., Any], other: Callable[..., Any], width: int, dtype: torch.dtype) -> bool:
    with torch.inference_mode():
        rows = torch.randn(9, width, generator=torch.Generator().manual_seed(0)).to(dtype)
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
