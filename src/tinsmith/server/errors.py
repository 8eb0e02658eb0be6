"""How errors look over HTTP.

A status is chosen by what a Tinker client does with it: 400, 404 and 410 end the call; 409 and 5xx are sent again
for minutes, so no permanent error may have them; 429 slows the client down.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import orjson
from fastapi.exceptions import HTTPException, RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith.control.errors import (
    DiskBudgetExceeded,
    Forbidden,
    FutureExpired,
    NotTaken,
    QuotaExceeded,
    SessionEnded,
    Unauthorized,
)
from tinsmith.control.signing import LinkRefused, TokenRefused
from tinsmith.types.errors import NotFound, Overloaded, ServerError, TinsmithError, UserError

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""For the log and the figures: nobody reads it."""


class InternalError(ServerError):
    """A fault of ours; the message carries the number under which it was logged."""


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def status_of(error: TinsmithError) -> int:
    match error:
        case NotFound():
            return 404
        case Unauthorized():
            return 401
        case LinkRefused() | Forbidden():
            return 403
        case SessionEnded() | FutureExpired():
            return 410
        case Overloaded():
            return 429
        case NotTaken() | DiskBudgetExceeded():
            return 507
        case UserError():
            return 400
        case _:
            return 500


def error_response(error: TinsmithError) -> Response:
    status = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorized):
        headers = challenge(error)
    elif isinstance(error, DiskBudgetExceeded):  # somebody has to delete something first
        headers = {"x-should-retry": "false"}
    elif status in (429, 507):
        headers = {"retry-after": str(retry_after(error)), "x-should-retry": "true"}
    elif status == 500:  # a full disk, a dead engine, a fault of ours: sending it again at once changes nothing
        headers = {"x-should-retry": "false"}
    return json_response({"detail": error.message}, status, headers)


def challenge(error: Unauthorized) -> dict[str, str]:
    """The header of a 401 (RFC 6750). A client exchanges its key for a new token if only the token was refused."""
    refused = ', error="invalid_token"' if isinstance(error, TokenRefused) else ""
    return {"www-authenticate": f'Bearer realm="tinsmith"{refused}'}


def retry_after(error: TinsmithError) -> int:
    """Seconds; clients take no heed of more than 60."""
    seconds = error.retry_after_s if isinstance(error, QuotaExceeded) else 1
    return min(60, max(1, math.ceil(seconds)))


def new_incident(error: BaseException, **facts: Any) -> InternalError:
    """Log an unforeseen error with its traceback; the returned error names it without telling what happened inside.

    `facts` must hold no header and no body: those carry keys and data.
    """
    incident = secrets.token_hex(6)
    logger.error("internal error %s, %s", incident, facts, exc_info=error)
    return InternalError(f"internal error {incident}; the server's log has the details")


def explain(error: ValidationError | RequestValidationError, skip: int = 0) -> str:
    """One line per fault: where, what is wrong, and the value. `skip` leading parts of each place are left out."""
    return "; ".join(_explain_one(fault, skip) for fault in error.errors())


def _explain_one(fault: Mapping[str, Any], skip: int) -> str:
    where = ".".join(str(part) for part in fault["loc"][skip:]) or "the body"
    if fault["type"] == "json_invalid":
        return f"the body is not JSON: {fault.get('ctx', {}).get('error', fault['msg'])}"
    if fault["type"] == "missing":
        return f"{where} is missing"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if fault["type"] in ("unknown_field", "value_error"):
        return f"{where}: {message}" if fault["loc"][skip:] else message
    return f"{where} {message}, not {brief(fault['input'])}"


def brief(value: Any, length: int = 80) -> str:
    """`repr`, cut to what fits in a message."""
    if isinstance(value, (list, dict)) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)} items"
    text = repr(value[:length] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= length else f"{text[:length]}…"


async def handle_tinsmith_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TinsmithError)
    if status_of(error) == 500:
        logger.warning("%s %s failed: %s", request.method, request.url.path, error)
    return error_response(error)


async def handle_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return json_response({"detail": explain(error, skip=1)}, 400)


def read_http_exception(request: Request, error: StarletteHTTPException) -> tuple[str, Mapping[str, str] | None]:
    """What to say about a path that is not there, a method it does not take, or a body; and the headers to send."""
    detail, headers = error.detail, error.headers
    if error.status_code == 404:
        detail = f"there is no {request.method} {request.url.path} on this server"
    elif error.status_code == 405:
        detail = f"{request.url.path} does not take {request.method}"
        headers = {"allow": ", ".join(_allowed_methods(request))}
    return detail, headers


def _allowed_methods(request: Request) -> list[str]:
    """Of all routes at this path; the router itself tells those of the first.

    Where the document names the path itself, routes that take any word in its place are not meant.
    """
    if (named := request.app.openapi()["paths"].get(request.url.path)) is not None:
        return sorted(method.upper() for method in named)
    scope = {key: request.scope[key] for key in ("type", "path", "headers") if key in request.scope}
    routes = request.app.routes
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(route.matches(scope | {"method": method})[0] is Match.FULL for route in routes)
    ]


def refuse_foreign_host(headers: Headers) -> Response | None:
    """403 if a request reached a server without keys under a name that is not this machine's own: a web page can make
    a browser send such a request by pointing its own name at 127.0.0.1 (DNS rebinding), or from another origin."""
    for value in (headers.get("host", ""), headers.get("origin", "")):
        if value and not is_loopback(_host_name(value)):
            detail = f"this server has no keys and answers to localhost and 127.0.0.1 only, not to {brief(value)}"
            return json_response({"detail": detail}, 403)
    return None


def _host_name(value: str) -> str:
    """Of a `Host` or an `Origin`; empty if it has none."""
    try:
        return urlsplit(value if "//" in value else f"//{value}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Guard:
    """Outermost middleware: turns away what browsers are tricked into sending, bounds the size of bodies, and turns
    what nobody caught into a logged 500."""

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        loopback_hosts_only: Callable[[], bool],
        uploads: Mapping[str, int] | None = None,
    ) -> None:
        """`uploads`: paths whose bodies may have another size."""
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.uploads = uploads or {}
        self.loopback_hosts_only = loopback_hosts_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.loopback_hosts_only() and (refusal := refuse_foreign_host(Headers(scope=scope))):
            return await refusal(scope, receive, send)
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, self._limited(scope, receive), watched_send)
        except ClientDisconnect:
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, watched_send)
        except Exception as error:  # noqa: BLE001 - the last boundary of a request
            incident = new_incident(error, method=scope["method"], path=scope["path"])
            if not started:
                await error_response(incident)(scope, receive, send)
        return None

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        received = 0
        limit = self.uploads.get(scope["path"], self.max_body_bytes)
        announced = next((int(v) for k, v in scope["headers"] if k == b"content-length" and v.isdigit()), 0)

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if max(received, announced) > limit:
                raise HTTPException(413, f"the body has {max(received, announced)} bytes; the limit is {limit}")
            return message

        return limited_receive
