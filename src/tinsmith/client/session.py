"""One client's link to one server, as it lives on the client's event loop: settings, session, heartbeats, farewell."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import httpx2
from pydantic import BaseModel

from tinsmith.client.budget import ByteBudget
from tinsmith.client.config import PROTOCOL_VERSION, ClientConfig, ServerFlags
from tinsmith.client.errors import APIStatusError, ConfigurationError, TinkerError
from tinsmith.client.http import Http, Pool, Retry, post
from tinsmith.client.local import LocalTransport
from tinsmith.client.polling import Finished, QueueObserver, ResultPoller

logger = logging.getLogger("tinsmith.client")

CloseStatus: TypeAlias = Literal["success", "errored", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """What a new session says about itself."""

    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    project_id: str | None = None
    display_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedSession:
    """A session that another client opened. It is kept alive from here too, and never finished from here."""

    session_id: str
    flags: ServerFlags


class SessionReply(BaseModel):
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


class SubmitReply(BaseModel):
    """The acknowledgement of an accepted request."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class Link:
    """Everything here runs on the client's event loop, except that `mark_shared` may be called from anywhere."""

    def __init__(self, config: ClientConfig, spec: SessionSpec, joined: JoinedSession | None) -> None:
        self.config = config
        self.flags = ServerFlags() if joined is None else joined.flags
        self._spec = spec
        self._joined = joined is not None
        self._session_id: str | None = None if joined is None else joined.session_id
        self._http: Http | None = None
        self._local: LocalTransport | None = None
        self._configured = joined is not None
        self._starting = asyncio.Lock()
        self._heartbeat: asyncio.Task[None] | None = None
        self._shared = False
        self._closed = False
        self.result_bytes = ByteBudget(self.flags.inflight_response_bytes_semaphore_size)
        self.submit_bytes = ByteBudget(self.flags.fwdbwd_dispatch_bytes_semaphore_size)

    @property
    def http(self) -> Http:
        if self._http is None:
            transport: httpx2.AsyncBaseTransport | None = self.config.transport
            if transport is None and self.config.is_local:
                transport = self._local = LocalTransport(self.config.base_url)
            self._http = Http(self.config, transport)
        return self._http

    @property
    def submit_retry(self) -> Retry:
        return Retry(give_up_after=self.config.timing.submit_give_up)

    @property
    def sample_retry(self) -> Retry:
        """Rate limits on samples are not retried here: the sampling client waits for room in its own way."""
        return Retry(give_up_after=self.config.timing.submit_give_up, rate_limits=False)

    def mark_shared(self) -> None:
        """Other processes may live on this session: only an explicit `close` may finish it."""
        self._shared = True

    async def configure(self) -> None:
        """Fetch the server's settings, once. Raises `ConfigurationError` if it wants what this client has not."""
        async with self._starting:
            await self._configure()

    async def session_id(self) -> str:
        """The session, opened when first asked for; heartbeats start with it."""
        async with self._starting:
            await self._configure()
            if self._session_id is None:
                self._session_id = await self._create_session()
            if self._heartbeat is None:
                self._heartbeat = asyncio.create_task(heartbeats(self.http, self._session_id, self.config))
            return self._session_id

    async def submit(self, path: str, body: Mapping[str, Any]) -> SubmitReply:
        return await self.http.send_for(post(path, body), SubmitReply, self.submit_retry)

    async def result(self, request_id: str, request_type: str, observer: QueueObserver | None = None) -> Finished:
        poller = ResultPoller(
            self.http,
            self.config.timing,
            self.result_bytes,
            request_id,
            request_type=request_type,
            observer=observer,
        )
        return await poller.wait()

    async def finish(self, status: CloseStatus, detail: str | None) -> None:
        """Tell the server that the session is over, if one was opened here."""
        if self._session_id is None or self._joined:
            return
        body = {"reason": {"type": status}, "detail": detail}
        call = post(f"sessions/{self._session_id}/finish", body, pool=Pool.SESSION)
        await self.http.send(call, Retry(give_up_after=self.config.timing.close_timeout))

    async def finish_quietly(self, status: CloseStatus) -> None:
        """The farewell of a client that nobody closed. Best effort: the server also ends sessions that fall silent."""
        if self._shared:
            return
        try:
            async with asyncio.timeout(2.0):
                await self.finish(status, "the client was not closed")
        except (TinkerError, TimeoutError, RuntimeError) as error:
            logger.debug("session %s could not be finished: %s", self._session_id, error)

    async def shut_down(self) -> None:
        """Stop heartbeats and close connections. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.wait([self._heartbeat], timeout=1.0)
        if self._http is not None:
            await self._http.close()
        if self._local is not None:
            await self._local.aclose()

    async def _configure(self) -> None:
        if self._configured:
            return
        http = self.http
        if self._local is not None:
            await self._local.ready()
        call = post("client/config", {"sdk_version": PROTOCOL_VERSION}, pool=Pool.SESSION)
        self.flags = await http.send_for(call, ServerFlags, self._startup_retry())
        if self.flags.pjwt_auth_enabled:
            raise ConfigurationError(
                f"the server at {self.config.base_url} wants keys exchanged for tokens (pjwt_auth_enabled), "
                "which this client does not do"
            )
        self.result_bytes = ByteBudget(self.flags.inflight_response_bytes_semaphore_size)
        self.submit_bytes = ByteBudget(self.flags.fwdbwd_dispatch_bytes_semaphore_size)
        self._configured = True

    async def _create_session(self) -> str:
        body: dict[str, Any] = {
            "tags": [tag.strip() for tag in os.environ.get("TINKER_TAGS", "").split(",") if tag.strip()],
            "user_metadata": dict(self._spec.user_metadata),
            "sdk_version": PROTOCOL_VERSION,
            "project_id": self._spec.project_id,
            "display_name": self._spec.display_name,
            "type": "create_session",
        }
        body = {name: value for name, value in body.items() if value is not None}
        call = post("create_session", body, pool=Pool.SESSION)
        reply = await self.http.send_for(call, SessionReply, self._startup_retry())
        for level, message in (
            (logging.INFO, reply.info_message),
            (logging.WARNING, reply.warning_message),
            (logging.ERROR, reply.error_message),
        ):
            if message:
                logger.log(level, "%s", message)
        return reply.session_id

    def _startup_retry(self) -> Retry:
        return Retry(give_up_after=self.config.timing.startup_give_up)


async def heartbeats(
    http: Http, session_id: str, config: ClientConfig, clock: Callable[[], float] = time.monotonic
) -> None:
    """Keep a session alive until cancelled, or until the server says it is gone (410)."""
    timing = config.timing
    last_success = last_warning = clock()
    call = post(
        "session_heartbeat",
        {"session_id": session_id, "type": "session_heartbeat"},
        pool=Pool.SESSION,
        timeout=timing.heartbeat_timeout,
    )
    next_beat = clock() + timing.heartbeat_every
    while True:
        await asyncio.sleep(max(0.0, next_beat - clock()))
        next_beat = max(next_beat + timing.heartbeat_every, clock())
        try:
            await http.send(call)
            last_success = last_warning = clock()
        except Exception as error:  # noqa: BLE001  a task boundary: one lost beat must not end the others
            if isinstance(error, APIStatusError) and error.status_code == 410:
                logger.warning("the server has ended session %s: %s", session_id, error)
                return
            logger.debug("heartbeat of session %s failed: %s", session_id, error)
            if clock() - max(last_success, last_warning) >= timing.heartbeat_warn_after:
                last_warning = clock()
                logger.warning(
                    "no heartbeat of session %s has reached %s for %.0f s: %s",
                    session_id,
                    config.base_url,
                    clock() - last_success,
                    error,
                )
