"""A loss written by a user, as data: a program of allowed operations. Every `CustomLoss` is valid by construction.

The program is a list of calls in the order of execution; a call refers to inputs and earlier calls by name, so that it
can neither loop nor look ahead. Nothing in it is code: the engine looks each operation up in its own table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import EllipsisType
from typing import Any, Literal, TypeAlias

from tinsmith.types import loss_operations as allowed
from tinsmith.types.errors import InvalidInput

MAX_INPUTS = 16
MAX_CALLS = 2000
MAX_METRICS = 64
MAX_ARGUMENTS = 20_000
"""Values in all calls together, those inside lists counted one by one."""
MAX_ARGUMENT_DEPTH = 5
MAX_NAME = 128

_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_METRIC_KEY = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an input or of an earlier call."""

    node: str


@dataclass(frozen=True, slots=True)
class TorchConstant:
    kind: Literal["dtype", "device", "layout", "memory_format"]
    name: str


Argument: TypeAlias = (
    "bool | int | float | str | EllipsisType | Ref | TorchConstant | slice | list[Any] | tuple[Any, ...] | None"
)
"""Lists, tuples and slices hold arguments again."""

_CONSTANTS = {
    "dtype": allowed.DTYPES,
    "device": allowed.DEVICES,
    "layout": allowed.LAYOUTS,
    "memory_format": allowed.MEMORY_FORMATS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInput:
    """`logprobs`, or the `loss_fn_inputs` key that the loss reads, and how many dimensions it has (0, 1 or 2)."""

    node: str
    """By which calls refer to it."""
    name: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCall:
    node: str
    op: Literal["call_function", "call_method"]
    target: str
    """The function's one name, or a method's name."""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CustomLoss:
    """`inputs` to a scalar loss and scalar metrics, for one datum. Raises `InvalidInput` naming the node at fault."""

    name: str
    inputs: tuple[LossInput, ...]
    calls: tuple[LossCall, ...]
    loss: Ref
    metrics: Mapping[str, Ref] = field(default_factory=dict)
    """`custom/<name>:sum` or `custom/<name>:mean`: the suffix says how the values of several datums become one."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_NAME:
            raise InvalidInput(f"the name of a custom loss must have 1 to {MAX_NAME} characters, not {len(self.name)}")
        known = self._check_inputs()
        if len(self.calls) > MAX_CALLS:
            raise self._fault(f"{len(self.calls)} calls; at most {MAX_CALLS} are allowed")
        num_arguments = 0
        for call in self.calls:
            self._check_call(call, known)
            num_arguments += sum(1 for _ in _values([*call.args, *call.kwargs.values()]))
            if num_arguments > MAX_ARGUMENTS:
                raise self._fault(f"its calls have more than {MAX_ARGUMENTS} arguments")
            known.add(call.node)
        self._check_output(known)

    def _check_inputs(self) -> set[str]:
        """The nodes of the inputs."""
        names = [loss_input.name for loss_input in self.inputs]
        if not names or names[0] != "logprobs":
            raise self._fault(f"the first input must be 'logprobs', not {names[0] if names else None!r}")
        if len(names) > MAX_INPUTS:
            raise self._fault(f"{len(names)} inputs; at most {MAX_INPUTS} are allowed")
        known: set[str] = set()
        for position, loss_input in enumerate(self.inputs):
            if not _INPUT_NAME.fullmatch(loss_input.name) or loss_input.name in names[:position]:
                raise self._fault(f"inputs[{position}].name {loss_input.name!r} is no lower-case name, or comes twice")
            lowest = 1 if position == 0 else 0
            if not lowest <= loss_input.rank <= 2:
                raise self._fault(f"the rank of input {loss_input.name!r} must be {lowest}..2, not {loss_input.rank!r}")
            self._check_node(loss_input.node, known)
            known.add(loss_input.node)
        return known

    def _check_node(self, node: str, known: set[str]) -> None:
        if not _NODE_NAME.fullmatch(node):
            raise self._fault(f"{node[:MAX_NAME]!r} is no name of a node")
        if node in known:
            raise self._fault(f"two nodes are named {node!r}")

    def _check_call(self, call: LossCall, known: set[str]) -> None:
        self._check_node(call.node, known)
        names = allowed.METHODS if call.op == "call_method" else allowed.TARGETS
        if call.target not in names:
            raise self._call_fault(
                call,
                "is not among the operations a server runs; pass the function itself to forward_backward_custom to run "
                "it in the client",
            )
        if call.target == allowed.GETATTR:
            self._check_getattr(call, known)
            return
        for key in call.kwargs:
            if key not in allowed.KEYWORDS:
                raise self._call_fault(call, f"does not take {key[:MAX_NAME]!r} here")
        for argument in (*call.args, *call.kwargs.values()):
            self._check_argument(call, argument, known, MAX_ARGUMENT_DEPTH)

    def _check_getattr(self, call: LossCall, known: set[str]) -> None:
        match call.args:
            case (Ref() as value, str() as attribute) if not call.kwargs:
                self._check_argument(call, value, known, 1)
                if attribute not in allowed.ATTRIBUTES:
                    raise self._call_fault(call, f"may not read attribute {attribute[:MAX_NAME]!r}")
            case _:
                raise self._call_fault(call, "takes a node and the name of an attribute")

    def _check_argument(self, call: LossCall, argument: Any, known: set[str], depth: int) -> None:
        match argument:
            case None | bool() | float() | EllipsisType():
                return
            case int():
                if not -(2**63) <= argument < 2**63:
                    raise self._call_fault(call, f"is given {str(argument)[:40]}, which does not fit 64 bits")
            case str():
                if argument not in allowed.STRINGS:
                    raise self._call_fault(call, f"is given the text {argument[:MAX_NAME]!r}, which is not allowed")
            case Ref(node):
                if node not in known:
                    raise self._call_fault(call, f"refers to {node[:MAX_NAME]!r}, which is no earlier node")
            case TorchConstant(kind, name):
                if name not in _CONSTANTS[kind]:
                    raise self._call_fault(call, f"is given {kind} {name[:MAX_NAME]!r}, which is not allowed")
            case list() | tuple() | slice():
                if depth == 0:
                    raise self._call_fault(call, f"has arguments nested deeper than {MAX_ARGUMENT_DEPTH}")
                for item in _items(argument):
                    self._check_argument(call, item, known, depth - 1)
            case _:
                raise self._call_fault(call, f"is given a {type(argument).__name__}, which is not allowed")

    def _check_output(self, known: set[str]) -> None:
        if len(self.metrics) > MAX_METRICS:
            raise self._fault(f"{len(self.metrics)} metrics; at most {MAX_METRICS} are allowed")
        for key in self.metrics:
            if not _METRIC_KEY.fullmatch(key):
                raise self._fault(
                    f"metric {key[:MAX_NAME]!r} must be named custom/<name>:sum or custom/<name>:mean, in lower case"
                )
        for what, ref in {
            "the loss": self.loss,
            **{f"metric {key!r}": ref for key, ref in self.metrics.items()},
        }.items():
            if ref.node not in known:
                raise self._fault(f"{what} refers to {ref.node[:MAX_NAME]!r}, which is no node")

    def _fault(self, why: str) -> InvalidInput:
        return InvalidInput(f"custom loss {self.name[:MAX_NAME]!r}: {why}")

    def _call_fault(self, call: LossCall, why: str) -> InvalidInput:
        return self._fault(f"node {call.node!r} ({call.op} {call.target[:MAX_NAME]!r}) {why}")

    @cached_property
    def digest(self) -> str:
        """Equal for equal programs."""
        return hashlib.sha256(repr((self.name, self.inputs, self.calls, self.loss, self.metrics)).encode()).hexdigest()


def _items(argument: list[Any] | tuple[Any, ...] | slice) -> list[Any]:
    return [argument.start, argument.stop, argument.step] if isinstance(argument, slice) else list(argument)


def _values(arguments: list[Any]) -> Iterator[Any]:
    for argument in arguments:
        yield argument
        if isinstance(argument, list | tuple | slice):
            yield from _values(_items(argument))
