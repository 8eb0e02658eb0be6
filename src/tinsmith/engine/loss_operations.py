"""The functions behind the names of `types.loss_operations`, and how large their results may become."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tinsmith.types import loss_operations as allowed

MAX_EXPONENT = 64
"""Of a power of integers."""
MAX_PIECES = 4096
"""Tensors that one call may return."""


def function(name: str) -> Callable[..., Any]:
    """Of a name in `allowed.TARGETS`, and of no other."""
    return FUNCTIONS[name]


def method(name: str) -> Callable[..., Any]:
    """Of a name in `allowed.METHODS`, as a function of the tensor and the method's arguments."""
    return METHODS[name]


def _attribute(value: Any, name: str) -> Any:
    if isinstance(value, Tensor) and name in ("shape", "ndim", "dtype", "device", "T", "mT"):
        return getattr(value, name)
    if isinstance(value, tuple) and name in ("values", "indices") and hasattr(value, name):
        return getattr(value, name)
    raise TypeError(f"a {type(value).__name__} has no {name!r} that can be read")


def _on_operands(fn: Callable[..., Any]) -> Callable[..., Any]:
    """An operator, for tensors and numbers only: on texts and lists some would repeat or format them."""

    @functools.wraps(fn)
    def apply(*operands: Any) -> Any:
        for operand in operands:
            if not isinstance(operand, Tensor | int | float):
                raise TypeError(f"operands must be tensors or numbers, not {type(operand).__name__}")
        return fn(*operands)

    return apply


def _on_numbers(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def apply(*numbers: Any) -> Any:
        for number in numbers:
            if not isinstance(number, int | float):
                raise TypeError(f"works on numbers, not on a {type(number).__name__}; use the function of torch")
        return fn(*numbers)

    return apply


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"the exponent of an integer may be at most {MAX_EXPONENT}, not {exponent}")
    return operator.pow(base, exponent)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A product with a vector: its work is bounded by the size of its operands, that of two matrices is not."""
    if min(a.ndim, b.ndim) != 1:
        raise TypeError(f"one operand of a matrix product must be a vector here, not {a.ndim} and {b.ndim} dimensions")
    return torch.matmul(a, b)


def _divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    """Without truncating division of integers: torch lets the smallest one divided by -1 kill the process."""
    result_dtype = torch.result_type(input, other)
    if rounding_mode == "trunc" and not result_dtype.is_floating_point:
        raise TypeError("rounding_mode 'trunc' is for floating-point numbers here; use 'floor'")
    return torch.div(input, other, rounding_mode=rounding_mode)


def _unbind(input: Tensor, dim: int = 0) -> Any:
    _check_pieces(input.shape[dim])
    return input.unbind(dim)


def _chunk(input: Tensor, chunks: int, dim: int = 0) -> Any:
    _check_pieces(chunks)
    return input.chunk(chunks, dim)


def _split(tensor: Tensor, split_size: Any = None, dim: int = 0, split_size_or_sections: Any = None) -> Any:
    size = split_size if split_size_or_sections is None else split_size_or_sections
    if isinstance(size, int):
        _check_pieces(tensor.shape[dim] // max(size, 1))
    return torch.split(tensor, size, dim)


def _check_pieces(count: int) -> None:
    if count > MAX_PIECES:
        raise ValueError(f"makes {count} pieces; at most {MAX_PIECES} are allowed")


def _norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    result: Tensor = Tensor.norm(input, p, dim, keepdim, dtype)
    return result


_OPERATORS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": _on_operands(getattr(operator, name)) for name in allowed.OPERATOR
}
_INSTEAD: dict[str, Callable[..., Any]] = {
    allowed.GETATTR: _attribute,
    "operator.getitem": operator.getitem,
    "operator.pow": _on_operands(_power),
    "operator.matmul": _product,
    "torch.matmul": _product,
    "torch.norm": _norm,
    "torch.div": _divide,
    "torch.divide": _divide,
    "torch.unbind": _unbind,
    "torch.chunk": _chunk,
    "torch.split": _split,
    "torch.linalg.vector_norm": torch.linalg.vector_norm,
    # without the argument `inplace`
    "torch.nn.functional.elu": torch._C._nn.elu,
    "torch.nn.functional.hardtanh": torch._C._nn.hardtanh,
    "torch.nn.functional.leaky_relu": torch._C._nn.leaky_relu,
    "torch.nn.functional.mish": torch._C._nn.mish,
    "torch.nn.functional.relu": torch.relu,
    "torch.nn.functional.relu6": torch._C._nn.relu6,
    "torch.nn.functional.silu": torch._C._nn.silu,
}
"""What runs in place of the function of that name."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"torch.{name}": getattr(torch, name) for name in allowed.TORCH},
    **{f"torch.nn.functional.{name}": getattr(functional, name) for name in allowed.NN},
    **{f"torch.special.{name}": getattr(torch.special, name) for name in allowed.SPECIAL},
    **{f"math.{name}": _on_numbers(getattr(math, name)) for name in allowed.MATH},
    **_OPERATORS,
    **_INSTEAD,
}

METHODS: dict[str, Callable[..., Any]] = {
    **{name: getattr(Tensor, name) for name in allowed.METHODS},
    "matmul": _product,
    "div": _divide,
    "divide": _divide,
    "unbind": _unbind,
    "chunk": _chunk,
    "split": _split,
}

CREATORS = frozenset(f"torch.{name}" for name in ("arange", "eye", "full", "linspace", "ones", "zeros"))
"""They make tensors out of sizes alone."""

_SIZED = (
    *("broadcast_to", "expand", "expand_as", "index_select", "new_full", "new_ones", "new_zeros", "outer", "quantile"),
    *("repeat", "repeat_interleave", "tile"),
)
SIZED_BY_ARGUMENTS = CREATORS | {
    *_SIZED,
    *(f"torch.{name}" for name in _SIZED),
    *("torch.nn.functional.one_hot", "torch.nn.functional.pad"),
}
"""Their results may be larger than their tensors broadcast or laid end to end; of all others they are not."""
