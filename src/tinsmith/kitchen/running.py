"""`run`: a recipe or a workflow, a config, adapters — and what came of it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, TypeVar
from uuid import uuid4

from tinsmith.kitchen.config import RecipeConfig
from tinsmith.kitchen.context import Context, Metric, RunInfo, Settings, as_settings
from tinsmith.kitchen.errors import ConfigError, KitchenError, WorkflowError, nearest
from tinsmith.kitchen.plan import describe
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.run_folder import RunFolder, checkpoint_row, free_folder
from tinsmith.kitchen.run_log import last_checkpoint
from tinsmith.kitchen.runner import Runner
from tinsmith.kitchen.telemetry import Handler, Telemetry
from tinsmith.kitchen.training_config import TrainingConfig
from tinsmith.kitchen.validation import validate
from tinsmith.kitchen.workflow import Workflow
from tinsmith.observe import RunObserver

T = TypeVar("T")
Runnable: TypeAlias = "str | Workflow | type[Recipe]"
Status: TypeAlias = Literal["completed", "failed", "planned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    run_id: str
    status: Status
    context: Context
    """As the last stage left it; of a failed or planned run, as it was at the start."""
    duration_ms: float
    error: BaseException | None = None
    plan: str = ""
    """Of a dry run: the tree of its workflow."""

    @property
    def metrics(self) -> list[Metric]:
        """What stages recorded, in order."""
        return list(self.context.metrics)

    @property
    def artifacts(self) -> dict[str, Any]:
        """What stages left under `artifacts` in the state: folders, checkpoints, reports."""
        return dict(self.context.get_state("artifacts", {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that has been found sound and has not begun."""

    workflow: Workflow
    context: Context
    cursor: Mapping[str, int] = field(default_factory=dict)


def run(
    what: Runnable,
    config: Mapping[str, Any] | RecipeConfig | None = None,
    *,
    adapters: Mapping[str, Any] | None = None,
    resume_from: Mapping[str, Any] | None = None,
    telemetry: bool = True,
    handlers: Sequence[Handler] = (),
    observers: Sequence[RunObserver] = (),
    dry_run: bool = False,
    raises: bool = True,
) -> RunResult:
    """Carry out a recipe (by name or class) or a workflow. Everything that can be checked first is.

    `resume_from` is a record with the `cursor` of the iteration to go on after (and whatever the stages read from
    `ctx.metadata.resumed`); recipes that write run folders take `resume=true` and `output` in their config instead.
    `dry_run` checks, and returns the plan, without calling an adapter. With `raises=False` a failure is returned as
    `status="failed"` with its `error`. Inside a running event loop the work is done in a thread of its own.

    Raises `ConfigError`, `ValidationError`, `WorkflowError` (as a `StageError` where a stage failed).
    """
    began = time.monotonic()
    try:
        prepared = prepare(
            what, config, adapters=adapters, resume_from=resume_from, telemetry=telemetry, handlers=handlers,
            observers=observers,
        )  # fmt: skip
    except KitchenError as error:
        if raises:
            raise
        empty = Context(config=None, adapters={}, metadata=_info(None, None), telemetry=Telemetry(run_id=""))
        return RunResult(run_id="", status="failed", context=empty, duration_ms=_ms(began), error=error)
    ctx = prepared.context
    run_id = ctx.metadata.run_id
    if dry_run:
        plan = describe(prepared.workflow)
        return RunResult(run_id=run_id, status="planned", context=ctx, duration_ms=_ms(began), plan=plan)
    try:
        done = blocking(lambda: carry_out(prepared))
    except WorkflowError as error:
        if raises:
            raise
        return RunResult(run_id=run_id, status="failed", context=ctx, duration_ms=_ms(began), error=error)
    return RunResult(run_id=run_id, status="completed", context=done, duration_ms=_ms(began))


