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

from tinsmith.client.budget import ByteBudget, SampleGate
from tinsmith.client.config import PROTOCOL_VERSION, ClientConfig, ServerFlags
from tinsmith.client.credentials import CommandKey, ExchangedToken, is_jwt
from tinsmith.client.errors import APIStatusError, ConfigurationError, NotFoundError, TinkerError
from tinsmith.client.events import Events
from tinsmith.client.http import Http, Pool, Retry, post
from tinsmith.client.local import LocalTransport
from tinsmith.client.polling import Finished, QueueObserver, ResultPoller
from tinsmith.client.reporter import ServerReporter
from tinsmith.types.replies import (
    AuthTokenResponse,
    ClientDynamicConfigResponse,
    CreateSessionResponse,
    UntypedAPIFuture,
)

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
    dynamic: ClientDynamicConfigResponse = field(default_factory=ClientDynamicConfigResponse)


class Link:
    """Everything here runs on the client's event loop, except that `mark_shared` may be called from anywhere."""

    def __init__(self, config: ClientConfig, spec: SessionSpec, joined: JoinedSession | None) -> None:
        self.config = config
        self.flags = ServerFlags() if joined is None else joined.flags
        self.dynamic = ClientDynamicConfigResponse() if joined is None else joined.dynamic
        self.events = Events(config.sinks)
        self._spec = spec
        self._joined = joined is not None
        self._session_id: str | None = None if joined is None else joined.session_id
        self._http: Http | None = None
        self._local: LocalTransport | None = None
        self._configured = False
        self._starting = asyncio.Lock()
        self._heartbeat: asyncio.Task[None] | None = None
        self._refresh: asyncio.Task[None] | None = None
        self._reporter: ServerReporter | None = None
        self._cancelling: set[asyncio.Task[None]] = set()
        self._cancel_slots = self._new_cancel_slots()
        self._shared = False
        self._closed = False
        self.session_gone: str | None = None
        """Why the server no longer knows the session, once a heartbeat has said so."""
        self.result_bytes = ByteBudget(self.flags.inflight_response_bytes_semaphore_size)
        self.submit_bytes = ByteBudget(self.flags.fwdbwd_dispatch_bytes_semaphore_size)
        self.samples = SampleGate(self.flags.sample_dispatch_bytes_semaphore_size)

    @property
    def http(self) -> Http:
        if self._http is None:
            transport: httpx2.AsyncBaseTransport | None = self.config.transport
            if transport is None and self.config.is_local:
                transport = self._local = LocalTransport(self.config.base_url)
            self._http = Http(self.config, transport, self.events)
        return self._http

    @property
    def submit_retry(self) -> Retry:
        return Retry(
            give_up_after=self.config.timing.submit_give_up,
            billing_give_up=self.flags.billing_exception_max_pause_duration_sec,
        )

    @property
    def sample_retry(self) -> Retry:
        """Rate limits on samples are not retried here: the sampling client waits for room in its own way."""
        return Retry(
            give_up_after=self.config.timing.submit_give_up,
            rate_limits=False,
            billing_give_up=self.flags.billing_exception_max_pause_duration_sec,
        )

    @property
    def is_left_open(self) -> bool:
        """Whether a session was opened here, for nobody else, and not yet ended."""
        return not (self._session_id is None or self._joined or self._shared or self._closed)

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
                self._heartbeat = asyncio.create_task(
                    heartbeats(self.http, self._session_id, self.config, on_gone=self._session_is_gone)
                )
                self._refresh = asyncio.create_task(self._refresh_settings())
            return self._session_id

    @property
    def opened_session_id(self) -> str | None:
        """The session as far as one was opened; asks nobody."""
        return self._session_id

    def _session_is_gone(self, why: str) -> None:
        self.session_gone = why
        self.events.emit("session.gone", session_id=self._session_id, reason=why)

    async def submit(self, path: str, body: Mapping[str, Any]) -> UntypedAPIFuture:
        return await self.http.send_for(post(path, body), UntypedAPIFuture, self.submit_retry)

    def give_up(self, request_id: str) -> None:
        """Nobody wants this sample any more; the server is told so, if it wants to know."""
        if self._closed or not self.dynamic.sample_cancel_enabled:
            return
        task = asyncio.create_task(self._cancel_future(request_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel_future(self, request_id: str) -> None:
        call = post("cancel_future", {"request_id": request_id}, pool=Pool.RETRIEVE, timeout=30.0)
        async with self._cancel_slots:
            try:
                await self.http.send(call, self.submit_retry)
            except TinkerError as error:
                logger.info("request %s could not be cancelled: %s", request_id, error)

    async def result(
        self,
        request_id: str,
        request_type: str,
        observer: QueueObserver | None = None,
        *,
        metadata_only: bool = True,
    ) -> Finished:
        poller = ResultPoller(
            self.http,
            self.config.timing,
            self.result_bytes,
            request_id,
            request_type=request_type,
            observer=observer,
            metadata_only=metadata_only,
            billing_give_up=self.flags.billing_exception_max_pause_duration_sec,
            json_only=self.flags.json_only,
        )
        return await poller.wait()

    async def finish(self, status: CloseStatus, detail: str | None) -> None:
        """Tell the server that the session is over, if one was opened here."""
        if self._session_id is None or self._joined:
            return
        body = {"reason": {"type": status}, "detail": detail}
        call = post(f"sessions/{self._session_id}/finish", body, pool=Pool.SESSION)
        self.events.emit("session.finished", session_id=self._session_id, status=status, detail=detail)
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
        tasks = [task for task in (self._heartbeat, self._refresh, *self._cancelling) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        if self._reporter is not None:
            await self._reporter.finish()
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
        if not self._joined:
            await self._fetch_flags(http)
        if self.flags.credential_default_source == "credential_cmd":
            self._use_command(http)
        if self.flags.pjwt_auth_enabled:
            http.credential = ExchangedToken(self._exchange_credential)
        if not self._joined:
            await self._fetch_settings(self._startup_retry())
        self._configured = True

    async def _fetch_flags(self, http: Http) -> None:
        call = post("client/config", {"sdk_version": PROTOCOL_VERSION}, pool=Pool.SESSION)
        try:
            self.flags = await http.send_for(call, ServerFlags, self._startup_retry())
        except NotFoundError:
            logger.info("%s has no client/config: it is spoken to in JSON, as older servers are", self.config.base_url)
            self.flags = ServerFlags(json_only=True)
        self.result_bytes = ByteBudget(self.flags.inflight_response_bytes_semaphore_size)
        self.submit_bytes = ByteBudget(self.flags.fwdbwd_dispatch_bytes_semaphore_size)
        self.samples = SampleGate(self.flags.sample_dispatch_bytes_semaphore_size)

    def _use_command(self, http: Http) -> None:
        """The server wants credentials from a command, unless the key is a token already."""
        if is_jwt(self.config.api_key.get_secret_value()):
            return
        if self.config.credential_command is None:
            raise ConfigurationError(
                f"the server at {self.config.base_url} wants changing credentials: "
                "set TINKER_CREDENTIAL_CMD to a command that prints one"
            )
        http.source = http.credential = CommandKey(self.config.credential_command)

    async def _exchange_credential(self) -> str:
        credential = await self.http.source.value()
        call = post("auth/token", {}, pool=Pool.SESSION, credential=credential)
        return (await self.http.send_for(call, AuthTokenResponse, self._startup_retry())).jwt

    async def _fetch_settings(self, retry: Retry | None) -> None:
        """Settings that may change while the client lives. A server need not have them."""
        call = post("client/dynamic_config", {"sdk_version": PROTOCOL_VERSION}, pool=Pool.SESSION, timeout=10.0)
        try:
            self.dynamic = await self.http.send_for(call, ClientDynamicConfigResponse, retry)
        except NotFoundError:
            logger.debug("the server has no dynamic settings; defaults apply")
        self._cancel_slots = self._new_cancel_slots()

    def _new_cancel_slots(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(max(self.dynamic.sample_cancel_max_batch_size, 1))

    async def _refresh_settings(self) -> None:
        while True:
            await asyncio.sleep(max(self.dynamic.refresh_interval_sec, 10))
            try:
                await self._fetch_settings(None)
            except TinkerError as error:
                logger.debug("the server's settings could not be fetched again: %s", error)

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
        reply = await self.http.send_for(call, CreateSessionResponse, self._startup_retry())
        for level, message in (
            (logging.INFO, reply.info_message),
            (logging.WARNING, reply.warning_message),
            (logging.ERROR, reply.error_message),
        ):
            if message:
                logger.log(level, "%s", message)
        self.events.emit("session.created", session_id=reply.session_id, base_url=self.config.base_url)
        if self.config.reports_to_server:
            self._reporter = ServerReporter(self.http, reply.session_id)
            self._reporter.start()
            self.events.add(self._reporter)
        return reply.session_id

    def _startup_retry(self) -> Retry:
        return Retry(give_up_after=self.config.timing.startup_give_up)


async def heartbeats(
    http: Http,
    session_id: str,
    config: ClientConfig,
    clock: Callable[[], float] = time.monotonic,
    *,
    on_gone: Callable[[str], None] | None = None,
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
                if on_gone is not None:
                    on_gone(str(error))
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
