"""Functions traced by torch.fx and written down as the official SDK uploads them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

from tinsmith.server.tinker.loss_graphs import read_custom_loss
from tinsmith.server.tinker.schemas import CustomLossInputBody
from tinsmith.types.custom_loss import CustomLoss


def traced(fn: Callable[..., Any], **ranks: int) -> CustomLoss:
    """`ranks` of the parameters that are not of one dimension."""
    names = list(inspect.signature(fn).parameters)
    inputs = [CustomLossInputBody(name=name, rank=ranks.get(name, 1)) for name in names]
    return read_custom_loss(fn.__name__, inputs, graph_of(fn))


def graph_of(fn: Callable[..., Any]) -> dict[str, Any]:
    return {"format": 1, "nodes": [_node(node) for node in fx.symbolic_trace(fn).graph.nodes]}


def _node(node: fx.Node) -> dict[str, Any]:
    target = _get_qualified_name(node.target) if callable(node.target) else node.target
    return {
        "op": node.op,
        "name": node.name,
        "target": target.replace("_operator.", "operator."),
        "args": [_argument(value) for value in node.args],
        "kwargs": {key: _argument(value) for key, value in node.kwargs.items()},
    }


def _argument(value: Any) -> Any:
    match value:
        case fx.Node():
            return {"ref": value.name}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case torch.dtype() | torch.device():
            return {type(value).__name__: str(value).removeprefix("torch.")}
        case slice():
            return {"slice": [_argument(item) for item in (value.start, value.stop, value.step)]}
        case list():
            return [_argument(item) for item in value]
        case tuple():
            return {"tuple": [_argument(item) for item in value]}
        case Mapping():
            return {"dict": {key: _argument(item) for key, item in value.items()}}
        case _:
            return {"ellipsis": True} if value is ... else value
