"""An engine in a process of its own: what it does never delays the event loop, and its death is not ours."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from tinsmith.runtime.bridge import OpenCalls, RemoteEngine
from tinsmith.runtime.loop import Message
from tinsmith.runtime.threads import spin_briefly
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import ServerError, TinsmithError
from tinsmith.types.operations import BaseModelCard
from tinsmith.types.pulse import Pulse

_CLOSE_S = 10.0
"""How long a closing engine may finish its slice of work before it is killed."""


class ProcessEngine(RemoteEngine):
    """`EngineHandle` over a child process, spoken to through a socket pair."""

    def __init__(self, source: ModelSource, options: EngineOptions) -> None:
        super().__init__(source, options)
        self._child: subprocess.Popen[bytes] | None = None
        self._pulse: Pulse | None = None

    @property
    def is_alive(self) -> bool:
        return not self._is_closed and self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    @property
    def pulse(self) -> Pulse | None:
        return self._pulse

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def start(self) -> BaseModelCard:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[BaseModelCard] = loop.create_future()
        self._renew()
        self._pulse = None
        channel, outbox, calls = self._spawn(), self._to_engine, self._calls
        threading.Thread(target=self._write, args=(channel, outbox), name="tinsmith-to-engine", daemon=True).start()
        threading.Thread(
            target=self._read, args=(channel, outbox, calls, loop, started), name="tinsmith-from-engine", daemon=True
        ).start()
        self._card = await started
        return self._card

    async def close(self) -> None:
        if self._child is None or self._is_closed:
            return
        self._is_closed = True
        self._to_engine.put(None)
        child = self._child
        try:
            await asyncio.get_running_loop().run_in_executor(None, child.wait, _CLOSE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            await asyncio.get_running_loop().run_in_executor(None, child.wait)
        self._calls.fail_all("the engine was closed")

    def _spawn(self) -> Connection:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), self._source.model_dump_json(), self._options.model_dump_json()]
        environment = dict(os.environ)
        spin_briefly(environment)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tinsmith.runtime.worker", *arguments],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            # an interrupt at the terminal is for the server: it closes its engines in order
            start_new_session=True,
        )
        theirs.close()
        return Connection(ours.detach())

    def _write(self, channel: Connection, outbox: queue.SimpleQueue[Message]) -> None:
        try:
            while (message := outbox.get()) is not None:
                channel.send(message)
            channel.send(None)
        except (OSError, ValueError):
            return  # the child is gone; `_read` sees the end of the channel and fails every open call

    def _read(
        self,
        channel: Connection,
        outbox: queue.SimpleQueue[Message],
        calls: OpenCalls,
        loop: asyncio.AbstractEventLoop,
        started: asyncio.Future[BaseModelCard],
    ) -> None:
        reason = "it closed its channel"
        try:
            self._call(loop, _settle, started, channel.recv())
            while True:
                message = channel.recv()
                if isinstance(message, Pulse):
                    self._pulse = message
                else:
                    self._call(loop, calls.deliver, message)
        except (EOFError, OSError) as error:
            reason = f"{reason} ({error})" if str(error) else reason
        child = self._child
        code = child.wait() if child is not None else None
        if code is not None and code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
        elif code:
            reason = f"exit status {code}"
        message = f"the engine of {self._source.name!r} died: {reason}"
        self._call(loop, _settle, started, ServerError(message))
        self._call(loop, calls.fail_all, message)
        outbox.put(None)

    @staticmethod
    def _call(loop: asyncio.AbstractEventLoop, function: Any, *arguments: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(function, *arguments)


def _settle(started: asyncio.Future[BaseModelCard], outcome: BaseModelCard | TinsmithError) -> None:
    if started.done():
        return
    if isinstance(outcome, TinsmithError):
        started.set_exception(outcome)
    else:
        started.set_result(outcome)
