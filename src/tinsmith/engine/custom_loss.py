"""Runs a `CustomLoss` on one datum after another, on the processor's cores, within bounds of memory and work.

Before each call the size of its result is bounded by its arguments: a call whose arguments decide the size is first
made on tensors without data (device "meta"); any other result is no larger than its tensors broadcast together or laid
end to end. What a datum's program makes in total has a limit that grows with the datum.
"""

# M target token of one request

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine import loss_operations as operations
from tinsmith.types.custom_loss import CustomLoss, LossCall, Ref, TorchConstant
from tinsmith.types.datum import Datum
from tinsmith.types.errors import InvalidInput

ELEMENTS_FREE = 2**22
ELEMENTS_PER_INPUT = 8192
ELEMENTS_MOST = 2**27
"""The values a program may make for a datum: the first, and the second per value of its inputs, up to the third
(512 MiB in fp32)."""

_FAULTS = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, NotImplementedError)
"""What a call raises if its arguments do not fit."""


class TracedLoss:
    """A custom loss whose operations have been looked up."""

    def __init__(self, loss: CustomLoss) -> None:
        self._loss = loss
        self._calls = [(call, _operation(call)) for call in loss.calls]

    def evaluate(
        self, logprobs_M: Tensor, data: Sequence[Datum], *, first_datum: int, forward_only: bool
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The loss summed over the datums, its gradient `[M]` (zeros if `forward_only`), and its metrics.

        Raises `InvalidInput` naming the datum and the node at fault.
        """
        host_M = logprobs_M.detach().cpu()
        values, grads, metrics = [], [], []
        at = 0
        for index, datum in enumerate(data, first_datum):
            shape = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
            end = at + math.prod(shape)
            leaf = host_M[at:end].reshape(shape).clone().requires_grad_(not forward_only)
            try:
                with torch.set_grad_enabled(not forward_only):
                    value, found = self._run(leaf, datum)
                    grads.append(torch.zeros_like(leaf) if forward_only else _gradient(value, leaf))
            except _Misfit as error:
                raise InvalidInput(f"custom loss {self._loss.name!r}, data[{index}]: {error}") from error
            values.append(value.detach().float())
            metrics.append(found)
            at = end
        grad_M = torch.cat([grad.reshape(-1) for grad in grads])
        return torch.stack(values).sum(), grad_M.to(logprobs_M.device), _reduce(metrics)

    def _run(self, logprobs: Tensor, datum: Datum) -> tuple[Tensor, dict[str, float]]:
        """Of one datum. Raises `_Misfit`."""
        nodes: dict[str, Any] = {}
        for given in self._loss.inputs:
            tensor = logprobs if given.name == "logprobs" else datum.loss_fn_inputs[given.name].to_torch()
            nodes[given.node] = tensor.reshape(()) if given.rank == 0 else tensor
        num_inputs = sum(tensor.numel() for tensor in nodes.values())
        budget = _Budget(min(ELEMENTS_FREE + ELEMENTS_PER_INPUT * num_inputs, ELEMENTS_MOST))
        for call, operation in self._calls:
            try:
                nodes[call.node] = _apply(call, operation, nodes, budget)
            except _FAULTS as error:
                raise _Misfit(f"node {call.node!r} ({call.target!r}) failed: {_first_line(error)}") from error
        loss = nodes[self._loss.loss.node]
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            raise _Misfit(f"the loss must be a floating-point scalar, not {_describe(loss)}")
        return loss, {key: _scalar(key, nodes[ref.node]) for key, ref in self._loss.metrics.items()}


class _Misfit(Exception):
    """The program does not fit the datum."""


class _Budget:
    def __init__(self, elements: int) -> None:
        self._left = elements
        self._total = elements

    def check(self, elements: int) -> None:
        if elements > self._left:
            raise ValueError(
                f"it needs {elements} more values, and the loss may make {self._total} in all for this datum"
            )

    def spend(self, elements: int) -> None:
        self.check(elements)
        self._left -= elements


def _operation(call: LossCall) -> Callable[..., Any]:
    return operations.function(call.target) if call.op == "call_function" else operations.method(call.target)


def _apply(call: LossCall, operation: Callable[..., Any], nodes: Mapping[str, Any], budget: _Budget) -> Any:
    args = [_value(argument, nodes) for argument in call.args]
    kwargs = {key: _value(argument, nodes) for key, argument in call.kwargs.items()}
    budget.check(_bound(call, operation, args, kwargs))
    result = operation(*args, **kwargs)
    budget.spend(_checked_size(result))
    return result


def _value(argument: Any, nodes: Mapping[str, Any]) -> Any:
    match argument:
        case Ref(node):
            return nodes[node]
        case TorchConstant(kind, name):
            return torch.device(name) if kind == "device" else getattr(torch, name)
        case list():
            return [_value(item, nodes) for item in argument]
        case tuple():
            return tuple(_value(item, nodes) for item in argument)
        case slice(start=start, stop=stop, step=step):
            return slice(_value(start, nodes), _value(stop, nodes), _value(step, nodes))
        case _:
            return argument


# ---- sizes ----


def _bound(call: LossCall, operation: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> int:
    """At least as many values as the call will make."""
    tensors = _tensors([*args, *kwargs.values()])
    if call.target == "operator.getitem" and isinstance(args[0], Tensor):
        return _selected_size(args[0], args[1])
    if call.target in operations.SIZED_BY_ARGUMENTS:
        hollow = {key: _hollow(value) for key, value in kwargs.items()}
        if call.target in operations.CREATORS:
            hollow["device"] = "meta"
        with torch.no_grad():
            return _size(operation(*(_hollow(value) for value in args), **hollow))
    return max(_broadcast_size([tensor.shape for tensor in tensors]), sum(tensor.numel() for tensor in tensors))


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(_tensors(value))
    return found


def _broadcast_size(shapes: Sequence[Sequence[int]]) -> int:
    """Of shapes that fit together; of others, not less than what any of them could be broadcast to."""
    if all(shape == shapes[0] for shape in shapes):
        return math.prod(shapes[0]) if shapes else 1
    size = 1
    for dim in range(1, max(len(shape) for shape in shapes) + 1):
        size *= max(shape[-dim] for shape in shapes if len(shape) >= dim)
    return size


def _hollow(value: Any) -> Any:
    """The same without data: tensors of the same shape on device "meta"."""
    match value:
        case Tensor():
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        case torch.device() | "cpu":
            return "meta"
        case list():
            return [_hollow(item) for item in value]
        case tuple():
            return tuple(_hollow(item) for item in value)
        case _:
            return value


def _selected_size(tensor: Tensor, index: Any) -> int:
    """The most that `tensor[index]` can have: as if slices took all, and masks selected all their cells."""
    parts = index if isinstance(index, tuple) else (index,)
    num_free = tensor.ndim - sum(_num_dims(part) for part in parts)
    size, at = 1, 0
    selections: list[Sequence[int]] = []
    for part in parts:
        end = at + (num_free if part is ... else _num_dims(part))
        if isinstance(part, Tensor):
            selections.append((part.numel(),) if part.dtype == torch.bool else part.shape)
        elif isinstance(part, list):
            if any(isinstance(item, Tensor | list | tuple) for item in part):
                raise TypeError("a list in an index must be of numbers")
            selections.append((len(part),))
        elif part is ... or isinstance(part, slice):
            size *= math.prod(tensor.shape[at:end])
        at = end
    return size * math.prod(tensor.shape[at:]) * _broadcast_size(selections)


def _num_dims(part: Any) -> int:
    """Of the dimensions of a tensor, those that this part of an index stands for; 0 for an ellipsis."""
    if part is None or part is ... or isinstance(part, bool):
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _size(result: Any) -> int:
    return sum(tensor.numel() for tensor in _tensors([result]))


def _checked_size(result: Any) -> int:
    """Raises `TypeError` or `OverflowError` for what no later call may be given."""
    match result:
        case Tensor():
            if result.is_complex():
                raise TypeError("complex numbers are not allowed")
            return result.numel()
        case int():
            if not -(2**63) <= result < 2**63:
                raise OverflowError("an integer beyond 64 bits")
            return 0
        case float() | torch.dtype() | torch.device():
            return 0
        case tuple() | list():
            return sum(_checked_size(item) for item in result)
        case _:
            raise TypeError(f"it returned a {type(result).__name__}")


# ---- results ----


def _gradient(value: Tensor, logprobs: Tensor) -> Tensor:
    if not value.requires_grad:
        raise _Misfit("the loss does not depend on logprobs, so it has no gradient")
    try:
        (grad,) = torch.autograd.grad(value, logprobs)
    except RuntimeError as error:
        raise _Misfit(f"the loss cannot be differentiated: {_first_line(error)}") from error
    return grad


def _scalar(key: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    if isinstance(value, int | float):
        return float(value)
    raise _Misfit(f"metric {key!r} must be a scalar, not {_describe(value)}")


def _reduce(per_datum: Sequence[Mapping[str, float]]) -> dict[str, float]:
    totals = {key: sum(metrics[key] for metrics in per_datum) for key in per_datum[0]}
    return {key: total / len(per_datum) if key.endswith(":mean") else total for key, total in totals.items()}


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} with shape {tuple(value.shape)!r}"
    return f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
