"""Bytes over the network: aiohttp's connections under httpx2's requests and answers.

aiohttp parses HTTP in C. An exchange costs a third of the CPU time of httpx2's own transport, which matters to a loop
that polls, and to thousands of samples under way.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from functools import cache
from typing import Final

import aiohttp
import httpx2
import yarl

_CHUNK_BYTES: Final = 256 * 1024
_MAX_HEADER_BYTES: Final = 64 * 1024
_OURS: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
"""Headers that aiohttp would add by itself."""


class NetworkTransport(httpx2.AsyncBaseTransport):
    """Keeps up to `max_connections` open, each for `keepalive_s` seconds after its last use.

    `trust_env` takes proxies from the environment. Everything runs on the event loop of the first exchange. Raises the
    `ConnectTimeout`, `ReadTimeout`, `ConnectError`, `ReadError`, `RemoteProtocolError` and `UnsupportedProtocol` of
    httpx2.
    """

    def __init__(self, *, max_connections: int, keepalive_s: float, trust_env: bool) -> None:
        self._max_connections = max_connections
        self._keepalive_s = keepalive_s
        self._trust_env = trust_env
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        limits = request.extensions.get("timeout", {})
        try:
            answer = await self._open_session().request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                headers=[(name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers.raw],
                data=body or None,
                allow_redirects=False,
                ssl=_ssl_context() if request.url.scheme == "https" else True,
                timeout=aiohttp.ClientTimeout(sock_connect=limits.get("connect"), sock_read=limits.get("read")),
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _translated(error, request) from error
        return httpx2.Response(
            answer.status,
            headers=list(answer.raw_headers),
            stream=_Body(answer, request),
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": (answer.reason or "").encode("latin-1")},
        )

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self._max_connections,
                    keepalive_timeout=self._keepalive_s,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=_OURS,
                auto_decompress=False,
                trust_env=self._trust_env,
                max_line_size=_MAX_HEADER_BYTES,
                max_field_size=_MAX_HEADER_BYTES,
                read_bufsize=_CHUNK_BYTES,
            )
        return self._session

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


@cache
def _ssl_context() -> ssl.SSLContext:
    """With the certificates that `SSL_CERT_FILE` names: a server on this machine may have one of its own, too."""
    return httpx2.create_ssl_context()


class _Body(httpx2.AsyncByteStream):
    def __init__(self, answer: aiohttp.ClientResponse, request: httpx2.Request) -> None:
        self._answer = answer
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for data in self._answer.content.iter_any():
                yield data
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _translated(error, self._request) from error

    async def aclose(self) -> None:
        self._answer.release() if self._answer.content.at_eof() else self._answer.close()


def _translated(error: Exception, request: httpx2.Request) -> httpx2.RequestError:
    """The error of httpx2 that says the same."""
    text = str(error) or type(error).__name__
    kind: type[httpx2.RequestError]
    match error:
        case aiohttp.ServerTimeoutError() if isinstance(error, aiohttp.ConnectionTimeoutError):
            kind = httpx2.ConnectTimeout
        case TimeoutError():
            kind = httpx2.ReadTimeout
        case aiohttp.NonHttpUrlClientError() | aiohttp.InvalidURL():
            kind = httpx2.UnsupportedProtocol
        case aiohttp.ClientConnectorError() | aiohttp.ClientProxyConnectionError():
            kind = httpx2.ConnectError
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | aiohttp.ClientResponseError():
            kind = httpx2.RemoteProtocolError
        case aiohttp.ClientOSError() | OSError():
            kind = httpx2.ReadError
        case _:
            kind = httpx2.TransportError
    return kind(text, request=request)
