"""Which dialect a path belongs to, for answers that are given before any route is reached."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import Response

from tinsmith.server import anthropic, errors, openai
from tinsmith.server.anthropic.errors import error_response as anthropic_error
from tinsmith.server.openai.errors import error_response as openai_error
from tinsmith.types.errors import TinsmithError

_ANTHROPIC_PATHS = (f"{anthropic.PREFIX}/messages",)


def refuse(headers: Headers, path: str, error: TinsmithError) -> Response:
    """The error as the clients of this path read it. `/v1/models` is asked by those of two dialects."""
    if path.startswith(_ANTHROPIC_PATHS) or (path.startswith(f"{openai.PREFIX}/") and "anthropic-version" in headers):
        return anthropic_error(error)
    if path.startswith(f"{openai.PREFIX}/"):
        return openai_error(error)
    return errors.error_response(error)
