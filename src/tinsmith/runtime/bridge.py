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
from tinsmith.types.pulse import Pulse
from tinsmith.types.results import DrawnToken


class OpenCalls:
    """The calls that wait for an answer. Every method runs in the event loop that made it."""

    def __init__(self) -> None:
        self._tickets = itertools.count(1)
        self._calls: dict[int, EngineCall] = {}

    def open(self) -> EngineCall:
        call = EngineCall(next(self._tickets), asyncio.get_running_loop().create_future())
        self._calls[call.ticket] = call
        return call

    def resolve(self, ticket: int, outcome: object) -> None:
        """Set the result, or the exception if it is a `TinsmithError`. Answers nobody waits for are dropped.

        A `DrawnToken` is passed on and leaves the call open.
        """
        if isinstance(outcome, DrawnToken):
            call = self._calls.get(ticket)
            if call is not None and call.on_token is not None:
                call.on_token(outcome)
            return
        call = self._calls.pop(ticket, None)
        if call is None or call.answer.done():
            return
        if isinstance(outcome, TinsmithError):
            call.answer.set_exception(outcome)
        else:
            call.answer.set_result(outcome)

    def deliver(self, finished: list[tuple[int, Any]]) -> None:
        for ticket, outcome in finished:
            self.resolve(ticket, outcome)

    def fail_all(self, reason: str) -> None:
        for ticket in list(self._calls):
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

    @property
    @abstractmethod
    def pulse(self) -> Pulse | None: ...

    @abstractmethod
    def kill(self) -> None: ...

    def submit(self, operation: Operation) -> EngineCall:
        (call,) = self.submit_all([operation])
        return call

    def submit_all(self, operations: Sequence[Operation]) -> list[EngineCall]:
        if not self.is_alive:
            raise EngineDied(f"the engine of {self._source.name!r} is not running")
        calls = [self._calls.open() for _ in operations]
        self._to_engine.put([(call.ticket, op) for call, op in zip(calls, operations, strict=True)])
        return calls

    def _renew(self) -> None:
        """Begin with empty hands: what was asked of an engine before this one is not asked again."""
        self._to_engine = queue.SimpleQueue()
        self._calls = OpenCalls()
