"""Embedded mode: the whole server in this process, reached through a transport instead of a port.

`local:` serves `tinsmith/tiny`. Options go into the query:
`local:?base_model=NAME%3DFOLDER&base_model=…&data_dir=…&dtype=float32&device=cpu`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import httpx2
from pydantic import ValidationError

from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import InvalidInput

if TYPE_CHECKING:
    from fastapi import FastAPI

_OPTIONS = ("base_model", "data_dir", "dtype", "device", "threads")


async def open_local(url: str) -> tuple[httpx2.AsyncBaseTransport, Callable[[], Awaitable[None]]]:
    """Start the server that `url` describes on the running event loop; a transport to it, and what ends it.

    The transport serves requests of that loop only; the engine computes in a thread of its own. Every call starts
    another server, and two may not share a data folder: whoever wants to share one shares the transport.
    Raises `UserError` if the URL has an unknown option or a base model cannot be loaded.
    """
    app = await asyncio.to_thread(build_app, url)
    running = AsyncExitStack()
    await running.enter_async_context(app.router.lifespan_context(app))
    return httpx2.ASGITransport(app), running.aclose


def build_app(url: str) -> FastAPI:
    """The server that `url` describes, not started. Raises `InvalidInput` for an option that is not known."""
    from tinsmith.server import create_app
    from tinsmith.server.assemble import default_data_dir, open_control
    from tinsmith.server.errors import explain

    options = parse_local_url(url)
    sources = [ModelSource.parse(text) for text in options.pop("base_model", ["tinsmith/tiny"])]
    folder = options.pop("data_dir", None)
    data_dir = Path(folder[0]).expanduser() if folder else default_data_dir() / "local"
    try:
        engine_options = EngineOptions.model_validate({name: values[0] for name, values in options.items()})
    except ValidationError as error:
        raise InvalidInput(f"{url!r}: {explain(error)}") from error
    return create_app(open_control(sources, engine_options, data_dir, home="thread"))


def parse_local_url(url: str) -> dict[str, list[str]]:
    """Option names to values. Raises `InvalidInput` if `url` is of another form or an option is unknown or repeated."""
    scheme, _, rest = url.partition(":")
    place, _, query = rest.partition("?")
    if scheme != "local" or place.strip("/"):
        raise InvalidInput(f"{url!r} is no embedded server; expected local: or local:?base_model=…&data_dir=…")
    options = parse_qs(query, keep_blank_values=True)
    for name, values in options.items():
        if name not in _OPTIONS:
            raise InvalidInput(f"unknown option {name!r} in {url!r}; known are {', '.join(_OPTIONS)}")
        if len(values) > 1 and name != "base_model":
            raise InvalidInput(f"option {name!r} comes {len(values)} times in {url!r}")
        if not all(values):
            raise InvalidInput(f"option {name!r} in {url!r} has no value")
    return options
