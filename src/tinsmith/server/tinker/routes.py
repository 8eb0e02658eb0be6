"""Every route of the dialect; the raw ones with the schema that describes them in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinsmith.server.tinker import (
    admin,
    checkpoints,
    decode,
    downloads,
    futures,
    identity,
    imports,
    schemas,
    sessions,
    submits,
)

PREFIX = "/api/v1"


@dataclass(frozen=True, slots=True)
class RawRoute:
    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    body: type[schemas.Body]
    summary: str


RAW: tuple[RawRoute, ...] = (
    RawRoute("/retrieve_future", futures.retrieve_future, schemas.RetrieveFutureBody, "Wait for a result"),
    RawRoute("/asample", submits.asample, schemas.SampleBody, "Draw samples or score a prompt"),
    RawRoute("/forward_backward", submits.forward_backward, schemas.TrainBody, "Accumulate gradients"),
    RawRoute("/session_heartbeat", sessions.session_heartbeat, schemas.SessionBody, "Keep a session alive"),
    RawRoute(
        "/optim_step", submits.model_operation(decode.optim_step), schemas.OptimStepBody, "Apply an optimizer step"
    ),
    RawRoute("/forward", submits.forward, schemas.TrainBody, "Loss without gradients (older SDKs)"),
    RawRoute("/create_custom_loss", submits.create_custom_loss, schemas.CreateCustomLossBody, "Keep a traced loss"),
    RawRoute(
        "/retrieve_futures", futures.retrieve_futures, schemas.RetrieveFuturesBody, "Wait for any of a client's samples"
    ),
    RawRoute("/cancel_future", futures.cancel_future, schemas.CancelFutureBody, "Give up a sample"),
    RawRoute("/save_weights", submits.model_operation(decode.save_weights), schemas.SaveWeightsBody, "Save the state"),
    RawRoute(
        "/save_weights_for_sampler",
        submits.model_operation(decode.save_weights_for_sampler),
        schemas.SaveWeightsForSamplerBody,
        "Publish weights for sampling",
    ),
    RawRoute(
        "/save_weights_external",
        submits.model_operation(decode.save_weights_external),
        schemas.SaveWeightsExternalBody,
        "Export weights for download",
    ),
    RawRoute("/load_weights", submits.load_weights, schemas.LoadNewModelBody, "Load a checkpoint"),
    RawRoute("/unload_model", submits.model_operation(decode.unload_model), schemas.UnloadBody, "End a model"),
)


def raw_routes() -> list[Route]:
    return [Route(PREFIX + raw.path, raw.endpoint, methods=["POST"], name=raw.path[1:]) for raw in RAW]


def routers() -> list[APIRouter]:
    """In this order: `/sessions/search` and what ends in a fixed word come before what takes any."""
    return [identity.router, admin.router, downloads.router, imports.router, sessions.router, checkpoints.router]
