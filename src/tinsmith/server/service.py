"""What every route needs: control, settings, codec threads, the desk of the chat dialects, the polls that are open."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Coroutine
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from starlette.requests import Request

from tinsmith.control.completions import Completion
from tinsmith.control.futures import Outcome, Pending
from tinsmith.control.inspection import Inspection
from tinsmith.control.service import Control
from tinsmith.observe.logs import note
from tinsmith.server.bodies import Codecs
from tinsmith.server.chat.desk import ChatDesk
from tinsmith.server.chat.recorder import Recorder
from tinsmith.server.hub.repositories import Repositories
from tinsmith.server.settings import ServerSettings

T = TypeVar("T")


_CLIENTS_PER_START = 10_000
"""A server that is started again gives out numbers that no earlier one gave."""


class Service:
    def __init__(self, control: Control, settings: ServerSettings) -> None:
        self.control = control
        self.settings = settings
        self.codecs = Codecs(threads=settings.codec_threads, offload_bytes=settings.offload_bytes)
        recorder = None if settings.record_folder is None else Recorder(settings.record_folder)
        self.chat = ChatDesk(control, self.codecs, recorder)
        self.repositories = Repositories()
        self._polls: set[asyncio.Task[Any]] = set()
        self._client_numbers = itertools.count(1)
        self._is_draining = False

    @property
    def num_open_polls(self) -> int:
        return len(self._polls)

    @property
    def is_draining(self) -> bool:
        """The server is about to end."""
        return self._is_draining

    def inspect(self) -> Inspection | None:
        """For figures; `None` unless the server runs."""
        seen = self.control.inspect()
        return None if seen is None else replace(seen, num_open_polls=self.num_open_polls)

    async def poll(self, request: Request, request_id: str, hold_s: float | None = None) -> Outcome | Pending:
        """The outcome, or `Pending` once the hold time is over, the client has left or the server drains.

        `hold_s` is the settings' unless given.

        The body of `request` must have been read. Raises `NotFound` or `FutureExpired`.
        """
        note(request_id=request_id)
        now = await self.control.wait_future(request_id, 0)
        if isinstance(now, Outcome):
            return now
        held_s = self.settings.poll_hold_s if hold_s is None else hold_s
        return await self._hold(request, self.control.wait_future(request_id, held_s), now)

    async def poll_completions(
        self, request: Request, sampler_id: str, client: int, cursor: int, hold_s: float
    ) -> tuple[list[Completion], int]:
        """What `Control.completions` says, held as in `poll`."""
        now = await self.control.completions(sampler_id, client, cursor, 0)
        if now[0] or hold_s <= 0:
            return now
        return await self._hold(request, self.control.completions(sampler_id, client, cursor, hold_s), now)

    async def _hold(self, request: Request, wait: Coroutine[Any, Any, T], now: T) -> T:
        """What `wait` comes to; `now` if the client leaves or the server drains before."""
        if self._is_draining:
            wait.close()
            return now
        waiter = asyncio.create_task(wait)
        departure = asyncio.create_task(_departure(request))
        self._polls.add(waiter)
        try:
            await asyncio.wait({waiter, departure}, return_when=asyncio.FIRST_COMPLETED)
            if waiter.done() and not waiter.cancelled():
                return waiter.result()
            return now
        finally:
            self._polls.discard(waiter)
            for task in (waiter, departure):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({waiter, departure})

    def next_client_number(self) -> int:
        """1, 2, … for clients that join a sampling session; the client that made it is 0."""
        return self.control.num_restarts * _CLIENTS_PER_START + next(self._client_numbers)

    def drain(self) -> None:
        """The server is about to end: answer every open poll with "still pending" and hold no more, end chats."""
        self._is_draining = True
        for waiter in self._polls:
            waiter.cancel()
        self.chat.drain()

    def close(self) -> None:
        self.drain()
        self.chat.close()
        self.codecs.close()


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(service_of)]
