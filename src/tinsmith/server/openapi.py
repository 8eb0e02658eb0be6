"""The OpenAPI document: FastAPI's own, the raw routes of the dialects, and the errors that any route may answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from tinsmith.server.auth import LINKED_PATHS, OPEN_PATHS
from tinsmith.server.service import ServerState
from tinsmith.server.tinker import PREFIX, RAW
from tinsmith.server.tinkerbell import documents
from tinsmith.wire.tinker_proto import CONTENT_TYPE as PROTOBUF

JSON = "application/json"
_REF = "#/components/schemas/{model}"
_BINARY = {"schema": {"type": "string", "format": "binary"}}

_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["detail"],
        "properties": {
            "detail": {"type": "string", "description": "Field and value, and what to do"},
            "request_id": {"type": "string", "description": "Of the future, where there is one"},
        },
    },
    "Receipt": {
        "type": "object",
        "required": ["request_id"],
        "properties": {
            "request_id": {"type": "string"},
            "model_id": {"type": "string"},
            "sample_sequence_ids": {"type": "array", "items": {"type": "string"}},
        },
    },
    "TryAgain": {
        "type": "object",
        "required": ["type", "request_id", "queue_state"],
        "properties": {
            "type": {"const": "try_again"},
            "request_id": {"type": "string"},
            "queue_state": {"enum": ["active", "paused_capacity", "paused_rate_limit"]},
            "queue_state_reason": {"type": "string"},
        },
    },
}

_ERRORS: dict[str, tuple[str, str]] = {
    "400": ("BadRequest", "A field that cannot be served, by name"),
    "401": ("Unauthorized", "This server asks for a key, and this one is missing, unknown, expired or revoked"),
    "403": (
        "Forbidden",
        "The key is not for this; or a server without keys was asked by a name that is not its own; "
        "or a link was changed or has expired",
    ),
    "404": ("Missing", "There is no such thing, or it is another's"),
    "410": ("Gone", "It has ended or is no longer kept"),
    "413": ("TooLarge", "The body is larger than this server takes"),
    "429": ("Busy", "Too much is waiting; try again later"),
    "500": ("Fault", "The request was fine, the server is not"),
}
_UNCLEAR = ("Unclear", "The body fits neither of the dialects that share this path")

_ANSWERS: dict[str, dict[str, Any]] = {
    "/retrieve_future": {"type": "object", "description": "The result, or `error` and `category` if it failed"},
    "/retrieve_futures": {"type": "object"},
    "/session_heartbeat": {"type": "object"},
    "/cancel_future": {"type": "object"},
}
"""Of raw Tinker routes that answer something else than a receipt."""


_SECURITY: dict[str, Any] = {
    "Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer"},
}
"""A server without keys takes any and none."""


def build_openapi(app: FastAPI) -> dict[str, Any]:
    """Built once, and kept."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        state: ServerState = app.state.service
        _add_raw_routes(document, with_tinkerbell="tinkerbell" in state.settings.dialects)
        _add_errors(document)
        _add_security(document)
        app.openapi_schema = document
    return app.openapi_schema


def _add_raw_routes(document: dict[str, Any], *, with_tinkerbell: bool) -> None:
    paths = document["paths"]
    models: list[tuple[Any, Any]] = [(raw.body, "validation") for raw in RAW]
    for raw in RAW:
        paths[PREFIX + raw.path] = {"post": _tinker_operation(raw.path, raw.body.__name__, raw.summary)}
    if with_tinkerbell:
        models += [(body, "validation") for body in documents.BODIES]
        models += [(answer, "validation") for answer in documents.ANSWERS]
        for path, item in documents.paths().items():
            if path in paths:
                item = {"post": documents.beside_tinker(paths[path]["post"], item["post"])}
            paths[path] = item
    _, definitions = models_json_schema(list(dict.fromkeys(models)), ref_template=_REF)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in definitions.get("$defs", {}).items():
        if schemas.setdefault(name, schema) != schema:
            raise AssertionError(f"two schemas are named {name!r}")
    for model, _ in models:
        if model.__name__ not in schemas:
            raise AssertionError(f"the name {model.__name__!r} is taken by another schema")


def _tinker_operation(path: str, body: str, summary: str) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": {"$ref": _REF.format(model=body)}}}
    answer: dict[str, Any] = {JSON: {"schema": _ANSWERS.get(path, {"$ref": _REF.format(model="Receipt")})}}
    responses: dict[str, Any] = {"200": {"description": "A receipt, or the result", "content": answer}}
    if path == "/forward_backward":
        content[PROTOBUF] = _BINARY | {"x-message": "tinker_public.ForwardBackwardRequest"}
    if path == "/retrieve_future":
        answer[PROTOBUF] = _BINARY
        again = {JSON: {"schema": {"$ref": _REF.format(model="TryAgain")}}}
        responses["408"] = {"description": "No result yet; ask again", "content": again}
    return {
        "tags": ["futures" if "future" in path else "work"],
        "summary": summary,
        "operationId": path[1:],
        "requestBody": {"required": True, "content": content},
        "responses": responses,
    }


def _add_errors(document: dict[str, Any]) -> None:
    """To every operation that does not say itself how its errors look. FastAPI's own 422 is a 400 here."""
    components = document["components"]
    components["schemas"].update(_SCHEMAS)
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    error = {JSON: {"schema": {"$ref": _REF.format(model="Error")}}}
    components["responses"] = {
        name: {"description": description, "content": error} for name, description in (*_ERRORS.values(), _UNCLEAR)
    }
    for operation in _operations(document):
        responses = operation["responses"]
        if "HTTPValidationError" in str(responses.get("422")):
            del responses["422"]
        for status, (name, _) in _ERRORS.items():
            if f"{status[0]}XX" not in responses:
                responses.setdefault(status, {"$ref": f"#/components/responses/{name}"})


def _add_security(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = _SECURITY
    document["security"] = [{name: []} for name in _SECURITY]
    for path, item in document["paths"].items():
        if path in OPEN_PATHS or path.startswith(LINKED_PATHS):
            for operation in item.values():
                operation["security"] = []


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for item in document["paths"].values():
        yield from (
            operation for method, operation in item.items() if method in ("get", "head", "post", "put", "delete")
        )
