"""The OpenAPI document beside the application it describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts

from tests.unit.server.tinker_client import Client, OpenServer

pytestmark = pytest.mark.anyio

UNDOCUMENTED = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/register_custom_loss"}
"""The documents themselves, and what exists only to say that it does not."""


async def document_of(client: Client) -> dict[str, Any]:
    return (await client.http.get("/openapi.json")).json()


def routes_of(app: Any) -> Iterator[tuple[str, set[str]]]:
    """Without those that only say that something is not supported."""
    for context in iter_route_contexts(app.routes):
        if getattr(context.endpoint, "__name__", "") == "refuse":
            continue
        yield context.path.replace(":path}", "}"), context.methods or set()


async def test_every_route_is_documented_with_its_methods(client: Client) -> None:
    document = await document_of(client)
    for path, methods in routes_of(client.app):
        if path in UNDOCUMENTED:
            continue
        told = {method.lower() for method in methods} - ({"head"} if "GET" in methods else set())
        assert told <= set(document["paths"][path]), path


async def test_every_operation_says_how_it_fails_and_has_a_name_of_its_own(client: Client) -> None:
    document = await document_of(client)
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names))
    for operation in operations:
        assert {"400", "4XX"} & set(operation["responses"]), operation["operationId"]
        assert {"500", "5XX"} & set(operation["responses"]), operation["operationId"]
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#/components/')[1:]}:
        kind, name = reference.split("/")
        assert name in document["components"][kind], reference


@pytest.mark.parametrize("path", ["forward", "forward_backward", "optim_step", "asample"])
async def test_a_shared_path_documents_both_dialects(client: Client, path: str) -> None:
    operation = (await document_of(client))["paths"][f"/api/v1/{path}"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert len(schema["anyOf"]) == 2
    assert "422" in operation["responses"]
    assert ("application/x-protobuf" in operation["requestBody"]["content"]) == (path == "forward_backward")


async def test_a_dialect_that_is_off_is_not_documented(open_server: OpenServer) -> None:
    async with open_server(dialects=["tinker"]) as client:
        document = await document_of(client)
        assert "/retrieve_future" not in document["paths"]
        assert "TrainingResult" not in document["components"]["schemas"]
        schema = document["paths"]["/api/v1/optim_step"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/OptimStepBody"}


async def test_a_body_schema_says_what_an_unknown_field_may_hold(client: Client) -> None:
    schema = (await document_of(client))["components"]["schemas"]["StepBody"]
    assert schema["additionalProperties"]["enum"] == [None, False, 0, "", [], {}, 0.0]
    answer = await client.http.post("/optim_step", json={"model_id": "m", "adam_params": {}, "new": 0})
    assert answer.status_code == 200
    answer = await client.http.post("/optim_step", json={"model_id": "m", "adam_params": {}, "new": 1})
    assert answer.status_code == 400


async def test_a_wrong_method_is_answered_with_all_methods_of_the_path(client: Client) -> None:
    answer = await client.http.patch("/api/v1/training_runs/r/checkpoints/weights/w/publish")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, POST")
