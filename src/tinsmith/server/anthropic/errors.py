"""Errors as Anthropic's clients read them: `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tinsmith.control.errors import Unauthorized
from tinsmith.server.chat.fields import BadField
from tinsmith.server.chat.routing import DialectRoute
from tinsmith.server.errors import challenge, json_response, retry_after, status_of
from tinsmith.types.errors import TinsmithError

OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    507: "api_error",
    OVERLOADED: "overloaded_error",
}


def error_body(error: TinsmithError) -> dict[str, Any]:
    """With `param`, beyond what Anthropic's own errors tell."""
    body = fault_body(error_status(error), error.message)
    if isinstance(error, BadField):
        body["error"]["param"] = error.param
    return body


def fault_body(status: int, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": _TYPES.get(status, "invalid_request_error"), "message": message}}


def error_status(error: TinsmithError) -> int:
    if isinstance(error, BadField) and error.code == "model_not_found":
        return 404
    status = status_of(error)
    return OVERLOADED if status == 429 else status


class AnthropicRoute(DialectRoute):
    def error_response(self, request: Request, error: TinsmithError) -> Response:
        return error_response(error)


def error_response(error: TinsmithError) -> Response:
    status = error_status(error)
    headers = {"retry-after": str(retry_after(error))} if status == OVERLOADED else {}
    if status == 500:
        headers = {"x-should-retry": "false"}
    if isinstance(error, Unauthorized):
        headers = challenge(error)
    return json_response(error_body(error), status, headers)
