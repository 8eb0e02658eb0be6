"""Embedded mode: the whole server in this process, reached through a transport instead of a port.

`local:` serves `tinsmith/tiny`. Options go into the query:
`local:?base_model=NAME%3DFOLDER&base_model=…&data_dir=…&dtype=float32&device=cpu`.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs

import httpx2

from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import InvalidInput

if TYPE_CHECKING:
    from fastapi import FastAPI

T = TypeVar("T")

_OPTIONS = ("base_model", "data_dir", "dtype", "device", "threads")
_CLOSE_TIMEOUT_S = 10.0

_stacks: dict[str, _Stack] = {}
_stacks_lock = threading.Lock()


async def open_local(url: str) -> httpx2.AsyncBaseTransport:
    """A transport to the embedded server named by `url`, which starts with the first and ends with the last of them.

    Usable from the event loop of the caller; all transports with one `url` in this process share one server.
    Raises `UserError` if the URL has an unknown option or the base model cannot be loaded.
    """
    with _stacks_lock:
        stack = _stacks.get(url)
        if stack is None:
            stack = _stacks[url] = _Stack(url)
        stack.num_users += 1
    try:
        await asyncio.shield(asyncio.wrap_future(stack.started))
    except BaseException:
        await _release(stack)
        raise
    return _LocalTransport(stack)


async def _release(stack: _Stack) -> None:
    with _stacks_lock:
        stack.num_users -= 1
        if stack.num_users or _stacks.get(stack.url) is not stack:
            return
        del _stacks[stack.url]
    await asyncio.wrap_future(stack.stop())


class _LocalTransport(httpx2.AsyncBaseTransport):
    def __init__(self, stack: _Stack) -> None:
        self._stack = stack
        self._closed = False

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        inner = httpx2.Request(request.method, request.url, headers=request.headers.raw, content=body)
        return await asyncio.wrap_future(self._stack.submit(self._stack.exchange(inner)))

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await _release(self._stack)


class _Stack:
    """One server in a thread with an event loop of its own, so that clients on any loop share it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.num_users = 0
        self.started: Future[None] = Future()
        self._transport: httpx2.ASGITransport | None = None
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, name="tinsmith-local", daemon=True)
        self._thread.start()
        atexit.register(self._stop_at_exit)

    async def exchange(self, request: httpx2.Request) -> httpx2.Response:
        if self._transport is None:
            raise httpx2.ConnectError(f"the embedded server {self.url!r} is closed", request=request)
        response = await self._transport.handle_async_request(request)
        await response.aread()
        return httpx2.Response(response.status_code, headers=response.headers, content=response.content)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:
            work.close()
            raise httpx2.ConnectError(f"the embedded server {self.url!r} is closed") from error

    def stop(self) -> Future[None]:
        """Ask the server to end; the result comes when it has."""
        atexit.unregister(self._stop_at_exit)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ending.set)
        return self._ended

    def _stop_at_exit(self) -> None:
        self.stop()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - the boundary of the thread: whoever waits is told
            self.started.set_exception(error)
        finally:
            self._ended.set_result(None)

    async def _serve(self) -> None:
        app = build_app(self.url)
        async with app.router.lifespan_context(app):
            self._transport = httpx2.ASGITransport(app)
            self.started.set_result(None)
            await self._ending.wait()
            self._transport = None


def build_app(url: str) -> FastAPI:
    """The server that `url` describes, not started. Raises `InvalidInput` for an option that is not known."""
    from tinsmith.server import create_app
    from tinsmith.server.assemble import default_data_dir, open_control

    options = parse_local_url(url)
    sources = [ModelSource.parse(text) for text in options.pop("base_model", ["tinsmith/tiny"])]
    folder = options.pop("data_dir", None)
    data_dir = Path(folder[0]).expanduser() if folder else default_data_dir() / "local"
    engine_options = EngineOptions.model_validate({name: values[0] for name, values in options.items()})
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
