"""Who does what a recipe says: dialects teach their kinds before the server starts, and they work after a crash too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from tinsmith.control.requests import Recipe
from tinsmith.types.errors import Unsupported

Make: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[Any]]
"""The details of a recipe to what comes of it. Done twice, it must come to the same."""


class Recipes:
    def __init__(self) -> None:
        self._makers: dict[str, Make] = {}

    def teach(self, kind: str, make: Make) -> None:
        self._makers[kind] = make

    async def make(self, recipe: Recipe) -> Any:
        """Raises what the making raises; `Unsupported` for a kind that no dialect of this server has taught."""
        make = self._makers.get(recipe.kind)
        if make is None:
            raise Unsupported(f"this server does not do {recipe.kind!r}; it was taken by one with other dialects")
        return await make(recipe.details)
