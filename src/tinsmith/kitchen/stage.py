"""A stage: one unit of work, with hooks around it.

Life of a stage: `validate` (before anything of the workflow runs) → `before` → `execute` → `after`; on an exception
`on_error`; `cleanup` on every path. If a later stage fails, `rollback` is called, last completed stage first.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from tinsmith.kitchen.context import Context

StageResult: TypeAlias = "Context | Mapping[str, Any] | None"
"""A context; or values to put into the state; or nothing to change."""
StageFunction: TypeAlias = Callable[[Context], "StageResult | Awaitable[StageResult]"]
OnResume: TypeAlias = Literal["auto", "run", "skip"]


class Stage:
    """Subclass it and write `execute`; any hook may be `async`."""

    name: ClassVar[str] = ""
    """Its default name in a workflow."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Ports that must have an adapter."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names that `stage(…, name=value)` may set, read as `ctx.stage_opts.name`."""
    commits: ClassVar[bool] = False
    """Whether it stores a checkpoint that a run can go on from: it must then be the last of its loop's body."""
    on_resume: ClassVar[OnResume] = "auto"
    """Whether it runs again when a run goes on after it. `auto`: outside loops yes, inside no."""

    def validate(self, ctx: Context) -> None:
        """Raises `KitchenError` if config and adapters do not allow this stage. The state is still empty."""

    def before(self, ctx: Context) -> Any:
        """May return a changed context for `execute`."""

    def execute(self, ctx: Context) -> Any:
        """Returns a `StageResult`, or an awaitable of one."""
        raise NotImplementedError(f"{type(self).__name__} has no execute")

    def after(self, ctx: Context) -> Any:
        """Given the context that `execute` made; may return another."""

    def on_error(self, ctx: Context, error: Exception) -> Any:
        """Told before the error of any hook, or of a timeout, goes on; given the context that `before` was given."""

    def rollback(self, ctx: Context) -> Any:
        """Undo, given the context this stage returned, because a later stage failed."""

    def cleanup(self, ctx: Context) -> Any:
        """Give back what `before` and `execute` took, whatever became of them."""

    # -- for those who like them as methods of the stage --------------------------------------------------------------

    @staticmethod
    def get_adapter(ctx: Context, port: str) -> Any:
        return ctx.get_adapter(port)

    @staticmethod
    def get_state(ctx: Context, key: str, *default: Any) -> Any:
        return ctx.get_state(key, *default)

    @staticmethod
    def put_state(ctx: Context, key: str, value: Any) -> Context:
        return ctx.put_state(key, value)


class FunctionStage(Stage):
    """A plain function of a context as a stage."""

    def __init__(self, function: StageFunction) -> None:
        self._function = function

    def execute(self, ctx: Context) -> Any:
        return self._function(ctx)


def is_stage_class(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Stage)


def has_rollback(stage: Stage) -> bool:
    return type(stage).rollback is not Stage.rollback
