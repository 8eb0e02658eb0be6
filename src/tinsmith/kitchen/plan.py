"""A workflow as a person reads it: a tree, or a Mermaid flow chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from tinsmith.kitchen.stage import is_stage_class
from tinsmith.kitchen.workflow import (
    AsyncLoopNode,
    ConditionalNode,
    LoopNode,
    Node,
    ParallelNode,
    StageNode,
    Workflow,
    children,
)


def describe(workflow: Workflow) -> str:
    """A tree of text."""
    lines = [workflow.name + (f" — {workflow.description}" if workflow.description else "")]
    lines += _branches(_labelled(workflow), "")
    return "\n".join(lines)


def mermaid(workflow: Workflow) -> str:
    """A flow chart; loops, conditions and parallel parts are boxes around what they hold."""
    return "\n".join(["flowchart TD", *_Chart().nodes(workflow)])


def _labelled(workflow: Workflow) -> list[tuple[str, Node | Sequence[Node]]]:
    shown: list[tuple[str, Node | Sequence[Node]]] = [(_label(node), node) for node in workflow.nodes]
    return shown + [(f"always: {_label(node)}", node) for node in workflow.cleanup]


def _branches(entries: Sequence[tuple[str, Node | Sequence[Node]]], indent: str) -> Iterator[str]:
    for number, (label, node) in enumerate(entries, start=1):
        is_last = number == len(entries)
        yield f"{indent}{'└── ' if is_last else '├── '}{label}"
        yield from _branches(_inside(node), indent + ("    " if is_last else "│   "))


def _inside(node: Node | Sequence[Node]) -> list[tuple[str, Node | Sequence[Node]]]:
    if isinstance(node, Sequence):
        return [(_label(inner), inner) for inner in node]
    inside: list[tuple[str, Node | Sequence[Node]]] = []
    for words, nodes in children(node):
        inside += [(words, nodes)] if words else [(_label(inner), inner) for inner in nodes]
    return inside


def _label(node: Node) -> str:
    match node:
        case StageNode():
            marks = [f"{port}" for port in node.stage.needs] if is_stage_class(node.stage) else []
            policy = [f"retries {node.retries}"] if node.retries else []
            policy += [f"timeout {node.timeout_s:g} s"] if node.timeout_s is not None else []
            policy += ["skipped if it fails"] if node.on_error == "skip" else []
            notes = ", ".join([*marks, *policy])
            return f"{node.name} ({notes})" if notes else node.name
        case LoopNode():
            return f"loop {node.name}" + (f" (prefetch {node.prefetch})" if node.prefetch else "")
        case AsyncLoopNode():
            return f"async loop {node.name} (buffer {node.buffer_size})"
        case ConditionalNode():
            return f"if {node.name}"
        case ParallelNode():
            at_once = "all" if node.max_concurrency is None else str(node.max_concurrency)
            return f"parallel {node.name} ({at_once} at once)"
        case _:
            return f"workflow {node.name}"


class _Chart:
    def __init__(self) -> None:
        self._numbers = count(1)

    def nodes(self, workflow: Workflow) -> Iterator[str]:
        yield from self._sequence((*workflow.nodes, *workflow.cleanup), "    ")

    def _sequence(self, nodes: Sequence[Node], indent: str) -> Iterator[str]:
        before: str | None = None
        for node in nodes:
            name = f"n{next(self._numbers)}"
            label = _label(node).replace('"', "'")
            if isinstance(node, StageNode):
                yield f'{indent}{name}["{label}"]'
            else:
                yield f'{indent}subgraph {name}["{label}"]'
                yield from self._inside(node, indent + "    ")
                yield f"{indent}end"
            if before is not None:
                yield f"{indent}{before} --> {name}"
            before = name

    def _inside(self, node: Node, indent: str) -> Iterator[str]:
        for words, nodes in children(node):
            if not words:
                yield from self._sequence(nodes, indent)
                continue
            yield f'{indent}subgraph n{next(self._numbers)}["{words}"]'
            yield from self._sequence(nodes, indent + "    ")
            yield f"{indent}end"
