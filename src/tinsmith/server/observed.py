"""The outermost layer of the application: every HTTP request is counted, logged in one line and, if wanted, traced."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final, Protocol

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith.control.futures import RequestSpan, RequestType
from tinsmith.control.usage import TokenKind
from tinsmith.observe.logs import note, noting
from tinsmith.server.metrics.counted import CountedFigures

logger = logging.getLogger("tinsmith.server.requests")

NO_ROUTE: Final = "unmatched"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET: Final = ("retrieve_future", "retrieve_futures", "session_heartbeat", "healthz", "readyz", "metrics")
"""Last parts of routes that are called all the time: their lines are for `debug`."""


class HttpSpan(Protocol):
    """A trace's span of one HTTP request; a context manager that makes it the present one."""

    def __enter__(self) -> HttpSpan: ...

    def __exit__(self, *failure: object) -> None: ...

    def end(self, route: str, status: int, ids: Mapping[str, str]) -> None: ...


class HttpTracer(Protocol):
    def begin(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> HttpSpan:
        """The caller's trace goes on, if the headers name one."""
        ...


class Observed:
    """ASGI middleware. What routes note by `observe.logs.note` is in every log line of the request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Sequence[BaseRoute],
        prefixes: Sequence[str],
        figures: CountedFigures,
        tracer: HttpTracer | None,
    ) -> None:
        """`prefixes`: under which routers were included."""
        self._app = app
        self._figures = figures
        self._tracer = tracer
        self._routes = routes
        self._prefixes = sorted(set(prefixes), key=len, reverse=True)
        self._templates: dict[int, str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 0

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", http_id.encode()))
            await send(message)

        http_id = secrets.token_hex(8)
        began = time.perf_counter()
        span = None if self._tracer is None else self._tracer.begin(scope["method"], scope["headers"])
        self._figures.http_began()
        with noting() as ids, span or nullcontext():
            note(http_id=http_id)
            try:
                await self._app(scope, receive, watched_send)
            finally:
                seconds = time.perf_counter() - began
                route = self._template(scope)
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._figures.http_ended(method, route, status, seconds)
                if span is not None:
                    span.end(route, status, ids)
                _log(scope, route, status, seconds)
        return None

    def _template(self, scope: Scope) -> str:
        """The route's path as it was declared: nothing in it was chosen by a user."""
        if self._templates is None:  # the routes are complete once the first request comes
            self._templates = {id(route.endpoint): route.path for route in self._routes if isinstance(route, Route)}
        if (route := scope.get("route")) is not None:
            own = str(getattr(route, "path_format", route.path))
            prefix = next((p for p in self._prefixes if scope["path"].startswith(f"{p}/")), "")
            return own if own.startswith(f"{prefix}/") else prefix + own  # FastAPI names it with or without
        return self._templates.get(id(scope.get("endpoint")), NO_ROUTE)


class Noting:
    """An `Observer` that puts the ids of requests into the log lines of whoever asked."""

    def request_opened(
        self, request_id: str, request_type: RequestType, session_id: str | None, subject: str | None
    ) -> None:
        about: dict[str, Any] = {"sampler_id" if request_type == "Sample" else "model_id": subject}
        note(request_id=request_id, session_id=session_id, **about)

    def request_ended(self, span: RequestSpan) -> None:
        """Whoever asked has left."""

    def tokens(self, kind: TokenKind, base_model: str, count: int) -> None:
        """No line of the log."""

    def committed(self, num_writes: int, seconds: float) -> None:
        """No line of the log."""


def _log(scope: Scope, route: str, status: int, seconds: float) -> None:
    quiet = route.rpartition("/")[2] in _QUIET and status < 500
    level = logging.DEBUG if quiet else logging.INFO
    if logger.isEnabledFor(level):
        milliseconds = 1000 * seconds
        fields = {"method": scope["method"], "route": route, "status": status, "duration_ms": round(milliseconds, 3)}
        extra = {"fields": fields}
        logger.log(level, "%s %s %d %.1f ms", scope["method"], scope["path"], status, milliseconds, extra=extra)
