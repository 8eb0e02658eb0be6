"""The network transport against servers that answer well, badly or not at all."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest

from tinsmith.client.transport import NetworkTransport

pytestmark = pytest.mark.anyio

Answer = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """Each connection's requests, head by head, are given to `answer`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                await answer(await reader.readuntil(b"\r\n\r\n"), reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def client(*, trust_env: bool = False) -> AsyncIterator[httpx2.AsyncClient]:
    transport = NetworkTransport(max_connections=4, keepalive_s=30, trust_env=trust_env)
    async with httpx2.AsyncClient(transport=transport, trust_env=False) as opened:
        yield opened


def reply(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + status, b"content-length: %d" % len(body), *headers, b"", body])


async def test_the_request_on_the_wire_is_the_one_that_was_built() -> None:
    heads: list[bytes] = []

    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(head + await reader.readexactly(4))
        writer.write(reply(b"ok"))

    async with serving(answer) as url, client() as http:
        response = await http.post(f"{url}/a%2Fb%20c?d=%3A", content=b"body", headers={"X-Key": "tml-x"})
        assert (response.status_code, response.content) == (200, b"ok")
    line, *headers = heads[0].split(b"\r\n")
    assert line == b"POST /a%2Fb%20c?d=%3A HTTP/1.1"
    assert heads[0].endswith(b"\r\n\r\nbody")
    names = [header.partition(b":")[0].lower() for header in headers if b":" in header]
    assert len(names) == len(set(names))
    assert b"X-Key: tml-x" in headers
    assert any(b"python-httpx" in header for header in headers)
    assert not any(b"aiohttp" in header for header in headers)


async def test_answers_keep_status_headers_and_encoded_bodies() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        packed = gzip.compress(b"packed")
        writer.write(reply(packed, b"content-encoding: gzip", b"X-A: 1", b"X-A: 2", status=b"418 Teapot"))

    async with serving(answer) as url, client() as http:
        response = await http.get(url)
        assert response.status_code == 418
        assert response.reason_phrase == "Teapot"
        assert response.headers.get_list("x-a") == ["1", "2"]
        assert response.content == b"packed"


async def test_redirects_are_left_to_the_caller() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        moved = head.startswith(b"GET /old")
        writer.write(reply(b"", b"location: /new", status=b"302 Found") if moved else reply(b"here"))

    async with serving(answer) as url, client() as http:
        assert (await http.get(f"{url}/old")).status_code == 302
        assert (await http.get(f"{url}/old", follow_redirects=True)).content == b"here"


async def test_connections_are_used_again_and_a_dead_one_costs_no_second_post() -> None:
    posts = 0

    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal posts
        await reader.readexactly(2)
        posts += 1
        if posts == 3:
            writer.close()
        else:
            writer.write(reply(b"%d" % writer.get_extra_info("peername")[1]))

    async with serving(answer) as url, client() as http:
        first = await http.post(url, content=b"ab")
        second = await http.post(url, content=b"ab")
        assert first.content == second.content
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post(url, content=b"ab")
        assert posts == 3
        assert (await http.post(url, content=b"ab")).content != first.content


async def test_a_server_that_is_not_there_is_a_connect_error() -> None:
    async with serving(lambda *_: asyncio.sleep(0)) as url:
        pass
    async with client() as http:
        with pytest.raises(httpx2.ConnectError, match=r"127\.0\.0\.1"):
            await http.get(url)


async def test_a_silent_server_is_a_read_timeout() -> None:
    async with serving(lambda *_: asyncio.sleep(30)) as url, client() as http:
        with pytest.raises(httpx2.ReadTimeout):
            await http.get(url, timeout=0.2)


async def test_a_body_that_breaks_off_is_a_protocol_error() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"0123456789")[:-4])
        await writer.drain()
        writer.close()

    async with serving(answer) as url, client() as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.get(url)


async def test_what_is_no_http_is_a_protocol_error() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-nothing\r\n\r\n")

    async with serving(answer) as url, client() as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.get(url)
        with pytest.raises(httpx2.UnsupportedProtocol):
            await http.get("ftp://127.0.0.1/")


async def test_a_stream_can_be_left_half_read() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"x" * 3_000_000))

    async with serving(answer) as url, client() as http:
        async with http.stream("GET", url) as response:
            assert len(await anext(response.aiter_bytes())) > 0
        async with http.stream("GET", url) as response:
            assert sum([len(part) async for part in response.aiter_bytes()]) == 3_000_000


async def test_more_than_the_connections_allowed_wait_their_turn() -> None:
    running = most = 0

    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        writer.write(reply(b"ok"))

    async with serving(answer) as url, client() as http:
        answers = await asyncio.gather(*(http.get(url, timeout=30) for _ in range(40)))
        assert all(answered.content == b"ok" for answered in answers)
    assert most <= 4


async def test_a_proxy_of_the_environment_is_used_if_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[bytes] = []

    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(head.splitlines()[0])
        writer.write(reply(b"by proxy"))

    async with serving(answer) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        async with client(trust_env=True) as http:
            assert (await http.get("http://models.invalid/x")).content == b"by proxy"
        async with client(trust_env=False) as http:
            with pytest.raises(httpx2.ConnectError):
                await http.get("http://models.invalid/x", timeout=20)
    assert lines == [b"GET http://models.invalid/x HTTP/1.1"]


def test_a_client_that_is_never_closed_says_so_once_and_nothing_else() -> None:
    script = (
        "import http.server, threading\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.send_header('content-length', '16'); self.end_headers()\n"
        '        self.wfile.write(b\'{"status": "ok"}\')\n'
        "    def log_message(self, *args): pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Handler)\n"
        "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "import asyncio, httpx2\n"
        "from tinsmith.client.transport import NetworkTransport\n"
        "client = httpx2.AsyncClient(transport=NetworkTransport(max_connections=1, keepalive_s=9, trust_env=False))\n"
        "print(asyncio.run(client.get(f'http://127.0.0.1:{server.server_port}')).status_code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "200\n"
    assert "Traceback" not in ended.stderr
