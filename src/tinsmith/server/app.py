"""The HTTP application: routes of the dialects over one `Control`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, ProcessCollector
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tinsmith import __version__
from tinsmith.control.service import Control
from tinsmith.server import admin, anthropic, openai, tinker, tinkerbell
from tinsmith.server.auth import Authenticate
from tinsmith.server.dialects import handle_http_exception, refuse
from tinsmith.server.errors import (
    Guard,
    handle_tinsmith_error,
    handle_validation_error,
    json_response,
)
from tinsmith.server.hub import routes as hub
from tinsmith.server.metrics import CountedFigures, WatchedFigures, metrics_router
from tinsmith.server.observed import Noting, Observed
from tinsmith.server.openai import models
from tinsmith.server.openapi import build_openapi
from tinsmith.server.service import ServerState, ServiceDep
from tinsmith.server.settings import ServerSettings
from tinsmith.types.errors import TinsmithError

if TYPE_CHECKING:
    from tinsmith.server.tracing import Tracing


def create_app(control: Control, settings: ServerSettings | None = None, tracing: Tracing | None = None) -> FastAPI:
    """An application whose lifespan starts and closes `control`; `app.state.service` is what its requests share.

    `tracing` is closed with it. Entering the lifespan raises `UserError` if a base model cannot be loaded.
    """
    settings = settings or ServerSettings()
    state = ServerState(control, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await control.start()
            yield
        finally:
            state.close()
            await control.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Tinsmith",
        summary="Post-training of language models through the Tinker API.",
        version=__version__,
        lifespan=lifespan,
        routes=[*tinkerbell.routes(state), *tinker.raw_routes()],
        redoc_url=None,
    )
    app.state.service = state
    app.include_router(_about)
    for router in tinker.routers():
        app.include_router(router, prefix=tinker.PREFIX)
    if "openai" in settings.dialects:
        for router in openai.routers():
            app.include_router(router, prefix=openai.PREFIX)
    if "anthropic" in settings.dialects:
        app.include_router(anthropic.router, prefix=anthropic.PREFIX)
    if {"openai", "anthropic"} & settings.dialects:
        app.include_router(models.router, prefix=openai.PREFIX)
    app.include_router(hub.router, prefix=hub.PREFIX)
    app.include_router(admin.router)
    figures = _add_metrics(app, state)
    if tracing is not None:
        control.observers.add(tracing)
    app.add_exception_handler(TinsmithError, handle_tinsmith_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_middleware(Authenticate, state=state, refuse=refuse)
    app.add_middleware(
        Guard,
        max_body_bytes=settings.max_body_bytes,
        loopback_hosts_only=lambda: settings.loopback_hosts_only and not state.asks_for_keys,
        uploads={tinker.PREFIX + tinker.IMPORT_PATH: settings.max_upload_bytes},
    )
    # the outermost is the last that is added
    prefixes = (tinker.PREFIX, openai.PREFIX, anthropic.PREFIX, hub.PREFIX)
    app.add_middleware(Observed, routes=app.routes, prefixes=prefixes, figures=figures, tracer=tracing)
    app.openapi = partial(build_openapi, app)  # type: ignore[method-assign]
    return app


def _add_metrics(app: FastAPI, state: ServerState) -> CountedFigures:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(WatchedFigures(state.inspect))
    app.include_router(metrics_router(registry))
    figures = CountedFigures(registry)
    state.control.observers.add(figures)
    state.control.observers.add(Noting())
    return figures


_about = APIRouter(tags=["server"])


@_about.get("/")
async def about(service: ServiceDep) -> dict[str, Any]:
    return {
        "name": "tinsmith",
        "version": __version__,
        "models": [card.name for card in service.control.base_models()] if service.control.caller.scopes else [],
        "endpoints": tinkerbell.listing() if "tinkerbell" in service.settings.dialects else {},
        "links": {"api": tinker.PREFIX, "openapi": "/openapi.json", "docs": "/docs", "ready": "/readyz"},
    }


@_about.get("/healthz")
@_about.get(f"{tinker.PREFIX}/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@_about.get("/readyz")
@_about.get(f"{tinker.PREFIX}/readyz")
async def readyz(service: ServiceDep) -> Response:
    """503 with a reason while there is no engine to work with."""
    if service.control.is_ready:
        return json_response({"status": "ready"})
    return json_response({"status": "not ready", "reason": service.control.readiness_reason}, 503)
