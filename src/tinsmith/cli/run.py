"""`tinsmith run`: carry out a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tinsmith.kitchen import Recipe, SupervisedResult


def run(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Name of a recipe; none lists them.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML, YAML or JSON file of keys; KEY=VALUE wins over it.")
    ] = None,
    show_help: Annotated[bool, typer.Option("--help", "-h", help="Explain a recipe and its keys.")] = False,
) -> None:
    """Carry out a recipe: `tinsmith run supervised data=talk.jsonl epochs=3`."""
    from rich.console import Console

    from tinsmith.kitchen import RECIPES
    from tinsmith.kitchen.errors import ConfigError

    console = Console()
    if recipe is None:
        _print_recipes(console)
        return
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {recipe!r}; the recipes are {', '.join(RECIPES)}")
    if show_help:
        _print_keys(console, RECIPES[recipe])
        return
    _run_supervised(console, settings or [], config)


def _run_supervised(console: Console, settings: list[str], file: Path | None) -> None:
    from tinsmith.kitchen import SupervisedConfig, run_supervised
    from tinsmith.kitchen.adapters.tinker import open_backend
    from tinsmith.kitchen.config import make_config
    from tinsmith.observe import ProgressLine

    config = make_config(SupervisedConfig, settings, file=file)
    result = run_supervised(
        config,
        lambda config, folder: open_backend(base_url=config.base_url, model=config.model, store=folder.store),
        observers=[ProgressLine(console)],
    )
    _print_result(console, result)


def _print_result(console: Console, result: SupervisedResult) -> None:
    lines = [
        f"loss {result.loss_first:.4f} → {result.loss_last:.4f} in {result.steps} steps, {result.seconds:.1f} s, "
        f"{result.tokens_per_s:,.0f} tokens/s"
    ]
    if result.test_loss is not None:
        lines.append(f"test loss {result.test_loss:.4f}")
    lines += [
        f"weights   {result.checkpoint.sampler_path}",
        f"state     {result.checkpoint.state_path}",
        f"metrics   {result.output / 'metrics.jsonl'}",
        f"plot      {result.output / 'loss.png'}",
        f'try it    tinsmith sample "Hello!" --model {result.output}',
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_recipes(console: Console) -> None:
    from rich.table import Table

    from tinsmith.kitchen import RECIPES

    table = Table("recipe", "what it does", box=None, pad_edge=False)
    for recipe in RECIPES.values():
        table.add_row(f"[bold]{recipe.name}[/bold]", recipe.description)
    console.print("Usage: tinsmith run RECIPE [KEY=VALUE]... [--config FILE]\n", markup=False, highlight=False)
    console.print(table)
    console.print("\nKeys of a recipe: tinsmith run RECIPE --help", highlight=False)


def _print_keys(console: Console, recipe: Recipe) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from tinsmith.kitchen.config import config_keys

    usage = f"Usage: tinsmith run {recipe.name} [KEY=VALUE]... [--config FILE]"
    console.print(f"{usage}\n\n{recipe.description}\n", markup=False, highlight=False)
    for key in config_keys(recipe.config_type):
        default = " (required)" if key.default is None else f"={key.default}"
        console.print(Text.assemble("  ", (key.name, "bold"), default, (f"  {key.type}", "dim")), soft_wrap=True)
        console.print(Padding(Text(key.doc), (0, 0, 0, 6)))
