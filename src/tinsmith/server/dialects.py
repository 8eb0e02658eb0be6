"""Which dialect a path belongs to, for answers that are given before any route is reached."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.server import anthropic, errors, openai
from tinsmith.server.anthropic.errors import error_response as anthropic_error
from tinsmith.server.anthropic.errors import fault_body as anthropic_fault
from tinsmith.server.openai.errors import error_response as openai_error
from tinsmith.server.openai.errors import fault_body as openai_fault
from tinsmith.types.errors import TinsmithError

_ANTHROPIC_PATHS = (f"{anthropic.PREFIX}/messages",)


def refuse(headers: Headers, path: str, error: TinsmithError) -> Response:
    """The error as the clients of this path read it."""
    if _is_anthropic(headers, path):
        return anthropic_error(error)
    if path.startswith(f"{openai.PREFIX}/"):
        return openai_error(error)
    return errors.error_response(error)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """The same for what no route took."""
    assert isinstance(error, HTTPException)
    status, path = error.status_code, request.url.path
    detail, headers = errors.read_http_exception(request, error)
    body: dict[str, Any] = {"detail": detail}
    if _is_anthropic(request.headers, path):
        body = anthropic_fault(status, detail)
    elif path.startswith(f"{openai.PREFIX}/"):
        body = openai_fault(status, detail)
    return errors.json_response(body, status, headers)


def _is_anthropic(headers: Headers, path: str) -> bool:
    """`/v1/models` is asked by clients of two dialects."""
    return path.startswith(_ANTHROPIC_PATHS) or (
        path.startswith(f"{openai.PREFIX}/") and "anthropic-version" in headers
    )
