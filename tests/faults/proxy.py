"""A bad network between a client and a server: requests and answers that get lost, streams that break off."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

Fault: TypeAlias = Literal["none", "drop request", "drop reply", "reset in body", "delay"]
_MAX_BYTES = 64 * 1024 * 1024
_DELAY_S = 0.2


@dataclass
class Network:
    """What a bad network does, from a seed: `rate` of all requests meet a fault of a kind drawn among `kinds`."""

    seed: int
    rate: float
    kinds: tuple[Fault, ...] = ("drop request", "drop reply", "reset in body", "delay")
    done: Counter[Fault] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self) -> Fault:
        fault: Fault = self._random.choice(self.kinds) if self._random.random() < self.rate else "none"
        self.done[fault] += 1
        return fault


class _Proxy:
    """One request per connection to the server; connections of clients are kept until a fault ends them."""

    def __init__(self, target: str, network: Network) -> None:
        where = urlsplit(target)
        self._host, self._port = where.hostname, where.port
        self._network = network

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await _head(reader):
                if not await self._exchange(head + await _body(head, reader), writer):
                    break
        except (OSError, EOFError):
            return  # the client or the server is gone: the other one learns it below
        finally:
            writer.transport.abort()

    async def _exchange(self, request: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the client's connection lives on."""
        fault = self._network.draw()
        if fault == "drop request":
            return False
        if fault == "delay":
            await asyncio.sleep(_DELAY_S)
        answer = await self._ask(request)
        if fault == "drop reply":
            return False
        if fault == "reset in body":
            writer.write(answer[: max(1, len(answer) - 10)])
            await writer.drain()
            return False
        writer.write(answer)
        await writer.drain()
        return True

    async def _ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_MAX_BYTES)
        try:
            writer.write(request)
            head = await _head(reader)
            if not head:
                raise EOFError
            return head + await _body(head, reader)
        finally:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Up to the empty line; nothing if the connection ends before."""
    with suppress(asyncio.IncompleteReadError):
        return await reader.readuntil(b"\r\n\r\n")
    return b""


async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if fields.get(b"transfer-encoding") == b"chunked":
        return await _chunks(reader)
    return await reader.readexactly(int(fields.get(b"content-length", b"0")))


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        chunk = await reader.readexactly(int(size, 16) + 2)
        body += size + chunk
        if chunk == b"\r\n":
            return body


@contextmanager
def bad_network(target: str, network: Network) -> Iterator[str]:
    """The address of a proxy before `target`, in a thread of its own."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    ports: list[int] = []
    ended = asyncio.Event()

    async def main() -> None:
        server = await asyncio.start_server(_Proxy(target, network).serve, "127.0.0.1", 0, limit=_MAX_BYTES)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await ended.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def run() -> None:
        with loop_closing(loop):
            loop.run_until_complete(main())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)


@contextmanager
def loop_closing(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.close()
