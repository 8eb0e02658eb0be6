"""Carries out a workflow.

Invariants: every stage that began is cleaned up; the workflow's cleanup stages run on every path; after a failure the
completed stages are rolled back, the last one first; what failed is told as a `StageError` with its place.

Going on after a stored iteration: loops on the way to it start there; stages that stand before it on the way run again
if they say so (by default those outside loops do, for they build what the rest needs); all else is done already.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from tinsmith.kitchen.context import Context, MetricLog, Place, Settings
from tinsmith.kitchen.errors import ConfigError, StageError, WorkflowError
from tinsmith.kitchen.stage import Stage, has_rollback
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
)

T = TypeVar("T")
_END = object()


@dataclass(frozen=True, slots=True)
class _Way:
    """How a sequence of nodes is entered."""

    going_on: bool = False
    """Whether the stored iteration lies in this sequence, and has not been reached yet."""
    again: bool = False
    """Whether all of it lies before the stored iteration."""
    in_loop: bool = False
    in_thread: bool = False
    """Whether blocking stages must run in a thread, because others run beside them."""


@dataclass(slots=True)
class Runner:
    """One run of one workflow."""

    cursor: Mapping[str, int] = field(default_factory=dict)
    """`Context.cursor` of the iteration to go on after; empty to begin at the beginning."""
    clock: Callable[[], float] = time.monotonic
    _completed: list[tuple[Stage, Context]] = field(default_factory=list)
    _latest: Context | None = None
    """What the last stage returned that was not in a parallel branch: cleaning up begins with it after a failure."""

    async def run(self, workflow: Workflow, ctx: Context) -> Context:
        """Raises `StageError`, and cancels what still runs if it is cancelled itself."""
        began = self.clock()
        ctx.emit("workflow.run.start", workflow=workflow.name, config=ctx.plain_config)
        try:
            ctx = await self._workflow(workflow, ctx, _Way(going_on=bool(self.cursor)))
        except BaseException as error:
            ctx.emit(
                "workflow.run.exception",
                {"duration_s": self.clock() - began},
                workflow=workflow.name,
                error=f"{type(error).__name__}: {error}",
            )
            await self._roll_back(error)
            raise
        ctx.emit("workflow.run.stop", {"duration_s": self.clock() - began}, workflow=workflow.name)
        return ctx

    async def _workflow(self, workflow: Workflow, ctx: Context, way: _Way) -> Context:
        outer, self._latest = ctx, ctx
        try:
            ctx = await self._sequence(workflow.nodes, ctx, way)
        except BaseException as error:
            latest = replace(self._latest, path=outer.path, config=outer.config)
            await self._clean_up(workflow, latest.put(failure=error), way, error)
            raise
        return await self._clean_up(workflow, ctx, way, None)

    async def _clean_up(self, workflow: Workflow, ctx: Context, way: _Way, failure: BaseException | None) -> Context:
        """All cleanup stages, whatever becomes of each. Raises the first error, unless there was one before."""
        first: Exception | None = None
        for node in workflow.cleanup:
            try:
                ctx = await self._stage(node, ctx, way)
            except Exception as error:  # noqa: BLE001 - the others must still run
                first = first or error
        if first is not None and failure is None:
            raise first
        if first is not None and failure is not None:
            failure.add_note(f"then cleaning up failed: {first}")
        return ctx

    async def _roll_back(self, failure: BaseException) -> None:
        while self._completed:
            stage, ctx = self._completed.pop()
            await _despite(failure, f"rolling back {ctx.where}", partial(stage.rollback, ctx))

    # -- sequences ----------------------------------------------------------------------------------------------------

    async def _sequence(self, nodes: Sequence[Node], ctx: Context, way: _Way) -> Context:
        target = self._target(nodes, ctx) if way.going_on else None
        for number, node in enumerate(nodes):
            if way.again or (target is not None and number < target):
                ctx = await self._again(node, ctx, way)
            else:
                ctx = await self._node(node, ctx, replace(way, going_on=number == target))
        return ctx

    def _target(self, nodes: Sequence[Node], ctx: Context) -> int:
        """The node that holds the stored iteration. Raises `WorkflowError` if there is none: another workflow."""
        prefix = [place.name for place in ctx.path]
        for number, node in enumerate(nodes):
            if any(path in self.cursor for path in _loop_paths(node, prefix)):
                return number
        raise WorkflowError(f"the checkpoint was made at {dict(self.cursor)!r}, which this workflow does not have")

    async def _again(self, node: Node, ctx: Context, way: _Way) -> Context:
        """What stands before the stored iteration: only what must be built anew."""
        match node:
            case StageNode():
                wish = node.make().on_resume
                runs = wish == "run" or (wish == "auto" and not way.in_loop)
                return await self._stage(node, ctx, way) if runs else ctx
            case LoopNode() | AsyncLoopNode():
                return ctx
            case _:
                return await self._node(node, ctx, replace(way, going_on=False, again=True))

    async def _node(self, node: Node, ctx: Context, way: _Way) -> Context:
        match node:
            case StageNode():
                return await self._stage(node, ctx, way)
            case LoopNode():
                return await self._loop(node, ctx, way)
            case AsyncLoopNode():
                return await self._async_loop(node, ctx, way)
            case ConditionalNode():
                return await self._conditional(node, ctx, way)
            case ParallelNode():
                return await self._parallel(node, ctx, way)
            case _:
                return await self._sub_workflow(node, ctx, way)

    # -- constructs ---------------------------------------------------------------------------------------------------

    async def _loop(self, node: LoopNode, ctx: Context, way: _Way) -> Context:
        first, going_on = self._first_iteration(node.name, ctx, way)
        outer = ctx
        async with aclosing(_items(_ask(node.over, ctx, f"{node.name}.over"), node.prefetch)) as items:
            index = -1
            async for item in items:
                index += 1
                if index < first:
                    continue
                inner = replace(way, in_loop=True, going_on=going_on and index == first)
                ctx = await self._sequence(node.body, _entered(ctx, node.name, index, item), inner)
                ctx = replace(ctx, path=outer.path)
        return _left(ctx, outer, node.name)

    def _first_iteration(self, name: str, ctx: Context, way: _Way) -> tuple[int, bool]:
        """The index to begin with, and whether the stored place lies deeper inside that iteration."""
        path = "/".join([*(place.name for place in ctx.path), name])
        if not way.going_on or path not in self.cursor:
            return 0, False
        deeper = any(other.startswith(path + "/") for other in self.cursor)
        return self.cursor[path] + (0 if deeper else 1), deeper

    async def _async_loop(self, node: AsyncLoopNode, ctx: Context, way: _Way) -> Context:
        first, going_on = self._first_iteration(node.name, ctx, way)
        outer, newest = ctx, _Newest(ctx)
        buffer: asyncio.Queue[Any] = asyncio.Queue(node.buffer_size)

        async def produce() -> None:
            index = first
            while True:
                await buffer.put(await _settle(node.producer(newest.ctx, index)))
                index += 1

        producer = asyncio.create_task(produce())
        try:
            index = first
            while not _ask(node.stop_when, ctx, f"{node.name}.stop_when"):
                item = await _next_of(buffer, producer)
                inner = replace(way, in_loop=True, going_on=going_on and index == first)
                ctx = await self._sequence(node.body, _entered(ctx, node.name, index, item), inner)
                ctx = newest.ctx = replace(ctx, path=outer.path)
                index += 1
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)
        return _left(ctx, outer, node.name)

    async def _conditional(self, node: ConditionalNode, ctx: Context, way: _Way) -> Context:
        if way.going_on:
            prefix = [place.name for place in ctx.path]
            taken = any(path in self.cursor for inner in node.body for path in _loop_paths(inner, prefix))
        else:
            taken = bool(_ask(node.predicate, ctx, f"if {node.name}"))
        return await self._sequence(node.body if taken else node.other, ctx, way)

    async def _parallel(self, node: ParallelNode, ctx: Context, way: _Way) -> Context:
        gate = asyncio.Semaphore(node.max_concurrency or len(node.branches))

        async def branch(nodes: Sequence[Node], number: int) -> Context:
            async with gate:
                start = replace(ctx, path=(*ctx.path, Place(name=node.name, index=number)))
                return await self._sequence(nodes, start, replace(way, going_on=False, in_thread=True))

        tasks = [asyncio.create_task(branch(nodes, number)) for number, nodes in enumerate(node.branches)]
        try:
            if node.on_error == "halt":
                await asyncio.gather(*tasks)
            else:
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if node.on_error == "finish":
            for task in tasks:
                task.result()
        return _merged(ctx, [task.result() for task in tasks if task.exception() is None], node.name)

    async def _sub_workflow(self, node: SubWorkflowNode, ctx: Context, way: _Way) -> Context:
        config = ctx.config if node.config is None else _ask(node.config, ctx, f"{node.name}.config")
        inner = replace(ctx, config=config, path=(*ctx.path, Place(name=node.name)))
        ctx_after = await self._workflow(node.workflow, inner, way)
        return replace(ctx_after, config=ctx.config, path=ctx.path)

    # -- stages -------------------------------------------------------------------------------------------------------

    async def _stage(self, node: StageNode, ctx: Context, way: _Way) -> Context:
        attempts = 1 + node.retries if node.on_error == "retry" else 1
        for attempt in range(1, attempts + 1):
            try:
                return await self._attempt(node, ctx, way)
            except StageError:
                if node.on_error == "skip":
                    return ctx
                if attempt == attempts:
                    raise
        raise AssertionError("a stage has at least one attempt")

    async def _attempt(self, node: StageNode, ctx: Context, way: _Way) -> Context:
        options = Settings(node.options, what=f"options of stage {node.name!r}")
        begun = replace(ctx, current_stage=node.name, stage_opts=options)
        place, began, stage = begun.where, self.clock(), node.make()
        begun.emit("stage.run.start", stage=place)
        try:
            try:
                async with asyncio.timeout(node.timeout_s):
                    done = await self._execute(stage, begun, way)
            except BaseException as error:
                if isinstance(error, Exception):
                    await _despite(error, f"on_error of {place}", partial(stage.on_error, begun, error))
                await _despite(error, f"cleaning up {place}", partial(stage.cleanup, begun))
                raise
            await _settle(stage.cleanup(begun))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            begun.emit(
                "stage.run.exception",
                {"duration_s": self.clock() - began},
                stage=place,
                error=f"{type(error).__name__}: {error}",
            )
            raise StageError(place, begun.indices, error) from error
        begun.emit("stage.run.stop", {"duration_s": self.clock() - began}, stage=place)
        if has_rollback(stage):
            self._completed.append((stage, done))
        done = replace(done, current_stage=ctx.current_stage, stage_opts=ctx.stage_opts)
        if not way.in_thread:
            self._latest = done
        return done

    async def _execute(self, stage: Stage, ctx: Context, way: _Way) -> Context:
        ctx = _result(await _call(stage.before, ctx, way), ctx)
        ctx = _result(await _call(stage.execute, ctx, way), ctx)
        return _result(await _call(stage.after, ctx, way), ctx)


@dataclass(slots=True)
class _Newest:
    """The last context of an async loop's body: what its producer is given."""

    ctx: Context