def prepare(
    what: Runnable,
    config: Mapping[str, Any] | RecipeConfig | None = None,
    *,
    adapters: Mapping[str, Any] | None = None,
    resume_from: Mapping[str, Any] | None = None,
    telemetry: bool = True,
    handlers: Sequence[Handler] = (),
    observers: Sequence[RunObserver] = (),
    folder: RunFolder | None = None,
) -> Prepared:
    """Find the workflow, complete the config, check all.

    A config with `output` and `resume` gets a folder, which must be fresh or hold the run to go on with.
    Raises `ConfigError`, `ValidationError`, `RunFolderError`.
    """
    adapters = dict(adapters or {})
    found = find(what)
    required: tuple[str, ...] = ()
    if isinstance(found, Workflow):
        workflow, made = found, config if isinstance(config, RecipeConfig) else as_settings(config)
    else:
        workflow, required = found.workflow, found.required_adapters
        made = found.make(_with_default_data(found, config, adapters))
    state: dict[str, Any] = {"observers": tuple(observers), "recipe": found.name}
    if isinstance(made, TrainingConfig):
        state["folder"] = folder = folder or folder_for(made, found.name)
        resume_from = resume_from or _where_to_go_on(made, folder)
    info = _info(made, resume_from)
    ctx = Context(
        config=made,
        adapters=adapters,
        state=Settings(state, what="state"),
        metadata=info,
        telemetry=Telemetry(run_id=info.run_id, enabled=telemetry, handlers=tuple(handlers)),
    )
    validate(workflow, ctx, required=required)
    return Prepared(workflow=workflow, context=ctx, cursor=(resume_from or {}).get("cursor", {}))


async def carry_out(prepared: Prepared) -> Context:
    """Run what was prepared, on the running event loop. Seeds Python's and numpy's global generators."""
    seed_everything(prepared.context.metadata.seed)
    return await Runner(cursor=prepared.cursor).run(prepared.workflow, prepared.context)


def find(what: Runnable) -> Workflow | type[Recipe]:
    """Raises `ConfigError` for a name that no recipe has."""
    from tinsmith.kitchen.recipes import RECIPES

    if not isinstance(what, str):
        return what
    if what not in RECIPES:
        raise ConfigError(f"unknown recipe {what!r}; the recipes are {', '.join(RECIPES)}{nearest(what, RECIPES)}")
    return RECIPES[what]


def seed_everything(seed: int) -> None:
    """Python's, numpy's and, if it is loaded, torch's generators: for stages that draw from them.

    What ships draws from `Context.rng` alone, which a resumed run repeats.
    """
    import sys

    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


def blocking(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end from any thread, one with a running event loop included."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    outcome: list[T | BaseException] = []

    def in_thread() -> None:
        try:
            outcome.append(asyncio.run(work()))
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asked
            outcome.append(error)

    thread = threading.Thread(target=in_thread, name="tinsmith-kitchen")
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def with_state(prepared: Prepared, **values: Any) -> Prepared:
    return replace(prepared, context=prepared.context.put(**values))


def _with_default_data(
    recipe: type[Recipe], config: Mapping[str, Any] | RecipeConfig | None, adapters: Mapping[str, Any]
) -> Mapping[str, Any] | RecipeConfig | None:
    """A dataset store may name the data to take where a config names none; noop's does."""
    default = getattr(adapters.get("dataset_store"), "default_data", None)
    kind = recipe.config_type
    if default is None or kind is None or "data" not in kind.model_fields or isinstance(config, RecipeConfig):
        return config
    return {"data": default, **(config or {})} if "data" not in recipe.all_defaults() else config


def _info(config: Any, resumed: Mapping[str, Any] | None) -> RunInfo:
    return RunInfo(
        run_id=uuid4().hex[:12],
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=int(getattr(config, "seed", 0) if not isinstance(config, Settings) else config.get("seed", 0)),
        resumed=resumed,
    )


def folder_for(config: TrainingConfig, name: str) -> RunFolder:
    return RunFolder(config.output or free_folder(name))


def _where_to_go_on(config: TrainingConfig, folder: RunFolder) -> dict[str, Any] | None:
    """Raises `RunFolderError` unless the folder is fresh, or holds the run to resume."""
    if not config.resume:
        folder.check_fresh()
        return None
    begin = last_checkpoint(config, folder)
    return None if begin is None else checkpoint_row(begin)


def _ms(began: float) -> float:
    return (time.monotonic() - began) * 1000
