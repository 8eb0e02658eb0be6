"""`Connection`: the handle that the clients of one server share, usable from any thread."""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tinsmith.client.config import ClientConfig
from tinsmith.client.errors import ClientClosedError
from tinsmith.client.futures import APIFuture, failed
from tinsmith.client.loop import LoopThread
from tinsmith.client.session import CloseStatus, JoinedSession, Link, SessionSpec

T = TypeVar("T")
logger = logging.getLogger("tinsmith.client")


class Connection:
    """Owns the event-loop thread, the HTTP connections and the session behind a `ServiceClient` or `RestClient`.

    The clients made from it keep it alive; so does every request under way. When the last of them is gone, or at exit,
    what was not closed is closed quietly.
    """

    def __init__(
        self, config: ClientConfig, *, spec: SessionSpec | None = None, joined: JoinedSession | None = None
    ) -> None:
        self.config = config
        self.spec = spec or SessionSpec()
        self.loop = LoopThread("tinsmith-client")
        self.link = Link(config, self.spec, joined)
        self.model_seq_ids = itertools.count()
        self.sampling_session_seq_ids = itertools.count()
        self._lock = threading.Lock()
        self._closing: APIFuture[None] | None = None
        self._farewell = _Farewell(self.loop, self.link)
        weakref.finalize(self, self._farewell.collected).atexit = False
        atexit.register(self._farewell.at_exit)
        if config.is_local:
            _leave_before_executors_stop(self._farewell)

    def __repr__(self) -> str:
        return f"<Connection to {self.config.base_url}>"

    def begin(self, prepare: Callable[[], Coroutine[Any, Any, T]], *, can_cancel: bool = False) -> APIFuture[T]:
        """Prepare an operation now, in the caller's thread, and run the rest of it on the loop.

        What `prepare` raises becomes the failure of the future.
        """
        if self._closing is not None or not self.loop.is_alive:
            return APIFuture(failed(ClientClosedError(self.loop.why_not_alive)), self.loop)
        try:
            work = prepare()
        except Exception as error:  # noqa: BLE001  the boundary: a future has every failure of its operation
            return APIFuture(failed(error), self.loop)
        return APIFuture(self.loop.run(work), self.loop, can_cancel=can_cancel)

    def close(self, status: CloseStatus, detail: str | None) -> APIFuture[None]:
        """Finish the session and stop the thread. The first call decides; later ones return the same future."""
        with self._lock:
            if self._closing is None:
                outcome = self.loop.run(_close(self.link, status, detail))
                self._farewell.closing()
                outcome.add_done_callback(self._closed)
                self._closing = APIFuture(outcome, self.loop)
            return self._closing

    def _closed(self, _: object) -> None:
        self.loop.stop()
        self._farewell.cancel()

    def join(self) -> None:
        """Wait, after `close`, for the thread to end."""
        self.loop.join(timeout=5.0)


async def _close(link: Link, status: CloseStatus, detail: str | None) -> None:
    try:
        await link.finish(status, detail)
    finally:
        await link.shut_down()


_EXIT_S = 10.0
"""How long the end of the program waits for a connection to close."""


class _Farewell:
    """What is done for a connection that nobody closed, or whose close nobody waited for.

    Holds its parts, never the connection itself. A program must not end under an engine at work in its own process:
    the interpreter takes such a thread away in the middle of a computation, and aborts.
    """

    def __init__(self, loop: LoopThread, link: Link) -> None:
        self._loop = loop
        self._link = link
        self._is_closing = False

    def closing(self) -> None:
        """Somebody closes it: the end of the program only waits for that."""
        self._is_closing = True

    def cancel(self) -> None:
        self._is_closing = True
        atexit.unregister(self.at_exit)

    def collected(self) -> None:
        if not self._is_closing:
            self.cancel()
            session_open = self._link.is_left_open
            self._start("success")
            if session_open:
                self._report("was never closed")

    def at_exit(self) -> None:
        if self._is_closing:
            self._loop.join(timeout=_EXIT_S)
            return
        self._is_closing = True
        crashed = getattr(sys, "last_value", None) is not None
        session_open = self._link.is_left_open
        self._start("errored" if crashed else "success")
        self._loop.join(timeout=_EXIT_S)
        if session_open:
            self._report("was still open at exit")

    def _report(self, what: str) -> None:
        """Python shows a ResourceWarning with `-X dev` or `-W default`, as for files that nobody closed."""
        text = f"a ServiceClient of {self._link.config.base_url} {what}: use `with ServiceClient(…)`, or call close()"
        logger.debug("%s", text)
        warnings.warn(text, ResourceWarning, stacklevel=3)

    def _start(self, status: CloseStatus) -> None:
        if self._loop.is_alive:
            outcome = self._loop.run(_leave_quietly(self._link, status))
            outcome.add_done_callback(lambda _: self._loop.stop())


async def _leave_quietly(link: Link, status: CloseStatus) -> None:
    await link.finish_quietly(status)
    await link.shut_down()


_embedded: weakref.WeakSet[_Farewell] = weakref.WeakSet()


def _leave_before_executors_stop(farewell: _Farewell) -> None:
    """Python ends its executors before it calls what `atexit` knows, and a server needs them to end in good order."""
    _hook_in()
    _embedded.add(farewell)


@functools.cache
def _hook_in() -> None:
    """The hook that executors use is the only one as early: https://github.com/python/cpython/issues/86813"""
    import concurrent.futures.thread  # noqa: F401  the last one in is called first

    register: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]
    register(_leave_embedded)


def _leave_embedded() -> None:
    for farewell in list(_embedded):
        farewell.at_exit()
