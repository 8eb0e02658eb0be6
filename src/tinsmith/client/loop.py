"""The client's own event loop, in a thread of its own: what lets one async implementation serve every caller."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from tinsmith.client.errors import ClientClosedError

T = TypeVar("T")
logger = logging.getLogger("tinsmith.client")

_WIND_DOWN_S = 2.0


@dataclass(slots=True)
class _Job:
    work: Coroutine[Any, Any, Any]
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    """By `cancel`, not by the end of the loop."""

    def why_cancelled(self) -> BaseException:
        if self.cancelled:
            return concurrent.futures.CancelledError()
        return ClientClosedError("the client was closed before this request finished")


class LoopThread:
    """Runs coroutines on a daemon thread. Every outcome it hands out is settled, whatever happens, also by `stop`.

    An outcome cannot be cancelled through itself, so a waiter that gives up leaves the work running; `cancel` can.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._jobs: dict[concurrent.futures.Future[Any], _Job] = {}
        self._closed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def is_alive(self) -> bool:
        """False once stopped, and in a forked child, which inherits the object but not the thread."""
        return not self._closed and not self.is_forked

    @property
    def is_forked(self) -> bool:
        """In a child of the process that has the thread: nothing will ever be settled here."""
        return os.getpid() != self._pid

    def run(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start `work`; callable from any thread. A stopped loop gives a failed outcome, never an exception here."""
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        outcome.set_running_or_notify_cancel()
        if self.is_alive:  # also keeps a forked child off the lock, which a thread of its parent may have held
            with self._lock:
                if not self._closed:
                    self._jobs[outcome] = _Job(work)
                    self._loop.call_soon_threadsafe(self._start, outcome)
                    return outcome
        work.close()
        outcome.set_exception(ClientClosedError(self.why_not_alive))
        return outcome

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` on the loop, soon; dropped if the loop has stopped."""
        if self.is_alive:
            with self._lock:
                if not self._closed:
                    self._loop.call_soon_threadsafe(function)

    def cancel(self, outcome: concurrent.futures.Future[Any]) -> None:
        """Stop the work behind `outcome`, which then fails with `concurrent.futures.CancelledError`."""

        def cancel_task() -> None:
            job = self._jobs.get(outcome)
            if job is not None and job.task is not None:
                job.cancelled = True
                job.task.cancel()

        self.call(cancel_task)

    def stop(self) -> None:
        """Ask the loop to end; unfinished work is cancelled. Returns at once, callable from any thread."""
        self.call(self._loop.stop)

    def join(self, timeout: float) -> None:
        if not self.is_current and not self.is_forked:
            self._thread.join(timeout)

    @property
    def why_not_alive(self) -> str:
        if self.is_forked:
            return "this client was made before the process forked; make a new one in the child, or pickle the sampler"
        return "this client is closed"

    def _start(self, outcome: concurrent.futures.Future[Any]) -> None:
        job = self._jobs[outcome]
        job.task = self._loop.create_task(_settle(job, outcome))
        job.task.add_done_callback(lambda _: self._end(outcome))

    def _end(self, outcome: concurrent.futures.Future[Any]) -> None:
        """Settle what has not settled itself because it never took its first step."""
        job = self._jobs.pop(outcome)
        if not outcome.done():
            outcome.set_exception(job.why_cancelled())
        with contextlib.suppress(RuntimeError):  # work that refuses to end has had its chance
            job.work.close()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            with self._lock:
                self._closed = True
            self._wind_down()

    def _wind_down(self) -> None:
        """Let what was handed in still begin, then cancel everything, then settle what did not settle itself."""
        self._loop.run_until_complete(asyncio.sleep(0))
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=_WIND_DOWN_S))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        for outcome in list(self._jobs):
            self._end(outcome)


async def _settle(job: _Job, outcome: concurrent.futures.Future[Any]) -> None:
    """Run the work and put what comes of it into `outcome`; nothing escapes into the loop."""
    try:
        result = await job.work
    except asyncio.CancelledError:
        outcome.set_exception(job.why_cancelled())
    except BaseException as error:  # noqa: BLE001  the boundary: even SystemExit belongs to whoever waits
        outcome.set_exception(error)
    else:
        outcome.set_result(result)


async def wait_for_outcome(outcome: concurrent.futures.Future[T]) -> T:
    """Await an outcome from any event loop. Cancelling the waiter leaves the work alone."""
    if not outcome.done():
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def release() -> None:
            if not woken.done():
                woken.set_result(None)

        def wake(_: concurrent.futures.Future[T]) -> None:
            try:
                loop.call_soon_threadsafe(release)
            except RuntimeError:
                logger.debug("the event loop that awaited a result is gone")

        outcome.add_done_callback(wake)
        await woken
    return outcome.result()
