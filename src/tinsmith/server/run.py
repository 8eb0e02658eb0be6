"""Serve the application on a socket until a signal comes."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from tinsmith.server.errors import is_loopback
from tinsmith.server.service import Service
from tinsmith.types.errors import InvalidInput, StorageError

KEEP_ALIVE_S = 300
BACKLOG = 4096
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_S = 10


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0 takes a free one.

    Raises `InvalidInput` if the address is taken or is no loopback address.
    """
    if not is_loopback(host):
        raise InvalidInput(
            f"host {host!r} is reachable from other machines, and this version has no keys to protect it; "
            "use 127.0.0.1 and an SSH tunnel"
        )
    family, _, _, _, address = _resolve(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise InvalidInput(f"cannot listen on {host}:{port}: {error}; choose another --port") from error
    return listener


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, int, int, str, tuple[object, ...]]:
    try:
        found: tuple[socket.AddressFamily, int, int, str, tuple[object, ...]] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
    except (OSError, OverflowError) as error:
        raise InvalidInput(f"cannot listen on {host}:{port}: {error}") from error
    return found


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allow_many_connections() -> None:
    """Every waiting sample of a client holds a connection; raise the limit of open files as far as we may."""
    try:
        import resource
    except ImportError:  # no such limit on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


_SWITCH_S = 0.0005
"""How long a thread that decodes may keep the interpreter from the event loop: Python's 5 ms add up over many turns."""


def run_app(app: FastAPI, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """`serve_app` in an event loop of its own: uvloop's where there is one."""
    sys.setswitchinterval(_SWITCH_S)
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve_app(app, listener, on_ready=on_ready))


async def serve_app(app: FastAPI, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Start what is behind the app, listen, call `on_ready`, and serve until SIGINT or SIGTERM.

    Raises `UserError` if a base model cannot be loaded; nothing listened then. Raises `StorageError` once the disk
    under the ledger failed for good: a server that is started again goes on with what is on it.
    """
    control = app.state.service.control
    async with app.router.lifespan_context(app):
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
        server = _Server(config, app.state.service, on_ready)
        control.on_fatal = server.end
        await server.serve(sockets=[listener])
        if control.fatal_reason is not None:
            raise StorageError(control.fatal_reason)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready

    def end(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As the base class, but a signal that was obeyed is not raised again: control still has to be closed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
