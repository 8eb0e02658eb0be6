"""Routes whose errors have the shape of their dialect."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.server.chat.fields import BadField, place_of
from tinsmith.server.chat.recorder import CONVERSATION_HEADER, MOST_CONVERSATION_CHARACTERS, Visit
from tinsmith.server.chat.replies import CallerLeft
from tinsmith.server.errors import CLIENT_CLOSED_REQUEST, explain, new_incident
from tinsmith.types.errors import InvalidInput, TinsmithError

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "A field that cannot be served, by name"},
    "5XX": {"description": "The request was fine, the server is not, or it has too much to do (529)"},
}
"""How routes of the dialects document their errors."""
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer, or with `stream` its pieces as they are drawn",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}


class DialectRoute(APIRoute):
    """A subclass says how an error looks."""

    def error_response(self, request: Request, error: TinsmithError) -> Response:
        raise NotImplementedError

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_in_dialect(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                if error.status_code != 400:
                    raise
                return self.error_response(request, InvalidInput(str(error.detail)))
            except CallerLeft:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            except Exception as error:  # noqa: BLE001 - the boundary of a request: nobody else knows its dialect
                return self.error_response(request, as_tinsmith_error(error, request.method, request.url.path))

        return handle_in_dialect


def as_tinsmith_error(error: Exception, method: str, path: str) -> TinsmithError:
    """As it is, explained, or logged under a number."""
    if isinstance(error, TinsmithError):
        return error
    if isinstance(error, RequestValidationError):
        place = place_of(error)
        message = explain(error, skip=1)
        return BadField(place, message) if place else InvalidInput(message)
    return new_incident(error, method=method, path=path)


def new_visit(request: Request, dialect: str, prefix: str) -> Visit:
    """Raises `BadField` for a conversation id that is too long to be one."""
    conversation = request.headers.get(CONVERSATION_HEADER)
    if conversation is not None and len(conversation) > MOST_CONVERSATION_CHARACTERS:
        raise BadField(
            CONVERSATION_HEADER,
            f"header {CONVERSATION_HEADER} has {len(conversation)} characters; it may have "
            f"{MOST_CONVERSATION_CHARACTERS}",
        )
    return Visit(request_id=f"{prefix}{secrets.token_hex(12)}", dialect=dialect, conversation_id=conversation or None)
