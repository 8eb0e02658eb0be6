"""`tinsmith plan`: what a recipe will do, without doing it."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe.")],
    mermaid: Annotated[bool, typer.Option("--mermaid", help="A Mermaid flow chart instead of a tree.")] = False,
) -> None:
    """Show the stages and loops of a recipe: `tinsmith plan supervised`."""
    from tinsmith.cli.run import find_recipe
    from tinsmith.kitchen.plan import describe
    from tinsmith.kitchen.plan import mermaid as chart

    found = find_recipe(recipe)
    typer.echo(chart(found.workflow) if mermaid else describe(found.workflow))