async def _call(hook: Callable[[Context], Any], ctx: Context, way: _Way) -> Any:
    if way.in_thread and not inspect.iscoroutinefunction(hook):
        return await _settle(await asyncio.to_thread(hook, ctx))
    return await _settle(hook(ctx))


def _ask(function: Callable[[Context], T], ctx: Context, name: str) -> T:
    """What a function of the workflow says. Raises `StageError` with its place if it fails."""
    try:
        return function(ctx)
    except Exception as error:
        raise StageError(replace(ctx, current_stage=name).where, ctx.indices, error) from error


async def _despite(failure: BaseException, what: str, hook: Callable[[], Any]) -> None:
    """Call a hook because of a failure, which goes on whatever becomes of the hook."""
    try:
        await _settle(hook())
    except Exception as worse:  # noqa: BLE001 - noted; the failure itself must go on
        failure.add_note(f"then {what} failed: {worse}")


async def _settle(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value


def _result(value: Any, ctx: Context) -> Context:
    match value:
        case None:
            return ctx
        case Context():
            return value
        case Mapping():
            return ctx.put(**value)
        case _:
            raise WorkflowError(
                f"stage {ctx.where!r} returned a {type(value).__name__}; expected a context, values of state, or None"
            )


def _entered(ctx: Context, name: str, index: int, item: Any) -> Context:
    placed = replace(ctx, path=(*ctx.path, Place(name=name, index=index)))
    return placed.put(**{f"{name}_current": item, f"{name}_index": index})


def _left(ctx: Context, outer: Context, name: str) -> Context:
    """The loop's own two values are what they were before it."""
    keys = (f"{name}_current", f"{name}_index")
    return ctx.drop_state(*keys).put(**{key: outer.state[key] for key in keys if key in outer.state})


def _merged(before: Context, branches: Sequence[Context], name: str) -> Context:
    """Raises `WorkflowError` if two branches put different values under one key."""
    changed: dict[str, Any] = {}
    metrics: MetricLog = before.metrics
    for branch in branches:
        for key, value in branch.state.items():
            if key in before.state and before.state[key] is value:
                continue
            if key in changed and changed[key] is not value:
                raise WorkflowError(f"two branches of parallel {name!r} put different values under {key!r}")
            changed[key] = value
        for metric in branch.metrics.since(before.metrics):
            metrics = metrics.add(metric)
    return replace(before.put(**changed), metrics=metrics)


def _loop_paths(node: Node, prefix: Sequence[str]) -> Iterator[str]:
    """Paths of all loops in a node, as cursors name them."""
    match node:
        case LoopNode() | AsyncLoopNode():
            prefix = [*prefix, node.name]
            yield "/".join(prefix)
        case ParallelNode() | SubWorkflowNode():
            prefix = [*prefix, node.name]
    for _, inner in children(node):
        for child in inner:
            yield from _loop_paths(child, prefix)


async def _items(source: Any, prefetch: int) -> AsyncGenerator[Any, None]:
    """The items of an iterable of either kind; with `prefetch`, a task fetches so many ahead."""
    if not isinstance(source, Iterable) and not hasattr(source, "__aiter__"):
        raise ConfigError(f"over must give something to iterate, not {source!r}")
    if not prefetch:
        if hasattr(source, "__aiter__"):
            async for item in source:
                yield item
        else:
            for item in source:
                yield item
        return
    buffer: asyncio.Queue[Any] = asyncio.Queue(prefetch)
    fetcher = asyncio.create_task(_fetch(source, buffer))
    try:
        while (item := await _next_of(buffer, fetcher)) is not _END:
            yield item
    finally:
        fetcher.cancel()
        await asyncio.gather(fetcher, return_exceptions=True)


async def _fetch(source: Any, buffer: asyncio.Queue[Any]) -> None:
    if hasattr(source, "__aiter__"):
        async for item in source:
            await buffer.put(item)
    else:
        iterator = iter(source)
        while (item := await asyncio.to_thread(next, iterator, _END)) is not _END:
            await buffer.put(item)
    await buffer.put(_END)


async def _next_of(buffer: asyncio.Queue[T], maker: asyncio.Task[None]) -> T:
    """The next item. Raises what its maker failed with, once the items before are taken."""
    if not buffer.empty():
        return buffer.get_nowait()
    getter = asyncio.create_task(buffer.get())
    try:
        await asyncio.wait({getter, maker}, return_when=asyncio.FIRST_COMPLETED)
        if not getter.done():
            maker.result()
        return await getter
    finally:
        getter.cancel()
