"""The control plane in one thread and in its own time: nothing is left to chance but a seed.

The loop jumps to the next timer when there is nothing to do. What threads do elsewhere happens at once; a commit of
the ledger takes a drawn time, and is lost if the server is killed before its end.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import sqlalchemy as sa

from tinsmith.control.ledger import Change, Ledger, OnWritten
from tinsmith.control.registry import Registry, _Job

ResultT = TypeVar("ResultT")
START_S = 1_800_000_000.0
ANSWER_S = 30.0
"""Longer than any poll."""


class _NoWaiting(selectors.SelectSelector):
    """Instead of waiting, time goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everybody waits, and nothing will ever happen")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.timer = _NoWaiting()
        super().__init__(self.timer)

    def time(self) -> float:
        return self.timer.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """At once: a thread's time would not be of this world."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            done.set_exception(error)
        return done


class VirtualClock:
    def time(self) -> float:
        return START_S + self.monotonic()

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


class SimulatedRegistry(Registry):
    """Every write is done when it is asked for."""

    def _enqueue(self, work: Callable[[sa.Connection], ResultT]) -> Future[ResultT]:
        job = _Job(work)
        if self._closed:
            return super()._enqueue(work)
        self._commit([job])
        return job.done


class SimulatedLedger(Ledger):
    """Commits one after another, each in its time; the one that a kill meets is there as a whole or not at all."""

    chance = random.Random(0)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._is_open = loop, True
        self._connection = self._connect()
        self._waiting: list[tuple[Sequence[Change], OnWritten]] = []
        self._is_committing = False

    def post(self, changes: Sequence[Change], on_written: OnWritten) -> None:
        if not self._is_open:
            super().post(changes, on_written)
            return
        self._waiting.append((changes, on_written))
        self._begin()

    def _begin(self) -> None:
        if self._is_committing or not self._waiting or self._loop is None:
            return
        self._is_committing = True
        group, self._waiting = self._waiting, []
        self._loop.call_later(self.chance.expovariate(1 / 0.004), self._end, group)

    def _end(self, group: list[tuple[Sequence[Change], OnWritten]]) -> None:
        if not self._is_open:
            return
        self._do(group)
        self._is_committing = False
        for _, on_written in group:
            on_written(None)
        self._begin()

    def _do(self, group: list[tuple[Sequence[Change], OnWritten]]) -> None:
        self._connection.execute("BEGIN")
        for changes, _ in group:
            for change in changes:
                change(self._connection)
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """As by a kill: what has been told is there, and what waits may be or not."""
        if self._is_open:
            self._is_open = False
            if self._waiting and self.chance.random() < 0.5:
                self._do(self._waiting)
            self._connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = super()._connect()
        connection.execute("PRAGMA synchronous=OFF")  # no disk is tried here
        return connection


def run_virtually(main: Callable[[], Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


class Unreachable(Exception):
    """The server is down, or the message or its answer was lost."""


class Wire:
    """Between clients and whichever server is there; messages take their time, and some are lost on either way."""

    def __init__(self, chance: random.Random, loss: float) -> None:
        self._chance = chance
        self._loss = loss
        self.server: Any = None

    async def carry(self, ask: Callable[[Any], Any]) -> Any:
        """What `ask` answers for the server that is there. Raises `Unreachable`."""
        await asyncio.sleep(self._chance.expovariate(1 / 0.02))
        if self.server is None or self._chance.random() < self._loss:
            raise Unreachable
        server = self.server
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await ask(server)
        except TimeoutError as error:
            assert self.server is not server, "a server that lives answers"
            raise Unreachable from error  # what waits in a killed server waits for ever
        await asyncio.sleep(self._chance.expovariate(1 / 0.02))
        if self.server is not server or self._chance.random() < self._loss:
            raise Unreachable
        return answer

    async def insist(self, ask: Callable[[Any], Any]) -> Any:
        """Until it is answered, as clients do."""
        while True:
            try:
                return await self.carry(ask)
            except Unreachable:
                await asyncio.sleep(self._chance.uniform(0.05, 0.5))
