"""Known parts of the Tinker API that this server does not have: each says so, once, by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinsmith.server.errors import json_response

_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"

UNSUPPORTED: dict[tuple[str, str], str] = {
    ("POST", "/auth/token"): "there are no tokens to exchange; any API key is accepted on this machine",
    ("GET", "/auth/apikey/me"): "API keys are not managed here; any key is accepted on this machine",
    ("DELETE", "/auth/apikey/me"): "API keys are not managed here; any key is accepted on this machine",
    (
        "POST",
        "/copy_weights",
    ): "there are no projects to copy between; create_training_client_from_state reads any path",
    ("POST", "/retrieve_futures"): "results are fetched one by one with retrieve_future",
    ("POST", "/sessions/search"): "list sessions with GET /api/v1/sessions",
    ("PUT", "/sessions/{session_id}/project"): "there are no projects yet",
    ("GET", "/sessions/{session_id}/trace_export"): "there are no traces to export yet",
    ("GET", "/audit"): "there is no audit log yet",
    ("GET", "/billing/usage/events"): "nothing is billed",
    ("GET", "/billing/usage/checkpoints/current"): "nothing is billed",
    ("GET", f"{_CHECKPOINT}/external_weights_urls"): "there are no external checkpoints; named sampler checkpoints are "
    "PEFT folders in the server's data folder",
    ("GET", f"{_CHECKPOINT}/archive"): "checkpoints are folders in the server's data folder",
}
"""Method and path, and what to do instead."""


def unsupported_routes(prefix: str) -> list[Route]:
    return [Route(prefix + path, _refusal(why), methods=[method]) for (method, path), why in UNSUPPORTED.items()]


def _refusal(why: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        return json_response({"detail": f"{request.method} {request.url.path} is not supported: {why}"}, 400)

    return refuse
