"""How errors look over HTTP.

A status is chosen by what a Tinker client does with it: 400, 404, 410 and 413 end the call; 409 and 5xx are sent again
for minutes, so no permanent error may have them; 429 slows the client down.
"""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Mapping
from typing import Any

import orjson
import structlog
from fastapi.exceptions import HTTPException, RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith.control.errors import FutureExpired, SessionEnded
from tinsmith.types.errors import InvalidInput, NotFound, Overloaded, ServerError, TinsmithError, UserError

log = structlog.get_logger("tinsmith.server")


class BodyTooLarge(InvalidInput):
    """A body beyond the limit, as sent or once expanded."""


class InternalError(ServerError):
    """A fault of ours; the message carries the number under which it was logged."""


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def status_of(error: TinsmithError) -> int:
    match error:
        case NotFound():
            return 404
        case SessionEnded() | FutureExpired():
            return 410
        case BodyTooLarge():
            return 413
        case Overloaded():
            return 429
        case UserError():
            return 400
        case _:
            return 500


def error_response(error: TinsmithError) -> Response:
    headers = {"retry-after": "1", "x-should-retry": "true"} if isinstance(error, Overloaded) else None
    return json_response({"detail": error.message}, status_of(error), headers)


def new_incident(error: BaseException, **facts: Any) -> InternalError:
    """Log an unforeseen error with its traceback; the returned error names it without telling what happened inside.

    `facts` must hold no header and no body: those carry keys and data. For the same reason the traceback is formatted
    here: structlog's own, with rich installed, prints the local variables.
    """
    incident = secrets.token_hex(6)
    trace = "".join(traceback.format_exception(error))
    log.error("unforeseen error", incident=incident, traceback=trace, **facts)
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
        log.warning("request failed", method=request.method, path=request.url.path, error=error.message)
    return error_response(error)


async def handle_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return json_response({"detail": explain(error, skip=1)}, 400)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    detail = error.detail
    if error.status_code == 404:
        detail = f"there is no {request.method} {request.url.path} on this server"
    elif error.status_code == 405:
        detail = f"{request.url.path} does not take {request.method}"
    return json_response({"detail": detail}, error.status_code, error.headers)


class Guard:
    """Outermost middleware: bounds the size of bodies, and turns what nobody caught into a logged 500."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, self._limited(scope, receive), watched_send)
        except Exception as error:  # noqa: BLE001 - the last boundary of a request
            incident = new_incident(error, method=scope["method"], path=scope["path"])
            if not started:
                await error_response(incident)(scope, receive, send)
        return None

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        received = 0
        announced = next((int(v) for k, v in scope["headers"] if k == b"content-length" and v.isdigit()), 0)

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if max(received, announced) > self.max_body_bytes:
                raise HTTPException(
                    413, f"the body has {max(received, announced)} bytes; the limit is {self.max_body_bytes}"
                )
            return message

        return limited_receive
