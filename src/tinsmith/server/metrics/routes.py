"""The route that Prometheus scrapes."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

PATH = "/metrics"


def metrics_router(registry: CollectorRegistry) -> APIRouter:
    """Whoever may call it is for the guard of all routes to say: figures name no user and no model of one."""
    router = APIRouter(tags=["server"])

    @router.get(PATH, response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics(request: Request) -> Response:
        """Figures in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
