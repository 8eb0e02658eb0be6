"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tinsmith.control.errors import Unauthorized
from tinsmith.server.chat.fields import BadField
from tinsmith.server.chat.routing import DialectRoute
from tinsmith.server.errors import challenge, json_response, retry_after, status_of
from tinsmith.types.errors import TinsmithError

_TYPES = {403: "permission_error", 429: "rate_limit_error", 500: "server_error", 507: "server_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def error_body(error: TinsmithError) -> dict[str, Any]:
    status = error_status(error)
    param, code = (error.param, error.code) if isinstance(error, BadField) else (None, None)
    return fault_body(status, error.message, param, code)


def fault_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    fields = {
        "message": message,
        "type": _TYPES.get(status, "invalid_request_error"),
        "param": param,
        "code": code or _CODES.get(status),
    }
    return {"error": fields}


def error_status(error: TinsmithError) -> int:
    if isinstance(error, BadField) and error.code == "model_not_found":
        return 404
    return status_of(error)


class OpenAIRoute(DialectRoute):
    def error_response(self, request: Request, error: TinsmithError) -> Response:
        return error_response(error)


def error_response(error: TinsmithError) -> Response:
    status = error_status(error)
    headers = (
        {"retry-after": str(retry_after(error))}
        if status == 429
        else {"x-should-retry": "false"}
        if status == 500
        else {}
    )
    if isinstance(error, Unauthorized):
        headers = challenge(error)
    return json_response(error_body(error), status, headers)
