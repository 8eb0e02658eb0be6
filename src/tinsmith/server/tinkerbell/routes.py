"""The paths: most operations in a synchronous and an asynchronous form, some under an older name; one for results."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinsmith.control.futures import Outcome, Pending, result_bytes
from tinsmith.server.errors import error_response, json_response, new_incident, status_of
from tinsmith.server.service import ServerState, Service, service_of
from tinsmith.server.settings import TinkerbellSettings
from tinsmith.server.tinker import PREFIX, RAW
from tinsmith.server.tinker.decode import read
from tinsmith.server.tinker.schemas import Body
from tinsmith.server.tinkerbell import schemas
from tinsmith.server.tinkerbell.dialect import Endpoint, ParsedEndpoint, read_object, shared_path
from tinsmith.server.tinkerbell.making import FORWARD, SAMPLE, Making
from tinsmith.server.tinkerbell.memory import Memory, Owner
from tinsmith.server.tinkerbell.operations import Operations, Receipt
from tinsmith.server.tinkerbell.rendering import ModelTexts
from tinsmith.server.tinkerbell.results import PromptsSampled, result_of
from tinsmith.types.errors import TinsmithError
from tinsmith.types.results import SampleResponse

Start: TypeAlias = Callable[[Operations, Owner, Any], Awaitable[Receipt]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    name: str
    body: type[Body]
    start: Start
    sync: str | None = None
    """Path that answers with the result."""
    async_: str
    """Path that answers with a receipt at once."""
    legacy: str | None = None
    """An older name of the asynchronous path."""
    timeout: str = ""
    """The setting that says how long the synchronous path waits."""
    summary: str


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="forward",
        body=schemas.ForwardBody,
        start=Operations.forward,
        sync=f"{PREFIX}/forward",
        async_=f"{PREFIX}/forward_async",
        legacy="/fwd",
        timeout="forward_timeout_s",
        summary="Loss of conversations, without gradients",
    ),
    Operation(
        name="forward_backward",
        body=schemas.ForwardBody,
        start=Operations.forward_backward,
        sync=f"{PREFIX}/forward_backward",
        async_=f"{PREFIX}/forward_backward_async",
        legacy="/fwdbwd",
        timeout="forward_backward_timeout_s",
        summary="Loss and gradients of conversations; gradients add up until optim_step",
    ),
    Operation(
        name="optim_step",
        body=schemas.StepBody,
        start=Operations.optim_step,
        sync=f"{PREFIX}/optim_step",
        async_=f"{PREFIX}/optim_step_async",
        legacy="/optim_step",
        timeout="optim_step_timeout_s",
        summary="One AdamW step",
    ),
    Operation(
        name="add_lora",
        body=schemas.AddLoraBody,
        start=Operations.add_lora,
        sync=f"{PREFIX}/add_lora",
        async_=f"{PREFIX}/add_lora_async",
        legacy="/add_lora",
        timeout="lora_timeout_s",
        summary="Make an adapter",
    ),
    Operation(
        name="remove_lora",
        body=schemas.AdapterBody,
        start=Operations.remove_lora,
        sync=f"{PREFIX}/remove_lora",
        async_=f"{PREFIX}/remove_lora_async",
        legacy="/remove_lora",
        timeout="lora_timeout_s",
        summary="End an adapter after what it still has to do",
    ),
    Operation(
        name="sample",
        body=schemas.PromptsBody,
        start=Operations.sample,
        sync=f"{PREFIX}/sample",
        async_=f"{PREFIX}/asample",
        timeout="sample_timeout_s",
        summary="Complete prompts",
    ),
    Operation(
        name="save_weights",
        body=schemas.SaveBody,
        start=Operations.save_weights,
        async_=f"{PREFIX}/save_weights_async",
        legacy="/save_weights",
        summary="Save weights and optimizer under a name",
    ),
    Operation(
        name="save_weights_for_sampler",
        body=schemas.SaveBody,
        start=Operations.save_weights_for_sampler,
        async_=f"{PREFIX}/save_weights_for_sampler_async",
        legacy="/save_weights_for_sampler",
        summary="Save weights for sampling under a name",
    ),
    Operation(
        name="load_weights",
        body=schemas.LoadBody,
        start=Operations.load_weights,
        async_=f"{PREFIX}/load_weights_async",
        legacy="/load_weights",
        summary="Overwrite an adapter with saved weights",
    ),
)

LOSS_FUNCTIONS = ("cross_entropy", "importance_sampling")


def routes(state: ServerState) -> list[Route]:
    """None if the dialect is switched off. They must come before those of the Tinker dialect, with which they share
    four paths."""
    if "tinkerbell" not in state.settings.dialects:
        return []
    desk = _Desk(state)
    found = [
        Route("/retrieve_future", desk.retrieve_future, methods=["POST"]),
        Route("/get_info", desk.get_info, methods=["POST"]),
        Route("/get_server_capabilities", desk.get_server_capabilities, methods=["GET"]),
        Route("/list_loss_functions", desk.list_loss_functions, methods=["GET"]),
        Route("/register_custom_loss", desk.register_custom_loss, methods=["POST"]),
    ]
    for operation in OPERATIONS:
        paths = {operation.sync: desk.sync_endpoint(operation), operation.async_: desk.async_endpoint(operation)}
        paths[operation.legacy] = desk.async_endpoint(operation)
        found += [Route(path, _alone_or_shared(path, own), methods=["POST"]) for path, own in paths.items() if path]
    return found


def _alone_or_shared(path: str, own: ParsedEndpoint) -> Endpoint:
    for raw in RAW:
        if PREFIX + raw.path == path:
            return shared_path(raw.endpoint, own)

    async def route(request: Request) -> Response:
        try:
            fields = await read_object(request)
        except TinsmithError as error:
            return error_response(error)
        return await own(request, fields)

    return route


def listing() -> dict[str, Any]:
    """Every path, as `GET /` shows it."""
    return {
        "sync": {operation.name: operation.sync for operation in OPERATIONS if operation.sync},
        "async": {operation.name: operation.async_ for operation in OPERATIONS},
        "legacy": {operation.name: operation.legacy for operation in OPERATIONS if operation.legacy},
        "futures": {"retrieve": "/retrieve_future"},
        "about": {
            "health": "/healthz",
            "capabilities": "/get_server_capabilities",
            "info": "/get_info",
            "loss_functions": "/list_loss_functions",
        },
    }


class _Desk:
    """The endpoints of one server."""

    def __init__(self, state: ServerState) -> None:
        self._settings: TinkerbellSettings = state.settings.tinkerbell
        self._texts = ModelTexts(state.control.base_models)
        self._memory = Memory(state.take_memos, lambda: state.first_number)
        making = Making(state.background, self._memory, self._texts)
        state.teach(FORWARD, making.forward)
        state.teach(SAMPLE, making.sample)

    def _operations(self, service: Service) -> Operations:
        """One for all requests of a caller: it remembers the caller's adapters."""
        return service.keep(Operations, lambda: Operations(service.control, self._settings, self._texts, self._memory))

    # ---- operations ----

    def async_endpoint(self, operation: Operation) -> ParsedEndpoint:
        async def endpoint(request: Request, fields: Mapping[str, Any]) -> Response:
            try:
                receipt = await self._start(operation, request, fields)
            except TinsmithError as error:
                return error_response(error)
            made = {"created": True} if receipt.created else {}
            return json_response({"request_id": receipt.request_id, "model_id": receipt.model} | made)

        return endpoint

    def sync_endpoint(self, operation: Operation) -> ParsedEndpoint:
        async def endpoint(request: Request, fields: Mapping[str, Any]) -> Response:
            service = service_of(request)
            try:
                receipt = await self._start(operation, request, fields)
                hold_s: float = getattr(self._settings, operation.timeout)
                state = await service.poll(request, receipt.request_id, hold_s)
            except TinsmithError as error:
                return error_response(error)
            if isinstance(state, Pending):
                return self._late(service, receipt.request_id, hold_s, state)
            if state.error is not None:
                return _failed(state.error, receipt.request_id)
            return await self._finished(request, state)

        return endpoint

    async def _start(self, operation: Operation, request: Request, fields: Mapping[str, Any]) -> Receipt:
        service = service_of(request)
        operations = self._operations(service)
        size = int(request.headers.get("content-length", "0"))
        body = await service.codecs.run(size, lambda: read(operation.body, fields))
        owner = await operations.book.owner(request)
        receipt = await operation.start(operations, owner, body)
        await operations.durable(receipt)
        return receipt

    def _late(self, service: Service, request_id: str, hold_s: float, state: Pending) -> Response:
        if service.is_draining:
            return json_response({"detail": "the server is about to end", "request_id": request_id}, 503)
        why = "" if state.reason is None else f" ({state.reason})"
        detail = f"no result after {hold_s:g} s{why}; fetch it later with POST /retrieve_future"
        return json_response({"detail": detail, "request_id": request_id}, 504)

    # ---- futures ----

    async def retrieve_future(self, request: Request) -> Response:
        """At once: 202 while there is no result, 200 with it, 500 if the request failed."""
        try:
            body = read(schemas.RetrieveBody, await read_object(request))
            state = await service_of(request).control.wait_future(body.request_id, 0)
        except TinsmithError as error:
            return error_response(error)
        if isinstance(state, Pending):
            return json_response({"status": "pending"}, 202)
        if state.error is not None:
            return json_response({"detail": _job_failed(state.error)}, 500)
        return await self._finished(request, state)

    async def _finished(self, request: Request, outcome: Outcome) -> Response:
        service = service_of(request)
        try:
            outcome = await self._with_text(service, outcome)
            size, backend = result_bytes(outcome.result), self._operations(service).backend
            return await service.codecs.run(size, lambda: json_response(result_of(outcome, backend)))
        except TinsmithError as error:
            return json_response({"detail": _job_failed(error)}, 500)
        except Exception as error:  # noqa: BLE001 - a result that cannot be written is a failed request
            incident = new_incident(error, path=request.url.path, request_type=outcome.request_type)
            return json_response({"detail": _job_failed(incident)}, 500)

    async def _with_text(self, service: Service, outcome: Outcome) -> Outcome:
        """Samples that another dialect asked for, with their completions."""
        response = outcome.result
        if not isinstance(response, SampleResponse) or isinstance(response, PromptsSampled) or outcome.subject is None:
            return outcome
        text = await self._texts.of(service.control.get_sampler(outcome.subject).base_model)
        completions = await text.run(lambda: [text.decode(sequence.tokens) for sequence in response.sequences])
        scores = response.prompt_logprobs
        told = PromptsSampled(
            sequences=response.sequences,
            completions=completions,
            logprobs_of_prompts=None if scores is None else [scores],
        )
        return replace(outcome, result=told)

    # ---- what there is ----

    async def get_info(self, request: Request) -> Response:
        try:
            body = read(schemas.AdapterBody, await read_object(request))
            service = service_of(request)
            owner = await self._operations(service).book.owner(request)
            adapter = owner.adapters.get(body.model_id)
            info = service.control.model_info(adapter.model_id if adapter else body.model_id)
        except TinsmithError as error:
            return error_response(error)
        return json_response(info.model_dump(exclude_none=True) | {"model_id": body.model_id})

    async def get_server_capabilities(self, request: Request) -> Response:
        service = service_of(request)
        cards = service.control.base_models()
        models = [{"model_id": card.name, "model_name": card.name, "arch": card.architecture} for card in cards]
        return json_response({"supported_models": models, "backend": self._operations(service).backend})

    async def list_loss_functions(self, request: Request) -> Response:
        return json_response({"available_loss_functions": LOSS_FUNCTIONS})

    async def register_custom_loss(self, request: Request) -> Response:
        """Its body is a pickled function: reading one runs whatever it holds."""
        detail = (
            "POST /register_custom_loss is not supported: a pickled function could do anything on this machine; "
            "a Tinker client traces the function instead (forward_backward_custom)"
        )
        return json_response({"detail": detail}, 400)


def _failed(error: TinsmithError, request_id: str) -> Response:
    """A synchronous request that failed: the status of its error, and the future it stays under."""
    status = status_of(error)
    detail = _job_failed(error) if status == 500 else error.message
    return json_response({"detail": detail, "request_id": request_id}, status)


def _job_failed(error: TinsmithError) -> str:
    return f"Job failed: {error.message or repr(error)}"
