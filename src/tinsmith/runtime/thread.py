"""An engine in a thread of this process: for embedded mode, where nothing else competes for the interpreter."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tinsmith.runtime.bridge import RemoteEngine
from tinsmith.runtime.loop import STOP, run_engine
from tinsmith.runtime.threads import spin_briefly
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.operations import BaseModelCard
from tinsmith.types.pulse import Pulse

if TYPE_CHECKING:
    from tinsmith.engine.engine import Engine


class ThreadEngine(RemoteEngine):
    """`EngineHandle` over a daemon thread."""

    def __init__(self, source: ModelSource, options: EngineOptions) -> None:
        super().__init__(source, options)
        self._thread: threading.Thread | None = None
        self._look: Callable[[], Pulse] | None = None

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._is_closed

    @property
    def pulse(self) -> Pulse | None:
        look = self._look
        return None if look is None else look()

    def kill(self) -> None:
        """A thread cannot be killed."""

    async def start(self) -> BaseModelCard:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[BaseModelCard] = loop.create_future()
        self._renew()
        self._thread = threading.Thread(target=self._run, args=(loop, started), name="tinsmith-engine", daemon=True)
        self._thread.start()
        self._card = await started
        return self._card

    async def close(self) -> None:
        if self._thread is None or self._is_closed:
            return
        self._is_closed = True
        self._to_engine.put(STOP)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._look = None
        self._calls.fail_all("the engine was closed")

    def _run(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[BaseModelCard]) -> None:
        spin_briefly()
        with ExitStack() as settings:
            try:
                from tinsmith.engine.engine import Engine
                from tinsmith.engine.process_settings import process_settings

                settings.enter_context(process_settings(self._options))
                engine = Engine(self._source, self._options)
            except BaseException as error:  # noqa: BLE001 - the thread's boundary: whatever it was, `start` must raise it
                loop.call_soon_threadsafe(started.set_exception, error)
                return
            self._look = engine.pulse
            loop.call_soon_threadsafe(started.set_result, engine.card)
            self._serve(engine, loop)

    def _serve(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        inbox, calls = self._to_engine, self._calls

        def send(finished: list[tuple[int, Any]]) -> None:
            loop.call_soon_threadsafe(calls.deliver, finished)

        try:
            run_engine(engine, inbox, send)
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: open calls must fail, not hang
            if not loop.is_closed():
                loop.call_soon_threadsafe(calls.fail_all, f"the engine stopped: {error!r}")
