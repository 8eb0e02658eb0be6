"""What can be known to be wrong with a workflow before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import KitchenError, ValidationError, nearest
from tinsmith.kitchen.ports import PORTS
from tinsmith.kitchen.stage import Stage, is_stage_class
from tinsmith.kitchen.workflow import (
    AsyncLoopNode,
    ConditionalNode,
    LoopNode,
    Node,
    ParallelNode,
    StageNode,
    SubWorkflowNode,
    Workflow,
    children,
    stages,
)


def validate(workflow: Workflow, ctx: Context, *, required: Sequence[str] = ()) -> None:
    """Raises `ValidationError` with every problem found. Calls no adapter.

    `required` names ports that a recipe needs beside those its stages name. The stages' own `validate` hooks are asked
    only once all else is well.
    """
    problems = [*_adapter_problems(workflow, ctx, required), *_structure_problems(workflow, workflow.name)]
    problems = list(dict.fromkeys(problems)) or list(dict.fromkeys(_hook_problems(workflow, ctx)))
    if problems:
        raise ValidationError(problems)


def missing_methods(port: str, adapter: Any) -> list[str]:
    """Methods of the port that the adapter does not have."""
    protocol = PORTS[port]
    names: set[str] = getattr(protocol, "__protocol_attrs__", set()) or {
        name for name in dir(protocol) if not name.startswith("_")
    }
    return sorted(name for name in names if not hasattr(type(adapter), name) and not hasattr(adapter, name))


def _adapter_problems(workflow: Workflow, ctx: Context, required: Sequence[str]) -> Iterator[str]:
    for port in ctx.adapters:
        if port not in PORTS:
            yield f"adapter {port!r} belongs to no port{nearest(port, PORTS)} (the ports are {', '.join(PORTS)})"
    needed: dict[str, str] = dict.fromkeys(required, f"recipe {workflow.name!r}")
    for node in stages((*workflow.nodes, *workflow.cleanup)):
        if is_stage_class(node.stage):
            needed |= {port: f"stage {node.name!r}" for port in node.stage.needs if port not in needed}
    for port, who in needed.items():
        if port not in ctx.adapters:
            yield f"{who} needs an adapter for {port!r}{nearest(port, ctx.adapters)}"
    for port in ctx.adapters.keys() & PORTS.keys() & needed.keys():
        if lacking := missing_methods(port, ctx.adapters[port]):
            kind = type(ctx.adapters[port]).__name__
            yield f"adapter {port!r} ({kind}) lacks {', '.join(lacking)}, which its port promises"


def _structure_problems(workflow: Workflow, where: str, *, in_loop: bool = False) -> Iterator[str]:
    if not workflow.nodes:
        yield f"workflow {workflow.name!r} has no stages"
    yield from _scope_problems(workflow.nodes, where, in_loop=in_loop, cleanup=workflow.cleanup)
    for node in workflow.cleanup:
        if not isinstance(node, StageNode):
            yield f"{where}: cleanup may hold stages only, not {type(node).__name__}"


def _scope_problems(
    nodes: Sequence[Node], where: str, *, in_loop: bool = False, cleanup: Sequence[Node] = ()
) -> Iterator[str]:
    """`in_loop`: whether the end of these nodes is that of a loop's iteration."""
    every = (*nodes, *cleanup)
    for name, count in Counter(node.name for node in every if not isinstance(node, ConditionalNode)).items():
        if count > 1:
            yield f"{where}: {count} nodes are named {name!r}; names must be unique in their scope"
    for number, node in enumerate(every):
        place = f"{where}/{node.name}"
        is_last = number == len(nodes) - 1
        yield from _node_problems(node, place, in_loop=in_loop and is_last)
        if in_loop and not is_last and any(_commits(inner) for inner in _here(node)):
            yield f"{place} stores a checkpoint, so it must be the last of its loop's body"
        inner_in_loop = isinstance(node, LoopNode | AsyncLoopNode) or (in_loop and isinstance(node, ConditionalNode))
        for _, inner_nodes in children(node) if not isinstance(node, SubWorkflowNode) else ():
            yield from _scope_problems(inner_nodes, place, in_loop=inner_in_loop)


def _here(node: Node) -> Iterator[StageNode]:
    """The stages of this iteration: not those of loops inside."""
    if isinstance(node, StageNode):
        yield node
    elif isinstance(node, ConditionalNode):
        for inner in (*node.body, *node.other):
            yield from _here(inner)
    elif isinstance(node, SubWorkflowNode):
        for inner in node.workflow.nodes:
            yield from _here(inner)


def _commits(node: StageNode) -> bool:
    return is_stage_class(node.stage) and bool(node.stage.commits)


def _node_problems(node: Node, place: str, *, in_loop: bool) -> Iterator[str]:
    match node:
        case StageNode():
            yield from _stage_problems(node, place)
        case LoopNode() | AsyncLoopNode():
            if not node.body:
                yield f"{place}: the loop has no body"
            if not node.name.isidentifier():
                yield f"{place}: a loop's name must be an identifier, because the state holds <name>_current"
            if isinstance(node, LoopNode) and (not callable(node.over) or node.prefetch < 0):
                yield f"{place}: over must be a function of the context and prefetch at least 0"
            if isinstance(node, AsyncLoopNode) and node.buffer_size < 1:
                yield f"{place}: buffer_size must be at least 1, not {node.buffer_size}"
        case ConditionalNode():
            if not node.body or not callable(node.predicate):
                yield f"{place}: a conditional needs a function of the context and a body"
        case ParallelNode():
            if not node.branches:
                yield f"{place}: no branches"
            if any(_commits(inner) for inner in stages([node])):
                yield f"{place} stores a checkpoint in a branch, which would not tell how far the others are"
            if node.max_concurrency is not None and node.max_concurrency < 1:
                yield f"{place}: max_concurrency must be at least 1, not {node.max_concurrency}"
        case SubWorkflowNode():
            yield from _structure_problems(node.workflow, place, in_loop=in_loop)
        case _:
            yield f"{place}: {node!r} is no node of a workflow"


def _stage_problems(node: StageNode, place: str) -> Iterator[str]:
    if not is_stage_class(node.stage) and not callable(node.stage):
        yield f"{place}: {node.stage!r} is neither a Stage class nor a function of a context"
        return
    if isinstance(node.stage, Stage):
        yield f"{place}: give the class {type(node.stage).__name__}, not an instance of it"
    if node.timeout_s is not None and node.timeout_s <= 0:
        yield f"{place}: timeout_s must be positive, not {node.timeout_s!r}"
    if node.retries < 0 or (node.retries and node.on_error != "retry"):
        yield f"{place}: retries={node.retries} with on_error={node.on_error!r}; retries need on_error='retry'"
    if is_stage_class(node.stage):
        for name in node.options:
            if name not in node.stage.options:
                known = ", ".join(node.stage.options) or "none"
                yield f"{place}: unknown option {name!r}{nearest(name, node.stage.options)} (it takes {known})"


def _hook_problems(workflow: Workflow, ctx: Context) -> Iterator[str]:
    for node in stages((*workflow.nodes, *workflow.cleanup)):
        try:
            node.make().validate(ctx)
        except KitchenError as error:
            yield f"stage {node.name!r}: {error}"
