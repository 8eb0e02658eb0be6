"""Serve the application on a socket until a signal comes."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from tinsmith.control.service import Control
from tinsmith.server.errors import is_loopback
from tinsmith.server.service import ServerState
from tinsmith.server.stopping import AT_ONCE, FINISHING, FINISHING_UNKEPT, StopSignals, last_words
from tinsmith.types.errors import InvalidInput, StorageError

KEEP_ALIVE_S = 300
BACKLOG = 4096
_GRACE_S = 10


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0 takes a free one.

    Raises `InvalidInput` if the address is taken, or is none.
    """
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


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """A certificate, with what leads to its root, and its private key; both in PEM."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raises `InvalidInput` if they cannot be read, or do not fit together."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, _no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InvalidInput(
                f"--tls-certificate {str(self.certificate)!r} and --tls-key {str(self.key)!r} cannot be used: {error}"
            ) from error


def tls_of(certificate: Path | None, key: Path | None) -> Tls | None:
    """`None` without either. Raises `InvalidInput` for one without the other, or files that cannot be used."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InvalidInput("--tls-certificate and --tls-key belong together; give both or neither")
    tls = Tls(certificate=certificate, key=key)
    tls.check()
    return tls


def _no_password() -> str:
    raise ValueError("the private key needs a password; give one without")


def print_aside(text: str) -> None:
    """To stderr: stdout is for what the command was asked to print."""
    print(text, file=sys.stderr, flush=True)


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


def run_app(
    app: FastAPI,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None],
    say: Callable[[str], None] = print_aside,
    tls: Tls | None = None,
) -> None:
    """`serve_app` in an event loop of its own: uvloop's where there is one."""
    sys.setswitchinterval(_SWITCH_S)
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve_app(app, listener, on_ready=on_ready, say=say, tls=tls))


async def serve_app(
    app: FastAPI,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None],
    say: Callable[[str], None] = print_aside,
    tls: Tls | None = None,
) -> None:
    """Start what is behind the app, listen, call `on_ready`, and serve until SIGINT or SIGTERM; `say` tells of the end.

    The first signal lets finish what runs, for less than a minute; another one ends the engines at once. With a ledger
    nothing that was acknowledged is lost in either case.

    Raises `UserError` if a base model cannot be loaded; nothing listened then. Raises `StorageError` once the disk
    under the ledger failed for good: a server that is started again goes on with what is on it.
    """
    state: ServerState = app.state.service
    control = state.control
    if not (state.settings.keys_required or is_loopback(listener.getsockname()[0])):
        raise InvalidInput(f"{url_of(listener)} is reachable from other machines; it needs keys_required")
    with ExitStack() as until_closed:
        await _serve(app, listener, until_closed, on_ready, say, tls)
    if control.fatal_reason is not None:
        raise StorageError(control.fatal_reason)
    say(last_words(control.num_left))


async def _serve(
    app: FastAPI,
    listener: socket.socket,
    until_closed: ExitStack,
    on_ready: Callable[[], None],
    say: Callable[[str], None],
    tls: Tls | None,
) -> None:
    control: Control = app.state.service.control
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
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else tls.key,
        )
        server = _Server(config, app.state.service, on_ready)
        control.on_fatal = server.end

        def finish() -> None:
            say(FINISHING if control.keeps_requests else FINISHING_UNKEPT)
            server.end()

        def end() -> None:
            say(AT_ONCE)
            server.force_exit = True
            control.end_now()

        until_closed.enter_context(StopSignals(finish=finish, end=end).caught())
        await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: ServerState, on_ready: Callable[[], None]) -> None:
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
        """They are caught outside, until control is closed too."""
        yield
