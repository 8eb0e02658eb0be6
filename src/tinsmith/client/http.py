"""One HTTP exchange, and how it is tried again.

Each class of operation has its own connections, so that samples that fill theirs delay neither heartbeats nor polls.
Everything here runs on the client's own event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import platform
import random
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from tinsmith import __version__
from tinsmith.client.breaker import Breaker
from tinsmith.client.config import PROTOCOL_VERSION, ClientConfig, Timing
from tinsmith.client.credentials import CommandKey, Credential, FixedKey
from tinsmith.client.errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BillingError,
    CircuitOpenError,
    RateLimitError,
    body_of,
    status_error,
)
from tinsmith.client.events import Events, describe
from tinsmith.client.transport import NetworkTransport

logger = logging.getLogger("tinsmith.client")
M = TypeVar("M", bound=BaseModel)

JSON_TYPE = "application/json"
PROTO_TYPE = "application/x-protobuf"
_RETRY_AFTER_MAX_MS = 60_000
_WARN_AFTER_S = 5.0
_MAX_PARSED_URLS = 256
_KEEPALIVE_S = 30.0
_USER_AGENT = f"tinsmith/{__version__} Python/{platform.python_version()}"
_KEPT_IN_ERRORS = frozenset(
    (b"accept", b"content-type", b"x-idempotency-key", b"x-stainless-retry-count", b"x-tinker-request-type")
)
_LOCAL_BASE = "http://tinsmith.local"


class Pool(Enum):
    """Classes of operations with connections of their own; the value is how many requests may be under way."""

    SESSION = ("session", 16)
    TRAIN = ("train", 32)
    SAMPLE = ("sample", 50)
    RETRIEVE = ("retrieve", 250)
    RETRIEVE_SAMPLE = ("retrieve-sample", 500)

    @property
    def max_in_flight(self) -> int:
        return self.value[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One exchange as asked for. `body=None` sends none; `params` that are `None` are left out."""

    method: str
    path: str
    """Below `/api/v1/`, already escaped."""
    pool: Pool = Pool.TRAIN
    body: bytes | None = None
    content_type: str = JSON_TYPE
    accept: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    """Seconds for the whole exchange; `None` takes the client's."""
    anonymous: bool = False
    """Send no credential: the address itself is the permission, or there is nothing to show yet."""
    credential: str | None = field(default=None, repr=False)
    """Sent in place of the client's own."""

    @property
    def endpoint(self) -> str:
        return self.path.partition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Keep trying what may pass: no answer, timeouts, 408, 409, 429, 5xx, and whatever `x-should-retry` says."""

    give_up_after: float
    """Seconds from the first attempt."""
    rate_limits: bool = True
    """Whether 429 is among what may pass."""
    billing_give_up: float = 0.0
    """Seconds for which 402 is waited out; 0 does not wait."""

    def gives_up_after(self, error: APIError) -> float:
        return self.billing_give_up if isinstance(error, BillingError) else self.give_up_after

    def pause_after(self, error: APIError, attempt: int, timing: Timing) -> float | None:
        """Seconds to wait after failed attempt `attempt`, counted from 0; `None` if trying again is useless."""
        if isinstance(error, BillingError) and self.billing_give_up > 0:
            return timing.billing_pause
        if not error.retryable or (isinstance(error, RateLimitError) and not self.rate_limits):
            return None
        if error.retry_after_ms is not None and error.retry_after_ms <= _RETRY_AFTER_MAX_MS:
            return error.retry_after_ms / 1000
        return min(timing.retry_initial * 2.0 ** min(attempt, 32), timing.retry_max) * random.uniform(0.75, 1.0)


def post(path: str, body: Mapping[str, Any], *, pool: Pool = Pool.TRAIN, **more: Any) -> Call:
    return Call(method="POST", path=path, pool=pool, body=json_bytes(body), **more)


def get(path: str, **params: Any) -> Call:
    return Call(method="GET", path=path, params=params)


def escaped(identifier: str, *, safe: str = ":") -> str:
    """An id as part of a path. Colons stay as they are; so do slashes if `safe` has them (checkpoint ids)."""
    return urllib.parse.quote(identifier, safe=safe)


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """Raises `ValueError` naming the field if a number is NaN or infinite: JSON has no such numbers."""
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        if field_name := _not_finite(body, ""):
            raise ValueError(f"{field_name} must be a finite number") from error
        raise


def _not_finite(value: object, where: str) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} = {value!r}"
    items: Any = ()
    if isinstance(value, Mapping):
        items = ((f"{where}.{key}" if where else str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        items = ((f"{where}[{i}]", item) for i, item in enumerate(value))
    return next((found for name, item in items if (found := _not_finite(item, name))), None)


class Http:
    """The connections of one client. Build and use it on the client's event loop; `close` it there."""

    def __init__(
        self, config: ClientConfig, transport: httpx2.AsyncBaseTransport | None, events: Events | None = None
    ) -> None:
        self._config = config
        self._transport = transport
        self.events = events or Events()
        self.source: Credential = (
            FixedKey(config.api_key) if config.api_key else CommandKey(config.credential_command or "")
        )
        """Where credentials come from."""
        self.credential: Credential = self.source
        """What requests show: the source itself, or what the server gives in exchange for it."""
        self._breaker = Breaker(config.timing.breaker_threshold, config.timing.breaker_reset)
        self._base = f"{_LOCAL_BASE if config.is_local else config.base_url}/api/v1/"
        self._urls: dict[str, httpx2.URL] = {}
        self._clients: dict[Pool, httpx2.AsyncClient] = {}
        self._slots: dict[Pool, asyncio.Semaphore] = {}

    async def send(self, call: Call, retry: Retry | None = None) -> httpx2.Response:
        """The answer, read, with a status below 400.

        One idempotency key covers all attempts. Raises `APIStatusError`, `APIConnectionError` or `APITimeoutError`,
        the last of the attempts.
        """
        if retry is None:
            return await self._attempt(call, _idempotency_key(), attempt=0)
        closed_for = self._breaker.seconds_closed_for(call.endpoint)
        if closed_for > 0:
            raise CircuitOpenError(
                httpx2.Request(call.method, self._base + call.path),
                f"{call.endpoint} has failed again and again; it is left alone for another {closed_for:.0f} s",
            )
        try:
            response = await self._send_again_and_again(call, retry)
        except (APIConnectionError, APIStatusError) as error:
            at_fault = isinstance(error, APIConnectionError) or error.status_code >= 500
            (self._breaker.failed if at_fault else self._breaker.abandoned)(call.endpoint)
            raise
        except BaseException:
            self._breaker.abandoned(call.endpoint)
            raise
        self._breaker.succeeded(call.endpoint)
        return response

    async def _send_again_and_again(self, call: Call, retry: Retry) -> httpx2.Response:
        key = _idempotency_key()
        started = time.monotonic()
        for attempt in itertools.count():
            try:
                return await self._attempt(call, key, attempt=attempt)
            except APIError as error:
                pause = retry.pause_after(error, attempt, self._config.timing)
                elapsed = time.monotonic() - started
                if pause is None or elapsed + pause > retry.gives_up_after(error):
                    raise
                loud = elapsed >= _WARN_AFTER_S or isinstance(error, BillingError)
                level = logging.WARNING if loud else logging.INFO
                logger.log(level, "%s %s is tried again in %.1f s: %s", call.method, call.path, pause, error)
                self.events.emit("http.retry", path=call.path, attempt=attempt, pause_s=pause, **describe(error))
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _attempt(self, call: Call, key: str, *, attempt: int) -> httpx2.Response:
        """One exchange; a token that the server no longer takes is replaced, once."""
        shown = "" if call.anonymous else call.credential or await self.credential.value()
        try:
            return await self._exchange(call, key, attempt=attempt, credential=shown)
        except AuthenticationError as error:
            if call.credential or 'error="invalid_token"' not in error.response.headers.get("www-authenticate", ""):
                raise
            if not await self.credential.replace(shown):
                raise
        return await self._exchange(call, key, attempt=attempt, credential=await self.credential.value())

    async def send_for(self, call: Call, model: type[M], retry: Retry | None = None) -> M:
        """As `send`; the answer as `model`. Raises `APIResponseValidationError` if it is no such thing."""
        return parse(await self.send(call, retry), model)

    @property
    def pace(self) -> float:
        """Retry pauses of this client as a share of the usual ones."""
        return self._config.timing.retry_initial / Timing().retry_initial

    @asynccontextmanager
    async def stream(self, url: str, *, start: int = 0) -> AsyncIterator[httpx2.Response]:
        """The answer of a signed address, from byte `start` where the server can; no credential is shown.

        Raises as `send` does, once, and `APIConnectionError` if the answer breaks off.
        """
        client = self._client(Pool.TRAIN)
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        request = client.build_request("GET", url, headers=headers)
        shown = httpx2.Request("GET", request.url.copy_with(query=None))
        try:
            response = await client.send(request, stream=True, follow_redirects=True)
            response.request = shown
            try:
                if response.status_code == 416:
                    yield httpx2.Response(206, request=shown, headers={"content-length": "0"}, content=b"")
                    return
                if response.status_code >= 400:
                    await response.aread()
                    raise status_error(response)
                yield response
            finally:
                await response.aclose()
        except httpx2.TimeoutException as error:
            raise APITimeoutError(shown, message=f"Request timed out: GET {shown.url}") from error
        except httpx2.RequestError as error:
            raise APIConnectionError(shown, f"Connection error: GET {shown.url}: {error}") from error

    async def close(self) -> None:
        await self.credential.close()
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.aclose()

    async def _exchange(self, call: Call, key: str, *, attempt: int, credential: str) -> httpx2.Response:
        timeout = self._config.timing.request_timeout if call.timeout is None else call.timeout
        client = self._client(call.pool)
        request = client.build_request(
            call.method,
            self._url(call.path),
            content=call.body,
            params={name: value for name, value in call.params.items() if value is not None} or None,
            headers=self._headers(call, key, attempt, timeout, credential),
            timeout=httpx2.Timeout(timeout),
        )
        async with self._slots[call.pool]:
            started = time.monotonic()
            try:
                async with asyncio.timeout(timeout):
                    response = await client.send(request)
            except (httpx2.TimeoutException, TimeoutError) as error:
                message = f"Request timed out: {call.method} {call.path} had no answer within {timeout:g} s."
                raise APITimeoutError(_without_secrets(request), message=message) from error
            except httpx2.RequestError as error:
                message = f"Connection error: {call.method} {self._config.base_url}: {error or type(error).__name__}"
                raise APIConnectionError(_without_secrets(request), message) from error
        response.request = _without_secrets(request)
        if self.events:
            self.events.emit(
                "http.request",
                method=call.method,
                path=call.path,
                status=response.status_code,
                attempt=attempt,
                duration_s=time.monotonic() - started,
                bytes_sent=len(call.body or b""),
                bytes_received=len(response.content),
            )
        if response.status_code >= 400:
            raise status_error(response)
        if note := response.headers.get("x-deprecation-note"):
            logger.warning("the server says: %s", note)
        return response

    def _url(self, path: str) -> httpx2.URL:
        """Parsed once for each of the few paths that a training loop asks for."""
        url = self._urls.get(path)
        if url is None:
            url = httpx2.URL(self._base + path)
            if len(self._urls) < _MAX_PARSED_URLS:
                self._urls[path] = url
        return url

    def _client(self, pool: Pool) -> httpx2.AsyncClient:
        if pool not in self._clients:
            limit = pool.max_in_flight
            self._slots[pool] = asyncio.Semaphore(limit)
            self._clients[pool] = httpx2.AsyncClient(transport=self._new_transport(limit), trust_env=False)
        return self._clients[pool]

    def _new_transport(self, max_connections: int) -> httpx2.AsyncBaseTransport:
        if self._transport is not None:
            return _Shared(self._transport)
        return NetworkTransport(
            max_connections=max_connections, keepalive_s=_KEEPALIVE_S, trust_env=not self._config.is_loopback
        )

    def _headers(self, call: Call, key: str, attempt: int, timeout: float, credential: str) -> dict[str, str]:
        headers = {
            **({"X-API-Key": credential} if credential else {}),
            "Accept": call.accept,
            "User-Agent": _USER_AGENT,
            "x-sdk-version": PROTOCOL_VERSION,
            "x-stainless-retry-count": str(attempt),
            "x-stainless-read-timeout": f"{timeout:g}",
        }
        if call.method != "GET":
            headers["Content-Type"] = call.content_type
            headers["X-Idempotency-Key"] = key
        return {**headers, **self.events.headers(), **call.headers, **self._config.headers}


def _idempotency_key() -> str:
    return f"tinsmith-{uuid.uuid4()}"


class _Shared(httpx2.AsyncBaseTransport):
    """A transport that several pools use; closing a pool does not close it."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return await self._transport.handle_async_request(request)


def parse(response: httpx2.Response, model: type[M]) -> M:
    """Raises `APIResponseValidationError` if the body is no JSON or no `model`."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        where = f"{response.request.method} {response.request.url.path}"
        message = f"the answer to {where} is no valid {model.__name__}: {error}"
        raise APIResponseValidationError(response, body_of(response), message) from error


def _without_secrets(request: httpx2.Request) -> httpx2.Request:
    """What of a request may be kept in an error: its method, URL and harmless headers."""
    headers = [(name, value) for name, value in request.headers.raw if name.lower() in _KEPT_IN_ERRORS]
    url = request.url.copy_with(userinfo=b"") if request.url.userinfo else request.url
    return httpx2.Request(request.method, url, headers=headers)
