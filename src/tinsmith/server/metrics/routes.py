"""The route that Prometheus scrapes."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from tinsmith.server.service import ServiceDep

PATH = "/metrics"


def metrics_router(registry: CollectorRegistry) -> APIRouter:
    """For administrators, and for keys with scope `metrics` alone; on a server without keys for whoever is there."""
    router = APIRouter(tags=["server"])

    @router.get(PATH, response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics(service: ServiceDep) -> Response:
        """Figures in Prometheus' text format."""
        service.control.permit("metrics", "admin")
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
