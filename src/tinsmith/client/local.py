"""`local:` URLs: the server embedded in this process, reached without a port.

The embedded server runs on an event loop of its own, so that its work never delays a client's heartbeats or polls.
One stack per URL is shared by all clients of the process and closed with the last of them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2

from tinsmith.client.errors import ClientClosedError, ConfigurationError
from tinsmith.client.loop import LoopThread, wait_for_outcome
from tinsmith.types.errors import TinsmithError

_EMBEDDED = "tinsmith.embedded"
"""Looked up by name when first used: the client knows no server."""

_lock = threading.Lock()
_stacks: dict[str, LocalStack] = {}
_closing: list[concurrent.futures.Future[None]] = []
"""Servers that still hold their data folders: whoever opens one waits for these, which may have held the same."""


def _forget_parents() -> None:
    """A forked child has none of its parent's threads: what they served, opened, closed or locked stays so for ever."""
    global _lock
    _lock = threading.Lock()
    _stacks.clear()
    _closing.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forget_parents)


class LocalStack:
    """An embedded server and the thread it runs on."""

    def __init__(self, url: str, after: Sequence[concurrent.futures.Future[None]]) -> None:
        self.url = url
        self.users = 0
        self._after = after
        self._loop = LoopThread(f"tinsmith-embedded-{url}")
        self._close: Callable[[], Awaitable[None]] | None = None
        self._opened: concurrent.futures.Future[httpx2.AsyncBaseTransport] = self._loop.run(self._open())

    async def _open(self) -> httpx2.AsyncBaseTransport:
        """Raises `ConfigurationError`, saying why the server could not start."""
        for closing in self._after:
            with contextlib.suppress(Exception):  # whoever closed it hears of that
                await wait_for_outcome(closing)
        try:
            module = await asyncio.to_thread(importlib.import_module, _EMBEDDED)
            transport, self._close = await module.open_local(self.url)
        except (TinsmithError, ImportError) as error:
            hint = "; pip install 'tinsmith[server]'" if isinstance(error, ImportError) else ""
            raise ConfigurationError(f"the embedded server {self.url!r} cannot start: {error}{hint}") from error
        opened: httpx2.AsyncBaseTransport = transport
        return opened

    @property
    def has_failed(self) -> bool:
        return self._opened.done() and self._opened.exception() is not None

    async def ready(self) -> None:
        """Wait until the server runs, however long its model takes to load; raises what kept it from starting."""
        await wait_for_outcome(self._opened)

    async def exchange(self, request: httpx2.Request) -> httpx2.Response:
        """Serve one request. Called on a client's loop; cancelling it cancels the server's work on it."""
        transport = await wait_for_outcome(self._opened)
        content = await request.aread()
        outcome = self._loop.run(_serve(transport, request, content))
        try:
            return await wait_for_outcome(outcome)
        except asyncio.CancelledError:
            self._loop.cancel(outcome)
            raise

    def close(self) -> concurrent.futures.Future[None]:
        closed = self._loop.run(self._shut_down())
        closed.add_done_callback(lambda _: self._loop.stop())
        return closed

    async def _shut_down(self) -> None:
        """Of a server that is still starting, once it has: an engine that loads its model cannot be stopped."""
        with contextlib.suppress(Exception):  # whoever waits for the server hears of that
            await wait_for_outcome(self._opened)
        if self._close is not None:
            await self._close()


async def _serve(transport: httpx2.AsyncBaseTransport, request: httpx2.Request, content: bytes) -> httpx2.Response:
    inner = httpx2.Request(
        request.method, request.url, headers=request.headers, content=content, extensions=request.extensions
    )
    response = await transport.handle_async_request(inner)
    raw = b"".join([part async for part in _parts(response)])
    await response.aclose()
    return httpx2.Response(
        response.status_code, headers=response.headers, stream=httpx2.ByteStream(raw), extensions=response.extensions
    )


async def _parts(response: httpx2.Response) -> Any:
    stream = response.stream
    assert isinstance(stream, httpx2.AsyncByteStream)
    async for part in stream:
        yield part


class LocalTransport(httpx2.AsyncBaseTransport):
    """One client's way into a stack. Closing the last one closes the stack."""

    def __init__(self, url: str) -> None:
        with _lock:
            stack = _stacks.get(url)
            if stack is None or stack.has_failed:
                _closing[:] = [one for one in _closing if not one.done()]
                stack = _stacks[url] = LocalStack(url, after=tuple(_closing))
            stack.users += 1
        self._stack: LocalStack | None = stack

    async def ready(self) -> None:
        await self._open_stack.ready()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return await self._open_stack.exchange(request)

    @property
    def _open_stack(self) -> LocalStack:
        if self._stack is None:
            raise ClientClosedError("the client was closed before this request was sent")
        return self._stack

    async def aclose(self) -> None:
        with _lock:
            stack, self._stack = self._stack, None
            if stack is None:
                return
            stack.users -= 1
            if stack.users:
                return
            if _stacks.get(stack.url) is stack:
                del _stacks[stack.url]
            closed = stack.close()
            _closing.append(closed)
        await wait_for_outcome(closed)
