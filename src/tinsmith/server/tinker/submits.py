"""Raw routes that put work into a queue: the busy ones, without the cost of schemas and dependencies.

Every answer is a receipt, at once and in any order of arrival. Faults of the content travel through the future.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from tinsmith.control import requests as ask
from tinsmith.server.bodies import expand, fingerprint, parse_json_object
from tinsmith.server.errors import error_response, json_response, new_incident
from tinsmith.server.service import Service, service_of
from tinsmith.server.tinker import decode
from tinsmith.server.tinker.legible import head_of, ids_in_json, ids_in_protobuf, ids_in_sample
from tinsmith.types.errors import InvalidInput, TinsmithError

JsonDecoder: TypeAlias = Callable[[Mapping[str, Any]], ask.ModelRequest]


async def forward_backward(request: Request) -> Response:
    return await _train(request, forward_only=False)


async def forward(request: Request) -> Response:
    """Only older SDKs use this path; newer ones set `forward_only` in the protobuf body."""
    return await _train(request, forward_only=True)


async def _train(request: Request, *, forward_only: bool) -> Response:
    service = service_of(request)
    body = await request.body()
    is_protobuf = "protobuf" in request.headers.get("content-type", "")

    def work() -> tuple[ask.ModelRequest, bytes]:
        if is_protobuf:
            return _read_protobuf(request, body, service.settings.max_expanded_bytes)
        return _read_json(
            request, body, service, lambda fields: decode.train_from_json(fields, forward_only=forward_only)
        )

    return await _submit(request, body, work)


def _read_protobuf(request: Request, body: bytes, max_bytes: int) -> tuple[ask.ModelRequest, bytes]:
    """The decoded request, or a `Rejected` one if at least its ids can be read."""
    try:
        content = expand(request, body, max_bytes=max_bytes)
        return decode.train_from_protobuf(content), fingerprint("train", content)
    except Exception as error:
        ids = ids_in_protobuf(head_of(body, request.headers.get("content-encoding", "")))
        if ids is None:
            raise _as_tinsmith_error(error, request) from error
        rejected = ask.Rejected(model_id=ids[0], seq_id=ids[1], error=_as_tinsmith_error(error, request))
        return rejected, fingerprint("train", body)


def _read_json(request: Request, body: bytes, service: Service, decoder: JsonDecoder) -> tuple[ask.ModelRequest, bytes]:
    content = expand(request, body, max_bytes=service.settings.max_expanded_bytes)
    return _read_fields(request, content, parse_json_object(content), decoder)


def _read_fields(
    request: Request, content: bytes, fields: Mapping[str, Any], decoder: JsonDecoder
) -> tuple[ask.ModelRequest, bytes]:
    """As `_read_protobuf`."""
    digest = fingerprint(request.url.path, _identity_of(content, fields))
    try:
        return decoder(fields), digest
    except Exception as error:
        ids = ids_in_json(fields)
        if ids is None:
            raise _as_tinsmith_error(error, request) from error
        return ask.Rejected(model_id=ids[0], seq_id=ids[1], error=_as_tinsmith_error(error, request)), digest


_DRAWN_ANEW = "sampling_session_seq_id"
"""The official SDK takes another of these numbers when it sends a request for an unnamed sampler again."""


def _identity_of(content: bytes, fields: Mapping[str, Any]) -> bytes:
    """What must be the same if a request is sent again. The first one's number is the sampler's."""
    if _DRAWN_ANEW not in fields:
        return content
    rest = {name: value for name, value in fields.items() if name != _DRAWN_ANEW}
    return json.dumps(rest, sort_keys=True, default=repr).encode()


def _as_tinsmith_error(error: Exception, request: Request) -> TinsmithError:
    if isinstance(error, TinsmithError):
        return error
    return new_incident(error, method=request.method, path=request.url.path)


async def _submit(request: Request, body: bytes, work: Callable[[], tuple[ask.ModelRequest, bytes]]) -> Response:
    service = service_of(request)
    try:
        asked, digest = await service.codecs.decode(request, body, work)
        receipt = service.control.submit(asked, digest)
        await service.control.durable(receipt)
    except TinsmithError as error:
        return error_response(error)
    return receipt_response(receipt)


def receipt_response(receipt: ask.Submission) -> Response:
    fields: dict[str, Any] = {"request_id": receipt.request_id}
    if receipt.model_id is not None:
        fields["model_id"] = receipt.model_id
    return json_response(fields)


def model_operation(decoder: JsonDecoder) -> Callable[[Request], Any]:
    """The route of an operation on one model whose body is JSON."""

    async def route(request: Request) -> Response:
        service = service_of(request)
        body = await request.body()
        return await _submit(request, body, lambda: _read_json(request, body, service, decoder))

    return route


async def load_weights(request: Request) -> Response:
    """Into a live model (`model_id`, `seq_id`), or as a new one (`session_id`, `model_seq_id`)."""
    service = service_of(request)
    body = await request.body()

    def work() -> tuple[bytes, dict[str, Any]]:
        content = expand(request, body, max_bytes=service.settings.max_expanded_bytes)
        return content, parse_json_object(content)

    try:
        content, fields = await service.codecs.decode(request, body, work)
        if "model_seq_id" not in fields:
            receipt = service.control.submit(*_read_fields(request, content, fields, decode.load_into_model))
        elif fields.get("seq_id") is not None:
            raise InvalidInput("give either model_id and seq_id (load into a model) or session_id and model_seq_id")
        else:
            receipt = await service.control.create_model_from_checkpoint(decode.load_new_model(fields))
        await service.control.durable(receipt)
    except TinsmithError as error:
        return error_response(error)
    return receipt_response(receipt)


async def create_custom_loss(request: Request) -> Response:
    service = service_of(request)
    body = await request.body()

    def work() -> tuple[ask.CreateCustomLoss, bytes]:
        content = expand(request, body, max_bytes=service.settings.max_expanded_bytes)
        return decode.create_custom_loss(parse_json_object(content)), fingerprint("create_custom_loss", content)

    try:
        asked, digest = await service.codecs.decode(request, body, work)
        receipt = service.control.create_custom_loss(asked, digest)
        await service.control.durable(receipt)
    except TinsmithError as error:
        return error_response(error)
    return receipt_response(receipt)


async def asample(request: Request) -> Response:
    service = service_of(request)
    body = await request.body()

    def work() -> tuple[ask.SampleRequest, bytes]:
        content = expand(request, body, max_bytes=service.settings.max_expanded_bytes)
        return _read_sample(request, content), fingerprint("asample", content)

    try:
        asked, digest = await service.codecs.decode(request, body, work)
        receipt = service.control.submit_sample(asked, digest)
        await service.control.durable(receipt)
    except TinsmithError as error:
        return error_response(error)
    return json_response({"request_id": receipt.request_id, "sample_sequence_ids": receipt.sample_sequence_ids})


def _read_sample(request: Request, content: bytes) -> ask.SampleRequest:
    fields = parse_json_object(content)
    try:
        return decode.sample(fields)
    except Exception as error:
        ids = ids_in_sample(fields)
        if ids is None:
            raise _as_tinsmith_error(error, request) from error
        session_id, seq_id, num_samples = ids
        return ask.RejectedSample(
            sampling_session_id=session_id,
            seq_id=seq_id,
            num_samples=num_samples,
            error=_as_tinsmith_error(error, request),
        )
