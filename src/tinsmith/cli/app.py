"""The program `tinsmith`: its commands, found by name and imported when used, and one way to tell errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from tinsmith import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyCommand:
    module: str
    function: str
    context_settings: dict[str, Any] = field(default_factory=dict)

    def load(self, name: str) -> Any:
        home = typer.Typer(add_completion=False)
        function: Callable[..., None] | typer.Typer = getattr(import_module(self.module), self.function)
        if isinstance(function, typer.Typer):
            group = get_group(function)
            group.name = name
            return group
        home.command(name, context_settings=self.context_settings)(function)
        return get_command(home)


COMMANDS: Final[dict[str, LazyCommand]] = {
    "admin": LazyCommand(module="tinsmith.cli.admin", function="app"),
    "checkpoint": LazyCommand(module="tinsmith.cli.checkpoint", function="app"),
    "demo": LazyCommand(module="tinsmith.cli.demo", function="demo"),
    "doctor": LazyCommand(module="tinsmith.cli.doctor", function="doctor"),
    "plan": LazyCommand(module="tinsmith.cli.plan", function="plan"),
    "events": LazyCommand(module="tinsmith.cli.events", function="app"),
    "experiment": LazyCommand(module="tinsmith.cli.experiment", function="experiment"),
    "model": LazyCommand(module="tinsmith.cli.objects", function="models"),
    "run": LazyCommand(module="tinsmith.cli.run", function="run", context_settings={"help_option_names": []}),
    "runs": LazyCommand(module="tinsmith.cli.runs", function="runs"),
    "sample": LazyCommand(module="tinsmith.cli.sample", function="sample"),
    "sampler": LazyCommand(module="tinsmith.cli.objects", function="samplers"),
    "serve": LazyCommand(module="tinsmith.cli.serve", function="serve"),
    "session": LazyCommand(module="tinsmith.cli.objects", function="sessions"),
}


_RUNS: Final = LazyCommand(module="tinsmith.cli.objects", function="runs")


class TinsmithGroup(TyperGroup):
    """Commands by name, and the task boundary: no error leaves it as a traceback unless `--debug` is set."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`run list` and `run info` ask a server; `run RECIPE` trains."""
        if args[:1] == ["run"] and args[1:2] in (["list"], ["info"]):
            return "run", _RUNS.load("run"), args[1:]
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return COMMANDS[cmd_name].load(cmd_name) if cmd_name in COMMANDS else None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            _print_error("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if hasattr(error, "exit_code"):
                raise  # the command line itself is wrong; typer tells how
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            _print_error(_message(error))
            raise typer.Exit(_exit_code(error)) from error


app = typer.Typer(cls=TinsmithGroup, add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tinsmith {__version__}")
        raise typer.Exit


@app.callback()
def tinsmith(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train and sample language models on your own machine, through the Tinker API."""


def _exit_code(error: Exception) -> int:
    from tinsmith.kitchen.errors import ConfigError

    return 2 if isinstance(error, ConfigError) else 1


def _message(error: Exception) -> str:
    """What happened, in the words of whoever noticed it; a bug is named as one."""
    if _is_expected(error):
        body = getattr(error, "body", None)
        detail = body.get("detail") if isinstance(body, dict) else None
        advice = " (is a server running there? `tinsmith serve` starts one)" if _is_unreachable(error) else ""
        return f"{detail or str(error) or type(error).__name__}{advice}"
    return f"internal error, {type(error).__name__}: {error} (run `tinsmith --debug …` for the traceback)"


def _is_expected(error: Exception) -> bool:
    from tinsmith.types.errors import TinsmithError

    client_errors = sys.modules.get("tinsmith.client.errors")
    expected: tuple[type[BaseException], ...] = (TinsmithError, OSError)
    if client_errors is not None:
        expected += (client_errors.TinkerError,)
    return isinstance(error, expected)


def _is_unreachable(error: Exception) -> bool:
    client_errors = sys.modules.get("tinsmith.client.errors")
    return client_errors is not None and isinstance(error, client_errors.APIConnectionError)


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)
