"""Traced losses as the official SDK uploads them: a torch.fx graph in JSON, node for node, to a `CustomLoss`.

An argument is a JSON scalar, text or list, or an object with one key that says what it is: `ref`, `tuple`, `dict`,
`slice`, `ellipsis`, `float`, `dtype`, `device`, `layout` or `memory_format`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinsmith.server.errors import brief
from tinsmith.server.tinker.schemas import CustomLossInputBody
from tinsmith.types import loss_operations as allowed
from tinsmith.types.custom_loss import MAX_CALLS, MAX_INPUTS, CustomLoss, LossCall, LossInput, Ref, TorchConstant
from tinsmith.types.errors import InvalidInput

FORMAT = 1
_MAX_DEPTH = 12
_NODE_FIELDS = frozenset({"op", "name", "target", "args", "kwargs"})
_CONSTANT_KINDS = frozenset({"dtype", "device", "layout", "memory_format"})
_FLOATS = frozenset({"inf", "-inf", "nan"})
_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "out": (None,),
    "inplace": (False,),
    "size_average": (None,),
    "reduce": (None,),
    "_stacklevel": (3,),
}
"""Keywords that torch itself writes into a trace, with the values that mean nothing."""


def read_custom_loss(name: str, inputs: Sequence[CustomLossInputBody], graph: Mapping[str, Any]) -> CustomLoss:
    """Raises `InvalidInput` naming the node at fault."""
    return _Reader(name).read(inputs, graph)


class _Reader:
    def __init__(self, name: str) -> None:
        self._name = name

    def read(self, inputs: Sequence[CustomLossInputBody], graph: Mapping[str, Any]) -> CustomLoss:
        nodes = graph.get("nodes")
        if graph.get("format", FORMAT) != FORMAT:
            raise self._fault("graph", f"has format {brief(graph['format'])}; this server reads format {FORMAT}")
        if not isinstance(nodes, list) or not nodes:
            raise self._fault("graph.nodes", f"must be a list of nodes, not {brief(nodes)}")
        if len(nodes) > MAX_CALLS + MAX_INPUTS + 1:
            raise self._fault("graph", f"has {len(nodes)} nodes; at most {MAX_CALLS + MAX_INPUTS + 1} are allowed")
        placeholders, body = self._split([self._node(node, i) for i, node in enumerate(nodes)], len(inputs))
        loss, metrics = self._output(body[-1])
        return CustomLoss(
            name=self._name,
            inputs=tuple(self._input(node, given) for node, given in zip(placeholders, inputs, strict=True)),
            calls=tuple(self._call(node) for node in body[:-1]),
            loss=loss,
            metrics=metrics,
        )

    def _node(self, node: Any, index: int) -> dict[str, Any]:
        where = f"graph.nodes[{index}]"
        if not isinstance(node, dict) or not node.keys() <= _NODE_FIELDS:
            raise self._fault(where, f"must be an object of {', '.join(sorted(_NODE_FIELDS))}, not {brief(node)}")
        fields: dict[str, Any] = {"args": [], "kwargs": {}, **node}
        for field, kind in (("op", str), ("name", str), ("target", str), ("args", list), ("kwargs", dict)):
            if not isinstance(fields.get(field), kind):
                raise self._fault(f"{where}.{field}", f"must be a {kind.__name__}, not {brief(fields.get(field))}")
        return fields

    def _split(self, nodes: list[dict[str, Any]], num_inputs: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The placeholders, and the calls with the output at their end."""
        placeholders, body = nodes[:num_inputs], nodes[num_inputs:]
        for node in body[:-1]:
            if node["op"] not in ("call_function", "call_method"):
                raise self._node_fault(node, "must be a call of a function or a method")
        if not body or body[-1]["op"] != "output":
            raise self._fault("graph", f"needs {num_inputs} placeholders first and an output node last")
        return placeholders, body

    def _input(self, node: dict[str, Any], given: CustomLossInputBody) -> LossInput:
        if node["op"] != "placeholder" or node["target"] != given.name or node["args"] or node["kwargs"]:
            raise self._node_fault(node, f"must be the placeholder of input {given.name!r}")
        return LossInput(node=node["name"], name=given.name, rank=given.rank)

    def _call(self, node: dict[str, Any]) -> LossCall:
        target = node["target"]
        if node["op"] == "call_function":
            target = allowed.FUNCTIONS.get(target, target)
        kwargs = {k: v for k, v in node["kwargs"].items() if not (k in _NO_EFFECT and v in _NO_EFFECT[k])}
        return LossCall(
            node=node["name"],
            op=node["op"],
            target=target,
            args=tuple(self._argument(node, value, 0) for value in node["args"]),
            kwargs={key: self._argument(node, value, 0) for key, value in kwargs.items()},
        )

    def _argument(self, node: dict[str, Any], value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise self._node_fault(node, f"has arguments nested deeper than {_MAX_DEPTH}")
        if isinstance(value, list):
            return [self._argument(node, item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        if len(value) != 1:
            raise self._node_fault(node, f"has an argument of {len(value)} keys: {brief(value)}")
        ((kind, content),) = value.items()
        return self._tagged(node, kind, content, depth)

    def _tagged(self, node: dict[str, Any], kind: str, content: Any, depth: int) -> Any:
        match kind, content:
            case "ref", str():
                return Ref(content)
            case "tuple", list():
                return tuple(self._argument(node, item, depth + 1) for item in content)
            case "slice", [start, stop, step]:
                return slice(*(self._argument(node, item, depth + 1) for item in (start, stop, step)))
            case "ellipsis", True:
                return ...
            case "float", str() if content in _FLOATS:
                return float(content)
            case _ if kind in _CONSTANT_KINDS and isinstance(content, str):
                return TorchConstant(kind, content)  # type: ignore[arg-type]
        raise self._node_fault(node, f"has an argument that cannot be read: {brief({kind: content})}")

    def _output(self, node: dict[str, Any]) -> tuple[Ref, dict[str, Ref]]:
        match node["args"]:
            case [{"tuple": [{"ref": str(loss)}, {"dict": dict(metrics)}]}] | [
                [{"ref": str(loss)}, {"dict": dict(metrics)}]
            ]:
                return Ref(loss), {key: self._metric(node, key, value) for key, value in metrics.items()}
        raise self._node_fault(node, f"must return (loss, metrics), not {brief(node['args'])}")

    def _metric(self, node: dict[str, Any], key: str, value: Any) -> Ref:
        match value:
            case {"ref": str(ref)} if len(value) == 1:
                return Ref(ref)
        raise self._node_fault(node, f"returns metric {brief(key)} as {brief(value)}, which is no node")

    def _node_fault(self, node: dict[str, Any], why: str) -> InvalidInput:
        return self._fault(f"node {brief(node['name'])} ({brief(node['op'])}, {brief(node['target'])})", why)

    def _fault(self, what: str, why: str) -> InvalidInput:
        return InvalidInput(f"custom loss {brief(self._name)}: {what} {why}")
