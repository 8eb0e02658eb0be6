"""The dialect's part of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from tinsmith.server.tinker.schemas import Body
from tinsmith.server.tinkerbell import answers, schemas
from tinsmith.server.tinkerbell.dialect import HEADER
from tinsmith.server.tinkerbell.routes import OPERATIONS, Operation
from tinsmith.types.rest import GetInfoResponse

JSON = "application/json"

BODIES: tuple[type[Body], ...] = (
    *{operation.body: None for operation in OPERATIONS},
    schemas.AdapterBody,
    schemas.RetrieveBody,
)
ANSWERS: tuple[type[BaseModel], ...] = (
    answers.FutureReceipt,
    answers.PendingFuture,
    answers.JobFailure,
    *answers.ANY_RESULT,
    answers.Capabilities,
    answers.LossFunctions,
)
"""Beside `GetInfoResponse`, which Tinker's part of the document has."""

_KEY: dict[str, Any] = {
    "name": "X-API-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "Whose adapters; none is a key too",
}
_DIALECT: dict[str, Any] = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "enum": ["tinker", "tinkerbell"]},
    "description": "Whose request this is, where the body does not say",
}


def ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def answer(description: str, *models: type[BaseModel]) -> dict[str, Any]:
    schema = ref(models[0]) if len(models) == 1 else {"anyOf": [ref(model) for model in models]}
    return {"description": description, "content": {JSON: {"schema": schema}}}


def paths() -> dict[str, dict[str, Any]]:
    """Path to its `post` or `get`. On a path that Tinker has too, `beside_tinker` puts both together."""
    found = dict(_operations())
    found["/retrieve_future"] = {
        "post": _operation(
            "tinkerbell_retrieve_future",
            "The result of a future, or that there is none yet",
            schemas.RetrieveBody,
            {
                "200": answer("The result itself", *answers.ANY_RESULT),
                "202": answer("None yet", answers.PendingFuture),
                "500": answer("The request failed", answers.JobFailure),
            },
        )
    }
    info = _operation("tinkerbell_get_info", "An adapter", schemas.AdapterBody, {"200": answer("It", GetInfoResponse)})
    found["/get_info"] = {"post": info}
    found["/get_server_capabilities"] = {
        "get": _operation("tinkerbell_capabilities", "Base models", None, {"200": answer("They", answers.Capabilities)})
    }
    found["/list_loss_functions"] = {
        "get": _operation(
            "tinkerbell_losses", "Losses of this dialect", None, {"200": answer("They", answers.LossFunctions)}
        )
    }
    return found


def beside_tinker(tinker: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """One `post` that takes the bodies of both dialects and gives the answers of both."""
    both = {**tinker, "parameters": [*ours["parameters"], _DIALECT]}
    both["summary"] = f"{tinker['summary']}; for Tinkerbell: {ours['summary'].lower()}"
    theirs = tinker["requestBody"]["content"]
    bodies = [theirs[JSON]["schema"], ours["requestBody"]["content"][JSON]["schema"]]
    both["requestBody"] = {"required": True, "content": {**theirs, JSON: {"schema": {"anyOf": bodies}}}}
    both["responses"] = {**ours["responses"], **tinker["responses"]}
    results = [part["responses"]["200"]["content"][JSON]["schema"] for part in (tinker, ours)]
    both["responses"]["200"] = {
        "description": "A receipt, or for Tinkerbell the result",
        "content": {**tinker["responses"]["200"]["content"], JSON: {"schema": {"anyOf": results}}},
    }
    both["responses"]["422"] = {"$ref": "#/components/responses/Unclear"}
    return both


def _operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for operation in OPERATIONS:
        if operation.sync:
            yield operation.sync, {"post": _sync(operation)}
        yield operation.async_, {"post": _async(operation, operation.name + "_async")}
        if operation.legacy:
            yield operation.legacy, {"post": _async(operation, operation.name + "_legacy") | {"deprecated": True}}


def _sync(operation: Operation) -> dict[str, Any]:
    responses = {
        "200": answer("The result", answers.RESULTS[operation.name]),
        "500": answer("It failed", answers.JobFailure),
        "503": answer("The server is about to end; with a ledger, the next one has the future", answers.JobFailure),
        "504": answer("No result yet; fetch it with /retrieve_future", answers.JobFailure),
    }
    return _operation(f"tinkerbell_{operation.name}", operation.summary, operation.body, responses)


def _async(operation: Operation, name: str) -> dict[str, Any]:
    responses = {"200": answer("A receipt, at once", answers.FutureReceipt)}
    return _operation(f"tinkerbell_{name}", operation.summary, operation.body, responses)


def _operation(name: str, summary: str, body: type[Body] | None, responses: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": ["tinkerbell"],
        "summary": summary,
        "operationId": name,
        "parameters": [_KEY],
        "responses": responses,
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": ref(body)}}}
    return operation
