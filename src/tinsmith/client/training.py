"""`TrainingClient`: one adapter being trained.

Every call takes its sequence numbers when it is made, so calls take effect in the order of the program, whichever
threads and tasks they come from. Call k+1 is sent once call k has been acknowledged, not once it has finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel

from tinsmith.client import custom_loss
from tinsmith.client.batches import TrainChunk, encode_pieces, merge_outputs, split, split_like
from tinsmith.client.connection import Connection
from tinsmith.client.errors import APIConnectionError
from tinsmith.client.events import Events, Span
from tinsmith.client.futures import APIFuture, ClientFuture, future_twin, value_twin, warn_deprecated
from tinsmith.client.http import PROTO_TYPE, Call, json_bytes
from tinsmith.client.models import EphemeralSampler
from tinsmith.client.polling import QueueStateLog
from tinsmith.client.retries import RetryConfig
from tinsmith.client.sampling import SamplingClient, open_sampling_client
from tinsmith.client.tokenizer import Tokenizer, load_tokenizer
from tinsmith.client.turns import SubmitLine, Turn
from tinsmith.types.datum import Datum, EncodedTextChunk
from tinsmith.types.params import AdamParams, DimuonParams, OptimParams, SamplingClientKind
from tinsmith.types.replies import SaveWeightsExternalResponse, UntypedAPIFuture
from tinsmith.types.rest import (
    GetInfoResponse,
    LoadWeightsResponse,
    SavedWeights,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from tinsmith.types.results import ForwardBackwardOutput, OptimStepResponse
from tinsmith.wire.tinker_json import decode_forward_backward_output_json
from tinsmith.wire.tinker_proto import decode_forward_backward_output

M = TypeVar("M", bound=BaseModel)


class TrainingClient:
    """Train one model. Made by the `create_…` methods of `ServiceClient`; safe to use from several threads.

    Operations return at once with an `APIFuture`; results may be awaited in any order. A failed operation fails its
    own future and leaves the client usable.
    """

    def __init__(self, connection: Connection, model_id: str, info: GetInfoResponse) -> None:
        self.model_id = model_id
        self._connection = connection
        self._info = info
        self._line = SubmitLine()
        self._queue_log = QueueStateLog(f"training of {model_id}")

    def __repr__(self) -> str:
        return f"<TrainingClient {self.model_id} of {self._connection.config.base_url}>"

    # ---- training ----

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Log-probabilities and loss, without gradients."""
        return self._connection.begin(lambda: self._begin_pass(data, loss_fn, loss_fn_config, forward_only=True))

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradients of `data` to those gathered since the last `optim_step`.

        `data` may have any length; it travels in as many requests as the server's limits ask for. If one of them
        fails, the future fails and names it, and the gradients of the others stay.
        """
        return self._connection.begin(lambda: self._begin_pass(data, loss_fn, loss_fn_config, forward_only=False))

    def forward_backward_custom(
        self,
        data: Sequence[Datum],
        loss_fn: custom_loss.CustomLoss | custom_loss.LossHandle,
        *,
        loss_type_input: str | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """As `forward_backward`, with a loss of your own, computed here.

        The function gets the datums and, for each, a tensor of target log-probabilities (`[N]` or `[N, K]`) that
        requires gradients; it returns `(loss, metrics)`. It runs in a thread of its own, between a forward pass and
        a backward pass with weights `-dloss/dlogprobs`. Metrics: yours, `loss:sum` (your loss) and
        `surrogate_loss:sum` (the linear loss that carried its gradient).
        """
        if loss_type_input not in (None, "logprobs"):
            raise ValueError(f"loss_type_input must be 'logprobs', not {loss_type_input!r}")
        return self._connection.begin(lambda: self._begin_custom(data, loss_fn))

    def optim_step(
        self, optim_params: OptimParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """One optimizer step with the gathered gradients, which it consumes."""

        def prepare() -> Coroutine[Any, Any, OptimStepResponse]:
            if (optim_params is None) == (adam_params is None):
                raise ValueError("optim_step takes exactly one of optim_params and adam_params")
            params = optim_params if optim_params is not None else adam_params
            match params:
                case AdamParams():
                    body = {"adam_params": params.model_dump()}
                case DimuonParams():
                    body = {"optimizer_params": params.model_dump()}
                case _:
                    raise ValueError(f"optim_params must be AdamParams or DimuonParams, not {params!r}")
            return self._operation("optim_step", "OptimStep", body, OptimStepResponse)

        return self._connection.begin(prepare)

    # ---- weights ----

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """A checkpoint with optimizer state, to continue from."""
        body = {"path": name, "ttl_seconds": ttl_seconds, "overwrite": overwrite, "user_metadata": user_metadata}
        return self._connection.begin(lambda: self._operation("save_weights", "SaveWeights", body, SaveWeightsResponse))

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """A named checkpoint to sample from."""
        body = {"path": name, "kind": "snapshot", "ttl_seconds": ttl_seconds, "user_metadata": user_metadata}
        return self._connection.begin(
            lambda: self._operation(
                "save_weights_for_sampler", "SaveWeightsForSampler", body, SaveWeightsForSamplerResponse
            )
        )

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """An export of the adapter in PEFT layout."""
        body = {"path": name, "ttl_seconds": ttl_seconds, "age_encryption_recipients": age_encryption_recipients}
        return self._connection.begin(
            lambda: self._operation("save_weights_external", "SaveWeightsExternal", body, SaveWeightsExternalResponse)
        )

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> ClientFuture[SamplingClient]:
        """A sampler of the weights as they are after the calls made so far. `name` is not used: nothing is stored."""
        del name

        def prepare() -> Coroutine[Any, Any, SamplingClient]:
            body = {"sampling_session_seq_id": next(self._connection.sampling_session_seq_ids), "kind": kind}
            save = self._operation("save_weights_for_sampler", "SaveWeightsForSampler", body, EphemeralSampler)
            return self._sampler_of(save, retry_config, record_stability_info)

        return ClientFuture.of(self._connection.begin(prepare))

    def create_sampling_client(
        self, model_path: str, retry_config: RetryConfig | None = None, record_stability_info: bool = False
    ) -> ClientFuture[SamplingClient]:
        """A sampler of a saved checkpoint."""
        return ClientFuture.of(
            self._connection.begin(
                lambda: open_sampling_client(
                    self._connection,
                    model_path=model_path,
                    base_model=None,
                    retry_config=retry_config,
                    record_stability_info=record_stability_info,
                )
            )
        )

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Deprecated: prefer `ServiceClient.create_training_client_from_state`. The optimizer starts anew."""
        warn_deprecated("load_state() is deprecated: use ServiceClient.create_training_client_from_state()")
        return self._load(path, weights_access_token, optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Deprecated: prefer `ServiceClient.create_training_client_from_state_with_optimizer`."""
        warn_deprecated(
            "load_state_with_optimizer() is deprecated: "
            "use ServiceClient.create_training_client_from_state_with_optimizer()"
        )
        return self._load(path, weights_access_token, optimizer=True)

    # ---- about the model ----

    def get_info(self) -> GetInfoResponse:
        return self._info

    async def get_info_async(self) -> GetInfoResponse:
        return self._info

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, from transformers."""
        return load_tokenizer(self._info.model_data.tokenizer_id, self._base_model)

    def get_console_url(self) -> str:
        """Where the server shows its pages."""
        return self._connection.config.base_url

    def get_telemetry(self) -> Events:
        """Where this client's events go."""
        return self._connection.link.events

    forward_async = future_twin(forward)
    forward_backward_async = future_twin(forward_backward)
    forward_backward_custom_async = future_twin(forward_backward_custom)
    optim_step_async = future_twin(optim_step)
    save_state_async = future_twin(save_state)
    save_weights_for_sampler_async = future_twin(save_weights_for_sampler)
    save_weights_external_async = future_twin(save_weights_external)
    save_weights_and_get_sampling_client_async = value_twin(save_weights_and_get_sampling_client)
    create_sampling_client_async = value_twin(create_sampling_client)
    load_state_async = future_twin(load_state)
    load_state_with_optimizer_async = future_twin(load_state_with_optimizer)

    @property
    def _base_model(self) -> str | None:
        return self._info.model_data.model_name or self._info.model_name

    # ---- JSON operations ----

    def _load(self, path: str, token: str | None, *, optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        body = {"path": path, "optimizer": optimizer, "weights_access_token": token}
        return self._connection.begin(lambda: self._operation("load_weights", "LoadWeights", body, LoadWeightsResponse))

    def _operation(
        self, path: str, request_type: str, fields: Mapping[str, Any], model: type[M]
    ) -> Coroutine[Any, Any, M]:
        """Take a sequence number now; the coroutine sends and waits."""
        body = {name: value for name, value in fields.items() if value is not None}
        json_bytes(body)  # what cannot be sent must not use up a number
        turn = self._line.reserve(1)
        body |= {"model_id": self.model_id, "seq_id": turn.seq_ids[0], "type": path}
        span = self._span(path, turn, **_told(body))
        work = partial(self._run_operation, turn, path, request_type, body, model, span)
        return self._connection.link.events.watch(work, span, _operated)

    async def _run_operation(
        self, turn: Turn, path: str, request_type: str, body: Mapping[str, Any], model: type[M], span: Span
    ) -> M:
        async with turn:
            span.sent()
            reply = await self._connection.link.submit(path, body)
        span.acknowledged()
        finished = await self._connection.link.result(reply.request_id, request_type, self._queue_log)
        result = finished.json_as(model)
        if isinstance(result, SavedWeights):
            result._server = self._connection.config.base_url
        return result

    def _span(self, operation: str, turn: Turn, **fields: Any) -> Span:
        return Span(operation, run_id=self.model_id, seq_id=turn.seq_ids.start, **fields)

    async def _sampler_of(
        self,
        save: Coroutine[Any, Any, EphemeralSampler],
        retry_config: RetryConfig | None,
        record_stability_info: bool,
    ) -> SamplingClient:
        sampler = await save
        return SamplingClient(
            self._connection,
            await self._connection.link.session_id(),
            sampler.sampling_session_id,
            base_model=self._base_model,
            tokenizer_id=self._info.model_data.tokenizer_id,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

    # ---- passes over data ----

    def _begin_pass(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None,
        *,
        forward_only: bool,
    ) -> Coroutine[Any, Any, ForwardBackwardOutput]:
        pieces = split(data, self._connection.link.flags)
        chunks = self._encoded(pieces, loss_fn, loss_fn_config, forward_only=forward_only)
        turn = self._line.reserve(len(chunks))
        span = self._span("forward" if forward_only else "forward_backward", turn, loss_fn=loss_fn, **_sizes(pieces))
        work = partial(self._run_pass, chunks, turn, span, forward_only=forward_only)
        return self._connection.link.events.watch(work, span, _losses)

    async def _run_pass(
        self, chunks: list[TrainChunk], turn: Turn, span: Span, *, forward_only: bool
    ) -> ForwardBackwardOutput:
        async with turn:
            span.sent()
            submitted = await self._submit_chunks(chunks, turn.seq_ids)
        span.acknowledged()
        return await self._results(chunks, turn.seq_ids, submitted, forward_only=forward_only)

    async def _submit_chunks(self, chunks: list[TrainChunk], seq_ids: range) -> list[UntypedAPIFuture | BaseException]:
        """Send every chunk, or fail for it, so that no sequence number stays unused.

        In parallel with the first chunk last, or one after another, as the server asks. Once the server cannot be
        reached, the rest is not tried.
        """
        if self._connection.link.flags.parallel_fwdbwd_chunks:
            pairs = list(zip(chunks, seq_ids, strict=True))
            later = await asyncio.gather(*(self._submit_chunk(*pair) for pair in pairs[1:]), return_exceptions=True)
            (first,) = await asyncio.gather(self._submit_chunk(*pairs[0]), return_exceptions=True)
            return [first, *later]
        outcomes: list[UntypedAPIFuture | BaseException] = []
        for chunk, seq_id in zip(chunks, seq_ids, strict=True):
            if outcomes and isinstance(outcomes[-1], APIConnectionError):
                outcomes.append(outcomes[-1])
            else:
                outcomes += await asyncio.gather(self._submit_chunk(chunk, seq_id), return_exceptions=True)
        return outcomes

    async def _submit_chunk(self, chunk: TrainChunk, seq_id: int) -> UntypedAPIFuture:
        link = self._connection.link
        async with link.submit_bytes.reserve(len(chunk.body)):
            body = await chunk.wire_body(seq_id, link.flags)
            encoding = {"Content-Encoding": "zstd"} if link.flags.proto_compress_fwdbwd else {}
            call = Call(method="POST", path="forward_backward", body=body, content_type=PROTO_TYPE, headers=encoding)
            if link.flags.json_only:
                call = Call(method="POST", path="forward" if chunk.forward_only else "forward_backward", body=body)
            return await link.http.send_for(call, UntypedAPIFuture, link.submit_retry)

    async def _results(
        self,
        chunks: list[TrainChunk],
        seq_ids: range,
        submitted: list[UntypedAPIFuture | BaseException],
        *,
        forward_only: bool,
    ) -> ForwardBackwardOutput:
        """The merged result. Raises the error of the first chunk that failed, naming the chunk."""
        for chunk, seq_id, outcome in zip(chunks, seq_ids, submitted, strict=True):
            if isinstance(outcome, BaseException):
                raise chunk.in_context(outcome, seq_id)
        replies = [outcome for outcome in submitted if isinstance(outcome, UntypedAPIFuture)]
        outputs = await asyncio.gather(
            *(self._result(reply, forward_only) for reply in replies), return_exceptions=True
        )
        for chunk, seq_id, output in zip(chunks, seq_ids, outputs, strict=True):
            if isinstance(output, BaseException):
                raise chunk.in_context(output, seq_id)
        return merge_outputs([output for output in outputs if isinstance(output, ForwardBackwardOutput)])

    async def _result(self, reply: UntypedAPIFuture, forward_only: bool) -> ForwardBackwardOutput:
        request_type = "Forward" if forward_only else "ForwardBackward"
        finished = await self._connection.link.result(reply.request_id, request_type, self._queue_log)
        if self._connection.link.flags.json_only:
            return decode_forward_backward_output_json(finished.response.content)
        return decode_forward_backward_output(finished.proto_body())

    # ---- custom losses ----

    def _begin_custom(
        self, data: Sequence[Datum], loss: custom_loss.CustomLoss | custom_loss.LossHandle
    ) -> Coroutine[Any, Any, ForwardBackwardOutput]:
        data = list(data)
        plain = custom_loss.plain_data(data)
        function = custom_loss.as_function(loss)
        pieces = split(plain, self._connection.link.flags)
        chunks = self._surrogate_chunks(pieces, forward_only=True)
        turn = self._line.reserve(2 * len(chunks))
        span = self._span("forward_backward_custom", turn, loss_fn="custom", **_sizes(pieces))
        work = partial(self._run_custom, data, plain, function, chunks, turn)
        return self._connection.link.events.watch(work, span, _losses)

    def _surrogate_chunks(self, pieces: Sequence[Sequence[Datum]], *, forward_only: bool) -> list[TrainChunk]:
        return self._encoded(pieces, "cross_entropy", None, forward_only=forward_only)

    def _encoded(
        self,
        pieces: Sequence[Sequence[Datum]],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None,
        *,
        forward_only: bool,
    ) -> list[TrainChunk]:
        return encode_pieces(
            pieces,
            model_id=self.model_id,
            loss_fn=loss_fn,
            loss_fn_config=loss_fn_config,
            forward_only=forward_only,
            json_only=self._connection.link.flags.json_only,
        )

    async def _run_custom(
        self,
        data: list[Datum],
        plain: list[Datum],
        loss: custom_loss.CustomLoss,
        forward_chunks: list[TrainChunk],
        turn: Turn,
    ) -> ForwardBackwardOutput:
        """Holds its turn until the backward pass is sent, whose weights depend on the forward pass."""
        count = len(forward_chunks)
        forward_ids, backward_ids = turn.seq_ids[:count], turn.seq_ids[count:]
        async with turn:
            submitted = await self._submit_chunks(forward_chunks, forward_ids)
            try:
                forward = await self._results(forward_chunks, forward_ids, submitted, forward_only=True)
                gradient = await asyncio.to_thread(custom_loss.differentiate, loss, data, plain, forward)
                weighted = custom_loss.weighted_data(plain, gradient)
                chunks = self._surrogate_chunks(split_like(weighted, forward_chunks), forward_only=False)
            except BaseException as error:
                if not isinstance(error, asyncio.CancelledError | APIConnectionError):
                    await self._use_up(forward_chunks, backward_ids)
                raise
            submitted = await self._submit_chunks(chunks, backward_ids)
        output = await self._results(chunks, backward_ids, submitted, forward_only=False)
        output.metrics = custom_loss.merged_metrics(output.metrics, gradient)
        return output

    async def _use_up(self, forward_chunks: list[TrainChunk], seq_ids: range) -> None:
        """Send harmless forward passes for sequence numbers that will not be used.

        Servers execute in sequence: a number that never comes would hold up every later call.
        """
        smallest = min(forward_chunks, key=lambda chunk: len(chunk.body))
        await asyncio.gather(*(self._submit_chunk(smallest, seq_id) for seq_id in seq_ids), return_exceptions=True)


def _told(body: Mapping[str, Any]) -> dict[str, Any]:
    """What of an operation's body an event tells."""
    params = body.get("adam_params") or body.get("optimizer_params") or {}
    return {"learning_rate": params.get("learning_rate"), "path": body.get("path")}


def _operated(result: BaseModel) -> dict[str, Any]:
    metrics = getattr(result, "metrics", None) or {}
    return {"path": getattr(result, "path", None), "grad_norm": metrics.get("grad_norm:mean")}


def _sizes(pieces: Sequence[Sequence[Datum]]) -> dict[str, int]:
    """Datums, requests, and tokens of the text among the inputs."""
    chunks = [chunk for piece in pieces for datum in piece for chunk in datum.model_input.chunks]
    tokens = sum(len(chunk.tokens) for chunk in chunks if isinstance(chunk, EncodedTextChunk))
    return {"datums": sum(map(len, pieces)), "requests": len(pieces), "tokens": tokens}


def _losses(output: ForwardBackwardOutput) -> dict[str, Any]:
    return {"loss_sum": output.metrics.get("loss:sum"), "loss": output.loss if "loss:sum" in output.metrics else None}
