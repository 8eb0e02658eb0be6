"""Workflows as data: what is written here can be checked, drawn, run dry, run and resumed.

    supervised = workflow(
        "supervised",
        stage("load", LoadDataset),
        loop("epochs", over=lambda ctx: range(ctx.config.epochs))(
            loop("batches", over=lambda ctx: ctx.state.batches)(
                stage("forward_backward", ForwardBackward),
                stage("optim_step", OptimStep),
            ),
            conditional(is_due)(stage("checkpoint", Checkpoint)),
        ),
        cleanup=[stage("close", CloseSession)],
    )

Inside `loop("batches", …)` the state has `batches_current` and `batches_index`.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

from tinsmith.kitchen.context import Context
from tinsmith.kitchen.stage import FunctionStage, Stage, StageFunction, is_stage_class

Over: TypeAlias = Callable[[Context], Iterable[Any] | AsyncIterable[Any]]
Predicate: TypeAlias = Callable[[Context], bool]
Producer: TypeAlias = Callable[[Context, int], Any | Awaitable[Any]]
OnStageError: TypeAlias = Literal["halt", "skip", "retry"]
OnBranchError: TypeAlias = Literal["halt", "finish", "skip"]
POLICY_OPTIONS: Final = ("timeout_s", "retries", "on_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNode:
    name: str
    stage: Any
    """A `Stage` subclass or a function of a context; checked by `validate`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None
    """Of one attempt. A stage that blocks its thread cannot be stopped; one that awaits can."""
    retries: int = 0
    """Attempts after the first, under `on_error="retry"`."""
    on_error: OnStageError = "halt"
    """`skip` goes on with the context from before the stage; `retry` tries again, then halts."""

    def make(self) -> Stage:
        return self.stage() if is_stage_class(self.stage) else FunctionStage(self.stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopNode:
    name: str
    over: Over
    body: tuple[Node, ...] = ()
    prefetch: int = 0
    """Items fetched ahead while the body runs; 0 fetches each when its turn comes."""

    def __call__(self, *body: Node) -> LoopNode:
        return replace(self, body=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncLoopNode:
    name: str
    producer: Producer
    stop_when: Predicate
    buffer_size: int
    body: tuple[Node, ...] = ()

    def __call__(self, *body: Node) -> AsyncLoopNode:
        return replace(self, body=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionalNode:
    name: str
    predicate: Predicate
    body: tuple[Node, ...] = ()
    other: tuple[Node, ...] = ()

    def __call__(self, *body: Node) -> ConditionalNode:
        return replace(self, body=body)

    def otherwise(self, *body: Node) -> ConditionalNode:
        return replace(self, other=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelNode:
    name: str
    branches: tuple[tuple[Node, ...], ...]
    max_concurrency: int | None
    """Branches that run at once; `None` for all."""
    on_error: OnBranchError
    """`halt` stops the others, `finish` lets them end and then fails, `skip` leaves the failed branch out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubWorkflowNode:
    name: str
    workflow: Workflow
    config: Callable[[Context], Any] | None
    """The config of the inner workflow, from the outer context; `None` hands the outer one down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflow:
    name: str
    nodes: tuple[Node, ...]
    cleanup: tuple[StageNode, ...] = ()
    """Run at the end on every path, each even if another fails."""
    description: str = ""


Node: TypeAlias = StageNode | LoopNode | AsyncLoopNode | ConditionalNode | ParallelNode | SubWorkflowNode


def workflow(name: str, *nodes: Node, cleanup: Sequence[StageNode] = (), description: str = "") -> Workflow:
    return Workflow(name=name, nodes=nodes, cleanup=tuple(cleanup), description=description)


def stage(
    name: str | type[Stage],
    what: type[Stage] | StageFunction | None = None,
    *,
    timeout_s: float | None = None,
    retries: int = 0,
    on_error: OnStageError | None = None,
    **options: Any,
) -> StageNode:
    """`stage("load", LoadDataset, split="train")`, or `stage(LoadDataset)` under the name the class gives itself."""
    if not isinstance(name, str):
        return stage(
            name.name or name.__name__, name, timeout_s=timeout_s, retries=retries, on_error=on_error, **options
        )
    policy: OnStageError = on_error or ("retry" if retries else "halt")
    return StageNode(name=name, stage=what, options=options, timeout_s=timeout_s, retries=retries, on_error=policy)


def loop(name: str, *, over: Over) -> LoopNode:
    """`loop("epochs", over=lambda ctx: range(3))(stage(…), …)`. No item, no iteration."""
    return LoopNode(name=name, over=over)


def stream_loop(name: str, *, over: Over, prefetch: int = 2) -> LoopNode:
    """A loop whose next `prefetch` items are fetched while the body runs; `over` may be an async iterable."""
    return LoopNode(name=name, over=over, prefetch=prefetch)


def async_loop(name: str, *, producer: Producer, stop_when: Predicate, buffer_size: int = 4) -> AsyncLoopNode:
    """`producer(ctx, index)` makes items, given the newest context, at most `buffer_size` ahead of the body.

    `stop_when` is asked before each item is taken.
    """
    return AsyncLoopNode(name=name, producer=producer, stop_when=stop_when, buffer_size=buffer_size)


def conditional(predicate: Predicate, name: str = "") -> ConditionalNode:
    """`conditional(lambda ctx: …)(stage(…)).otherwise(stage(…))`."""
    return ConditionalNode(name=name or _name_of(predicate), predicate=predicate)


def parallel(
    name: str, *branches: Node | Sequence[Node], max_concurrency: int | None = None, on_error: OnBranchError = "halt"
) -> ParallelNode:
    """Branches that run at the same time, each from the same context; what they put is merged in their order.

    Two branches that put different values under one key are an error.
    """
    return ParallelNode(
        name=name,
        branches=tuple(tuple(branch) if isinstance(branch, Sequence) else (branch,) for branch in branches),
        max_concurrency=max_concurrency,
        on_error=on_error,
    )


def sub_workflow(name: str, inner: Workflow, *, config: Callable[[Context], Any] | None = None) -> SubWorkflowNode:
    """Another workflow as a step of this one. It sees the state and may add to it."""
    return SubWorkflowNode(name=name, workflow=inner, config=config)


def children(node: Node) -> tuple[tuple[str, tuple[Node, ...]], ...]:
    """The node sequences inside a node, each under the words a plan shows for it."""
    match node:
        case LoopNode() | AsyncLoopNode():
            return (("", node.body),)
        case ConditionalNode():
            return (("then", node.body), ("otherwise", node.other)) if node.other else (("", node.body),)
        case ParallelNode():
            return tuple((f"branch {number}", branch) for number, branch in enumerate(node.branches, start=1))
        case SubWorkflowNode():
            return (("", (*node.workflow.nodes, *node.workflow.cleanup)),)
        case _:
            return ()


def stages(nodes: Sequence[Node]) -> Iterator[StageNode]:
    """All stage nodes, in the order they are written."""
    for node in nodes:
        if isinstance(node, StageNode):
            yield node
        for _, inner in children(node):
            yield from stages(inner)


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", "condition")
    return "condition" if name == "<lambda>" else str(name)
