"""What thread and process engines share: operations with tickets go one way, outcomes come back the other."""

from __future__ import annotations

import asyncio
import itertools
import queue
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tinsmith.runtime.handle import EngineCall
from tinsmith.runtime.loop import Message
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import EngineDied, TinsmithError
from tinsmith.types.operations import BaseModelCard, Operation


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


class RemoteEngine(ABC):
    """The side of an `EngineHandle` that does not depend on where the engine runs."""

    def __init__(self, source: ModelSource, options: EngineOptions) -> None:
        self._source = source
        self._options = options
        self._to_engine: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._calls = OpenCalls()
        self._card: BaseModelCard | None = None
        self._is_closed = False

    @property
    def card(self) -> BaseModelCard:
        if self._card is None:
            raise RuntimeError("the engine has not started")
        return self._card

    @property
    @abstractmethod
    def is_alive(self) -> bool: ...

    def submit(self, operation: Operation) -> EngineCall:
        (call,) = self.submit_all([operation])
        return call

    def submit_all(self, operations: Sequence[Operation]) -> list[EngineCall]:
        if not self.is_alive:
            raise EngineDied(f"the engine of {self._source.name!r} is not running")
        calls = [self._calls.open() for _ in operations]
        self._to_engine.put([(call.ticket, op) for call, op in zip(calls, operations, strict=True)])
        return calls

    def _deliver(self, finished: list[tuple[int, Any]]) -> None:
        for ticket, outcome in finished:
            self._calls.resolve(ticket, outcome)
