"""Embedded mode: the whole server in this process, reached through a transport instead of a port.

`local:` serves `tinsmith/tiny`. Options go into the query:
`local:?base_model=NAME%3DFOLDER&base_model=…&data_dir=…&dtype=float32&device=cpu`.
"""

from __future__ import annotations

import asyncio
import logging
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

_OPTIONS = ("base_model", "data_dir", "deterministic", "device", "dtype", "threads")
_MAX_DEFAULT_FOLDERS = 64

_log = logging.getLogger(__name__)


async def open_local(url: str) -> tuple[httpx2.AsyncBaseTransport, Callable[[], Awaitable[None]]]:
    """Start the server that `url` describes on the running event loop; a transport to it, and what ends it.

    The transport serves requests of that loop only; the engine computes in a thread of its own. Every call starts
    another server, and two may not share a data folder: whoever wants to share one shares the transport. If the default
    folder is taken, by a notebook next door say, the next free one of `local-2`, `local-3`, … is used, with a warning.
    Raises `UserError` if the URL has an unknown option, a base model cannot be loaded, or its data folder is in use.
    """
    from tinsmith.control.data_lock import DataDirInUse

    number = 1
    while True:
        try:
            opened = await _open(url, number)
        except DataDirInUse:
            if "data_dir" in parse_local_url(url) or number == _MAX_DEFAULT_FOLDERS:
                raise
            number += 1
            continue
        if number > 1:
            _log.warning("another program uses %s; checkpoints go to %s", _default_folder(1), _default_folder(number))
        return opened


async def _open(url: str, folder_number: int) -> tuple[httpx2.AsyncBaseTransport, Callable[[], Awaitable[None]]]:
    app = await asyncio.to_thread(build_app, url, folder_number)
    running = AsyncExitStack()
    await running.enter_async_context(app.router.lifespan_context(app))
    return httpx2.ASGITransport(app), running.aclose


def build_app(url: str, folder_number: int = 1) -> FastAPI:
    """The server that `url` describes, not started. Raises `InvalidInput` for an option that is not known.

    `folder_number` picks among the default data folders, if `url` names none.
    """
    from tinsmith.server import ServerSettings, create_app
    from tinsmith.server.assemble import open_control
    from tinsmith.server.errors import explain

    options = parse_local_url(url)
    sources = [ModelSource.parse(text) for text in options.pop("base_model", ["tinsmith/tiny"])]
    folder = options.pop("data_dir", None)
    data_dir = Path(folder[0]).expanduser() if folder else _default_folder(folder_number)
    try:
        engine_options = EngineOptions.model_validate({name: values[0] for name, values in options.items()})
    except ValidationError as error:
        raise InvalidInput(f"{url!r}: {explain(error)}") from error
    control = open_control(sources, engine_options, data_dir, home="thread")
    return create_app(control, ServerSettings(accounts=False))


def _default_folder(number: int) -> Path:
    from tinsmith.server.assemble import default_data_dir

    return default_data_dir() / ("local" if number == 1 else f"local-{number}")


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
