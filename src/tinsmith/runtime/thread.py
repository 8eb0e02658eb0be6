"""An engine in a thread of this process: for embedded mode, where nothing else competes for the interpreter."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import Any

from tinsmith.runtime.bridge import OpenCalls
from tinsmith.runtime.handle import EngineCall
from tinsmith.runtime.loop import STOP, run_engine
from tinsmith.runtime.threads import spin_briefly
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import EngineDied
from tinsmith.types.operations import BaseModelCard, Operation


class ThreadEngine:
    """`EngineHandle` over a daemon thread."""

    def __init__(self, source: ModelSource, options: EngineOptions) -> None:
        self._source = source
        self._options = options
        self._inbox: queue.SimpleQueue[tuple[int, Operation] | None] = queue.SimpleQueue()
        self._calls = OpenCalls()
        self._thread: threading.Thread | None = None
        self._card: BaseModelCard | None = None
        self._is_closed = False

    @property
    def card(self) -> BaseModelCard:
        if self._card is None:
            raise RuntimeError("the engine has not started")
        return self._card

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._is_closed

    async def start(self) -> BaseModelCard:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[BaseModelCard] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, started), name="tinsmith-engine", daemon=True)
        self._thread.start()
        self._card = await started
        return self._card

    def submit(self, operation: Operation) -> EngineCall:
        if not self.is_alive:
            raise EngineDied(f"the engine of {self._source.name!r} is not running")
        call = self._calls.open()
        self._inbox.put((call.ticket, operation))
        return call

    async def close(self) -> None:
        if self._thread is None or self._is_closed:
            return
        self._is_closed = True
        self._inbox.put(STOP)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._calls.fail_all("the engine was closed")

    def _run(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[BaseModelCard]) -> None:
        spin_briefly()
        try:
            from tinsmith.engine.engine import Engine

            engine = Engine(self._source, self._options)
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: whatever it was, `start` must raise it
            loop.call_soon_threadsafe(started.set_exception, error)
            return
        loop.call_soon_threadsafe(started.set_result, engine.card)

        def send(finished: list[tuple[int, Any]]) -> None:
            loop.call_soon_threadsafe(self._deliver, finished)

        try:
            run_engine(engine, self._inbox, send)
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: open calls must fail, not hang
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._calls.fail_all, f"the engine stopped: {error!r}")

    def _deliver(self, finished: list[tuple[int, Any]]) -> None:
        for ticket, outcome in finished:
            self._calls.resolve(ticket, outcome)
