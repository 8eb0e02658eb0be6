"""What thread and process engines share: tickets on one side of a channel, answers on the other."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from tinsmith.runtime.handle import EngineCall
from tinsmith.types.errors import EngineDied, TinsmithError


class OpenCalls:
    """The calls that wait for an answer. Every method runs in the event loop that made it."""

    def __init__(self) -> None:
        self._tickets = itertools.count(1)
        self._futures: dict[int, asyncio.Future[Any]] = {}

    def open(self) -> EngineCall:
        call = EngineCall(next(self._tickets), asyncio.get_running_loop().create_future())
        self._futures[call.ticket] = call.answer
        return call

    def resolve(self, ticket: int, outcome: object) -> None:
        """Set the result, or the exception if it is a `TinsmithError`. Answers nobody waits for are dropped."""
        future = self._futures.pop(ticket, None)
        if future is None or future.done():
            return
        if isinstance(outcome, TinsmithError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def fail_all(self, reason: str) -> None:
        for ticket in list(self._futures):
            self.resolve(ticket, EngineDied(reason))
