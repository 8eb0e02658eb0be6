"""Which dialect a request speaks, on the four paths that Tinker and Tinkerbell share.

The body decides: Tinker's requests are numbered, typed or protobuf; Tinkerbell's hold text. A header pins it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from tinsmith.server.bodies import expand, parse_json_object
from tinsmith.server.errors import brief, json_response
from tinsmith.server.service import service_of
from tinsmith.wire.tinker_proto import WireError

DialectName: TypeAlias = Literal["tinker", "tinkerbell"]
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
ParsedEndpoint: TypeAlias = Callable[[Request, Mapping[str, Any]], Awaitable[Response]]

HEADER = "x-tinsmith-dialect"
TINKER_FIELDS = (
    "type",
    "seq_id",
    "forward_backward_input",
    "forward_input",
    "sampling_session_id",
    "optimizer_params",
)
TINKERBELL_FIELDS = ("data", "loss_fn_inputs", "prompts", "adam_params")
_NEITHER = (
    f"the body fits neither dialect of this path: a Tinker request has one of {', '.join(TINKER_FIELDS)} (or is "
    f"protobuf), a Tinkerbell request has one of {', '.join(TINKERBELL_FIELDS)}; the header {HEADER} pins one"
)


def dialect_of(fields: Mapping[str, Any]) -> DialectName | None:
    """Of a JSON body; a null counts as absent. `None` if it has a mark of neither."""
    if any(fields.get(name) is not None for name in TINKER_FIELDS):
        return "tinker"
    if any(fields.get(name) is not None for name in TINKERBELL_FIELDS):
        return "tinkerbell"
    return None


def shared_path(tinker: Endpoint, tinkerbell: ParsedEndpoint) -> Endpoint:
    """The route of a path where both dialects live. What cannot be read goes to Tinker, which says why."""

    async def route(request: Request) -> Response:
        pinned = request.headers.get(HEADER)
        if pinned not in (None, "tinker", "tinkerbell"):
            return json_response({"detail": f"header {HEADER} must be tinker or tinkerbell, not {brief(pinned)}"}, 400)
        if pinned == "tinker" or (pinned is None and "protobuf" in request.headers.get("content-type", "")):
            return await tinker(request)
        try:
            fields = await read_object(request)
        except WireError:
            return await tinker(request)
        dialect = pinned or dialect_of(fields)
        if dialect == "tinkerbell":
            return await tinkerbell(request, fields)
        if dialect == "tinker":
            return await tinker(request)
        return json_response({"detail": _NEITHER}, 422)

    return route


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body, read in a thread if it is large. Raises `WireError`."""
    service = service_of(request)
    body = await request.body()
    max_bytes = service.settings.max_expanded_bytes
    return await service.codecs.decode(
        request, body, lambda: parse_json_object(expand(request, body, max_bytes=max_bytes))
    )
