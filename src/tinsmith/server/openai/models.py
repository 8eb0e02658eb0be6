"""`GET /v1/models`: base models and sampler checkpoints, in one form that OpenAI's and Anthropic's clients read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.server.chat.desk import CHECKPOINT_SCHEME
from tinsmith.server.chat.fields import BadField
from tinsmith.server.chat.routing import ERRORS, DialectRoute
from tinsmith.server.dialects import refuse
from tinsmith.server.errors import brief
from tinsmith.server.service import Service, ServiceDep
from tinsmith.types.errors import InvalidInput, NotFound, TinsmithError


class _EitherRoute(DialectRoute):
    def error_response(self, request: Request, error: TinsmithError) -> Response:
        return refuse(request.headers, request.url.path, error)


router = APIRouter(tags=["openai"], route_class=_EitherRoute, responses=ERRORS)

MOST_CHECKPOINTS = 1000


@router.get("/models")
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """Base models first, then named sampler checkpoints, the newest first."""
    models = [_entry(card.name, service.chat.started_at, card.max_context) for card in service.control.base_models()]
    checkpoints, _ = await service.control.library.list_user_checkpoints(MOST_CHECKPOINTS, 0, ["sampler_weights"])
    models += [_entry(checkpoint.tinker_path, checkpoint.time.timestamp(), None) for checkpoint in checkpoints]
    return {
        "object": "list",
        "data": models,
        "has_more": False,
        "first_id": models[0]["id"] if models else None,
        "last_id": models[-1]["id"] if models else None,
    }


@router.get("/models/{model:path}")
async def retrieve_model(model: str, service: ServiceDep) -> dict[str, Any]:
    for card in service.control.base_models():
        if card.name == model:
            return _entry(card.name, service.chat.started_at, card.max_context)
    if (path := _checkpoint_path(model)) is not None:
        return await _checkpoint(path, service)
    raise BadField("model", f"there is no model {brief(model)} on this server", code="model_not_found")


def _checkpoint_path(model: str) -> str | None:
    """Proxies and URL parsers write `tinker:/run` for `tinker://run`."""
    is_path = model.startswith(CHECKPOINT_SCHEME.rstrip("/") + "/")
    return CHECKPOINT_SCHEME + model.partition(":")[2].lstrip("/") if is_path else None


async def _checkpoint(path: str, service: Service) -> dict[str, Any]:
    try:
        row = await service.control.library.find_checkpoint(path)
    except (NotFound, InvalidInput) as error:
        raise BadField("model", error.message, code="model_not_found") from error
    return _entry(row.present_path, row.created_at, None)


def _entry(model: str, created_at: float, max_context: int | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": model,
        "object": "model",
        "created": int(created_at),
        "owned_by": "tinsmith",
        "type": "model",
        "display_name": model,
        "created_at": datetime.fromtimestamp(int(created_at), UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
    }
    return entry if max_context is None else entry | {"max_model_len": max_context, "max_input_tokens": max_context}
