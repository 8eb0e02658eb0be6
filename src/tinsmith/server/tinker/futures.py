"""`retrieve_future`, the busiest route, and `cancel_future`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tinsmith.control.completions import Completion
from tinsmith.control.futures import Outcome, Pending, result_bytes
from tinsmith.server.bodies import parse_json_object
from tinsmith.server.errors import error_response, json_response, new_incident
from tinsmith.server.service import Service, service_of
from tinsmith.server.tinker.decode import read
from tinsmith.server.tinker.results import encode_failure, encode_result
from tinsmith.server.tinker.schemas import CancelFutureBody, RetrieveFutureBody, RetrieveFuturesBody
from tinsmith.types.errors import TinsmithError


async def retrieve_future(request: Request) -> Response:
    """Hold the request until there is a result; after the hold time 408 says "ask again".

    A failed request is a success here: 200 with `error` and `category`. A client sends 5xx again at once and without
    end, so a fault of ours while encoding is a failed request too.
    """
    service = service_of(request)
    try:
        body = read(RetrieveFutureBody, parse_json_object(await request.body()))
        state = await service.poll(request, body.request_id)
    except TinsmithError as error:
        return error_response(error)
    if isinstance(state, Pending):
        return _pending(body.request_id, state)
    if state.error is not None:
        return Response(encode_failure(state), media_type="application/json")
    try:
        return await _result(service, request, body, state)
    except Exception as error:  # noqa: BLE001 - see above
        incident = new_incident(error, path=request.url.path, request_type=state.request_type)
        return json_response({"error": incident.message, "category": incident.category})


def _pending(request_id: str, state: Pending) -> Response:
    fields = {"type": "try_again", "request_id": request_id, "queue_state": state.queue_state}
    if state.reason is not None:
        fields["queue_state_reason"] = state.reason
    return json_response(fields, 408)


async def _result(service: Service, request: Request, body: RetrieveFutureBody, outcome: Outcome) -> Response:
    accept = request.headers.get("accept", "")
    content_type, content = await service.codecs.run(
        result_bytes(outcome.result), lambda: encode_result(outcome, accept)
    )
    if body.allow_metadata_only and len(content) > service.settings.metadata_only_bytes:
        return json_response(
            {"status": "complete_metadata", "request_id": body.request_id, "response_payload_size": len(content)}
        )
    return Response(content, media_type=content_type)


async def retrieve_futures(request: Request) -> Response:
    """Which samples of one client have ended since its cursor; held while there are none.

    A client gives up for good on any other error than 408, 409, 429 and 5xx.
    """
    service = service_of(request)
    try:
        body = read(RetrieveFuturesBody, parse_json_object(await request.body()))
        sampler_id, client = body.target.sampling_session_id, body.target.cloned_sampler_id
        service.control.release_samples(sampler_id, client, body.retrieved_request_ids)
        hold_s = (
            service.settings.poll_hold_s if body.timeout is None else min(body.timeout, service.settings.poll_hold_s)
        )
        completions, cursor = await service.poll_completions(request, sampler_id, client, body.prev_cursor, hold_s)
    except TinsmithError as error:
        return error_response(error)
    return json_response({"completions": [_completion(found) for found in completions], "cursor": cursor})


def _completion(found: Completion) -> dict[str, Any]:
    if found.has_failed:
        return {"state": "failed", "request_id": found.request_id}
    return {
        "state": "finished",
        "request_id": found.request_id,
        "response_payload_uncompressed_size": found.num_bytes,
    }


async def cancel_future(request: Request) -> Response:
    try:
        body = read(CancelFutureBody, parse_json_object(await request.body()))
        service_of(request).control.cancel(body.request_id)
    except TinsmithError as error:
        return error_response(error)
    return json_response({})
