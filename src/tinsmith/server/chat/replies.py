"""Answers that depend on the caller still being there: awaited ones, and streams of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class CallerLeft(Exception):
    """The connection was closed; there is nobody to answer."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, cancelled when the caller leaves. The body of `request` must have been read.

    Raises `CallerLeft`, or what `work` raises.
    """
    task, departure = asyncio.ensure_future(work), asyncio.create_task(_departure(request.receive))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CallerLeft
        return task.result()
    finally:
        await _end(task, departure)


class EventStream(Response):
    """Server-sent events as they come; closes `events` when they end or the caller leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        self.status_code = 200
        self.background = None
        self.events = events
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        work, departure = asyncio.create_task(self._send(send)), asyncio.create_task(_departure(receive))
        try:
            await asyncio.wait({work, departure}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            await _end(work, departure)
            await close(self.events)

    async def _send(self, send: Send) -> None:
        async for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def with_first(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    """`rest` with `first` before it; closes `rest` when it is closed."""
    try:
        yield first
        async for item in rest:
            yield item
    finally:
        await close(rest)


async def close(events: AsyncIterator[Any]) -> None:
    if (aclose := getattr(events, "aclose", None)) is not None:
        await aclose()


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
