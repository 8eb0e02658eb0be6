"""`tinsmith run`: carry out a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tinsmith.kitchen import Recipe, TrainingResult
    from tinsmith.kitchen.training_config import TrainingConfig


def run(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Name of a recipe; none lists them.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML, YAML or JSON file of keys; KEY=VALUE wins over it.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Short for model=…")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Short for data=…")] = None,
    epochs: Annotated[str | None, typer.Option("--epochs", "-e", help="Short for epochs=…")] = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", "-b", help="Short for batch_size=…")] = None,
    learning_rate: Annotated[
        str | None, typer.Option("--learning-rate", "-l", help="Short for learning_rate=…")
    ] = None,
    lora_rank: Annotated[str | None, typer.Option("--rank", "-r", help="Short for lora_rank=…")] = None,
    save_every: Annotated[str | None, typer.Option(help="Short for save_every=…")] = None,
    eval_every: Annotated[str | None, typer.Option(help="Short for eval_every=…")] = None,
    max_length: Annotated[str | None, typer.Option(help="Short for max_length=…")] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="KIND[:TARGET] of a tracker: tensorboard, wandb, mlflow, trackio.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check settings and data file, show the plan, train nothing.")
    ] = False,
    show_help: Annotated[bool, typer.Option("--help", "-h", help="Explain a recipe and its keys.")] = False,
) -> None:
    """Carry out a recipe: `tinsmith run supervised data=talk.jsonl epochs=3`."""
    from rich.console import Console

    console = Console()
    if recipe is None:
        _print_recipes(console)
        return
    found = find_recipe(recipe)
    if show_help:
        _print_keys(console, found)
        return
    short = {
        "model": model, "data": data, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
        "lora_rank": lora_rank, "save_every": save_every, "eval_every": eval_every, "max_length": max_length,
    }  # fmt: skip
    words = [*(f"{key}={value}" for key, value in short.items() if value is not None), *(settings or [])]
    made = _config(found, words, config)
    if dry_run:
        _dry_run(console, found, made)
        return
    _attach(track or [])
    _run(console, found, made)


def _attach(trackers: list[str]) -> None:
    from tinsmith.kitchen import attach_telemetry

    for word in trackers:
        kind, _, target = word.partition(":")
        attach_telemetry(kind, target=target)


def find_recipe(name: str) -> type[Recipe]:
    """Raises `ConfigError` for a name that no recipe has."""
    from tinsmith.kitchen import RECIPES
    from tinsmith.kitchen.errors import ConfigError, nearest

    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; the recipes are {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    return RECIPES[name]


def _config(recipe: type[Recipe], words: list[str], file: Path | None) -> Any:
    from tinsmith.kitchen.config import make_config

    assert recipe.config_type is not None, "recipes that ship have typed configs"
    made = make_config(recipe.config_type, words, file=file, defaults=recipe.all_defaults())
    recipe.validate_config(made)
    return made


def _dry_run(console: Console, recipe: type[Recipe], config: Any) -> None:
    from tinsmith.kitchen import run as run_workflow
    from tinsmith.kitchen.adapters import noop

    adapters = noop()
    del adapters["environment"]  # the one that the config names is meant
    planned = run_workflow(recipe, config, adapters=adapters, dry_run=True)
    _read_data(config)
    console.print(planned.plan, markup=False, highlight=False, soft_wrap=True)


def _read_data(config: Any) -> None:
    """Raises `DataError` for a data file that is missing or cannot be read; the one of feedback may be missing."""
    from tinsmith.kitchen.adapters.datasets import FileDatasets
    from tinsmith.kitchen.recipes import FeedbackConfig

    if hasattr(config, "data") and (config.data.exists() or not isinstance(config, FeedbackConfig)):
        FileDatasets().load_dataset(str(config.data))


def _run(console: Console, recipe: type[Recipe], config: TrainingConfig) -> None:
    from tinsmith.kitchen import NothingTrained, run_recipe
    from tinsmith.kitchen.adapters.tinker_training import open_backend
    from tinsmith.observe import ProgressLine

    try:
        result = run_recipe(
            recipe,
            config,
            lambda config, folder: open_backend(base_url=config.base_url, model=config.model, store=folder.store),
            observers=[ProgressLine(console)],
        )
    except NothingTrained as found:
        console.print(str(found), markup=False, highlight=False)
        return
    _print_result(console, result)


def _print_result(console: Console, result: TrainingResult) -> None:
    first, last = result.rows[0], result.rows[-1]
    lines = [
        f"loss {first.loss:.4f} → {last.loss:.4f} in {last.step} steps, {last.seconds:.1f} s, "
        f"{result.tokens / max(last.seconds, 1e-9):,.0f} tokens/s"
    ]
    lines += [f"{name} {first.metrics[name]:.4f} → {value:.4f}" for name, value in last.metrics.items()]
    if result.evaluations:
        lines += [
            f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.evaluations[-1].items() if name != "step"
        ]
    lines += [
        f"weights   {result.checkpoint.sampler_path}",
        f"state     {result.checkpoint.state_path}",
        f"metrics   {result.output / 'metrics.jsonl'}",
        f"plot      {result.output / 'loss.png'}",
        f"report    {result.output / 'report.html'}",
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


def _print_keys(console: Console, recipe: type[Recipe]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from tinsmith.kitchen.config import config_keys

    assert recipe.config_type is not None, "recipes that ship have typed configs"
    usage = f"Usage: tinsmith run {recipe.name} [KEY=VALUE]... [--config FILE]"
    console.print(f"{usage}\n\n{recipe.description}\n", markup=False, highlight=False)
    for key in config_keys(recipe.config_type, recipe.all_defaults()):
        default = " (required)" if key.default is None else f"={key.default}"
        console.print(Text.assemble("  ", (key.name, "bold"), default, (f"  {key.type}", "dim")), soft_wrap=True)
        console.print(Padding(Text(key.doc), (0, 0, 0, 6)))
