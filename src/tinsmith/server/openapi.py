"""The OpenAPI document: FastAPI's own, and the raw routes added to it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from tinsmith.server.tinker import PREFIX, RAW

_REF = "#/components/schemas/{model}"
_PROTOBUF_SCHEMA = {"type": "string", "format": "binary", "description": "tinker_public.ForwardBackwardRequest"}


def build_openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        _, definitions = models_json_schema([(raw.body, "validation") for raw in RAW], ref_template=_REF)
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components.update(definitions.get("$defs", {}))
        for raw in RAW:
            document["paths"][PREFIX + raw.path] = {"post": _operation(raw.path, raw.body.__name__, raw.summary)}
        app.openapi_schema = document
    return app.openapi_schema


def _operation(path: str, body: str, summary: str) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF.format(model=body)}}}
    if path == "/forward_backward":
        content["application/x-protobuf"] = {"schema": _PROTOBUF_SCHEMA}
    answers = {"200": {"description": "A receipt, or the result"}, "400": {"description": "A bad request, by name"}}
    if path == "/retrieve_future":
        answers["408"] = {"description": "No result yet; ask again"}
        answers["410"] = {"description": "The result is no longer kept"}
    return {
        "tags": ["futures" if "future" in path else "work"],
        "summary": summary,
        "operationId": path[1:],
        "requestBody": {"required": True, "content": content},
        "responses": answers,
    }
