"""`SamplingClient`: draws from a base model or from one snapshot of an adapter."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import operator
import os
import random
import sys
import time
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tinsmith.client.completions import CompletionPoller
from tinsmith.client.config import ServerFlags, Timing, is_local_url, resolve_config
from tinsmith.client.connection import Connection
from tinsmith.client.errors import (
    APIResponseValidationError,
    ConfigurationError,
    PromiseExpiredError,
    RateLimitError,
    TinkerError,
)
from tinsmith.client.events import Events, Span
from tinsmith.client.futures import APIFuture, value_twin
from tinsmith.client.http import Pool, escaped, get, json_bytes, post
from tinsmith.client.polling import Finished, QueueStateLog
from tinsmith.client.retries import RetryConfig
from tinsmith.client.session import JoinedSession
from tinsmith.client.tokenizer import Tokenizer, load_tokenizer
from tinsmith.types.checkpoint import ParsedCheckpointTinkerPath
from tinsmith.types.datum import (
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    as_tensor_data,
)
from tinsmith.types.params import SamplingParams
from tinsmith.types.replies import (
    ClientDynamicConfigResponse,
    CreateSamplingSessionResponse,
    FutureFinished,
    JoinSamplingSessionResponse,
    UntypedAPIFuture,
)
from tinsmith.types.rest import GetSamplerResponse
from tinsmith.types.results import SampleResponse
from tinsmith.types.tensor import TensorData
from tinsmith.wire.tinker_json import decode_sample_response_json
from tinsmith.wire.tinker_proto import decode_sample_response

logger = logging.getLogger("tinsmith.client")

CLONE_BLOCK = 1_000_000_000
"""Each clone of a sampling client numbers its requests in a block of this many of its own."""

_RESUBMISSIONS_MAX = 8
_BYTES_PER_SAMPLING_TOKEN = 10
_LARGE_PROMPT_BYTES = 131_072
_NUMBERS = (
    "num_samples",
    "topk_prompt_logprobs",
    "topk_sample_logprobs",
    "prompt_alt_tokens_k",
    "prompt_logprobs_last_n",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerState:
    """What another process needs to sample as this client does."""

    base_url: str
    session_id: str
    sampling_session_id: str
    base_model: str | None
    tokenizer_id: str | None
    flags: Mapping[str, Any]
    headers: Mapping[str, str]
    record_stability_info: bool
    pid: int
    dynamic: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    body: Mapping[str, Any]
    """Of `asample`, but for the sequence number."""
    num_bytes: int
    """Of the prompt, as a server reckons them."""
    prompt_tokens: int | None
    """`None` with pictures, whose tokens only the server counts."""


class SamplingClient:
    """Sample from fixed weights. Safe to use from several threads, and picklable.

    Requests have no order among each other. An unpickled copy works on the same sampling session, from any process;
    copies of a client of a `local:` server work only in the process that made them.
    """

    def __init__(
        self,
        connection: Connection,
        session_id: str,
        sampling_session_id: str,
        *,
        base_model: str | None,
        tokenizer_id: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
        is_clone: bool = False,
    ) -> None:
        self._connection = connection
        self._session_id = session_id
        self._sampling_session_id = sampling_session_id
        self._base_model = base_model
        self._tokenizer_id = tokenizer_id
        self._retry = retry_config or RetryConfig()
        self._record_stability_info = record_stability_info
        self._seq_ids = None if is_clone else itertools.count()
        self._numbering = asyncio.Lock()
        self._in_flight = asyncio.Semaphore(self._max_in_flight())
        self._clone_number = 0
        self._completions: CompletionPoller | None = None
        self._queue_log = QueueStateLog(f"sampling from {sampling_session_id}")
        self._last_progress = time.monotonic()
        self._description: GetSamplerResponse | None = None

    def __repr__(self) -> str:
        return f"<SamplingClient {self._sampling_session_id} of {self._connection.config.base_url}>"

    @staticmethod
    def create(
        holder: Connection,
        *,
        model_path: str | None = None,
        base_model: str | None = None,
        sampling_session_id: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
    ) -> APIFuture[SamplingClient]:
        """A sampling client on an existing connection (`ServiceClient.holder`).

        With `sampling_session_id` it takes over a sampling session that was opened before.
        """
        if sampling_session_id is not None:
            opened = sampling_session_id
            return holder.begin(
                lambda: _of_session(
                    holder,
                    opened,
                    base_model=base_model,
                    retry_config=retry_config,
                    record_stability_info=record_stability_info,
                )
            )
        return holder.begin(
            lambda: open_sampling_client(
                holder,
                model_path=model_path,
                base_model=base_model,
                retry_config=retry_config,
                record_stability_info=record_stability_info,
            )
        )

    # ---- sampling ----

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: Any = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """`num_samples` independent continuations of `prompt`.

        `include_prompt_logprobs` scores the prompt too, only its last `prompt_logprobs_last_n` tokens if given;
        `topk_…` add the k most likely tokens and their log-probabilities per position; `target_prompt_logprobs`
        (int64 `[len - 1, K]`, -1 to skip) scores given tokens at each prompt position after the first;
        `prompt_alt_tokens_k` draws so many tokens there, at the temperature of `sampling_params`.
        """
        body = {
            "num_samples": num_samples,
            "prompt_logprobs": include_prompt_logprobs,
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "topk_sample_logprobs": topk_sample_logprobs,
            "prompt_alt_tokens_k": prompt_alt_tokens_k,
            "prompt_logprobs_last_n": prompt_logprobs_last_n,
        }
        return self._connection.begin(
            lambda: self._watched(self._request(prompt, sampling_params, body, target_prompt_logprobs)),
            can_cancel=True,
        )

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """The log-probability of each prompt token given those before it; `None` for the first, which has none."""
        body = {
            "num_samples": 1,
            "prompt_logprobs": True,
            "topk_prompt_logprobs": 0,
            "topk_sample_logprobs": 0,
            "prompt_alt_tokens_k": 0,
            "prompt_logprobs_last_n": prompt_logprobs_last_n,
        }
        return self._connection.begin(
            lambda: self._score(self._request(prompt, SamplingParams(max_tokens=1), body, None)), can_cancel=True
        )

    sample_async = value_twin(sample)
    compute_logprobs_async = value_twin(compute_logprobs)

    # ---- about the model ----

    def get_base_model(self) -> str:
        """The name of the base model; asks the server if it is not known yet."""
        if self._base_model is None:
            self._base_model = self._connection.begin(self._describe).result().base_model
        return self._base_model

    async def get_base_model_async(self) -> str:
        if self._base_model is None:
            self._base_model = (await self._connection.begin(self._describe)).base_model
        return self._base_model

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, from transformers."""
        if self._tokenizer_id is None:
            self._tokenizer_id = self._connection.begin(self._describe).result().tokenizer_id
        return load_tokenizer(self._tokenizer_id, self.get_base_model())

    def get_telemetry(self) -> Events:
        """Where this client's events go."""
        return self._connection.link.events

    def on_queue_state_change(self, queue_state: str, queue_state_reason: str | None) -> None:
        """Told when the server says why samples wait; logs it, at most once a minute."""
        self._queue_log(queue_state, queue_state_reason)

    # ---- other processes ----

    def get_sampler_handle(self) -> str:
        """A text from which `from_sampler_handle` makes a copy of this client. It holds no key."""
        state = self._state()
        fields = {name: getattr(state, name) for name in SamplerState.__dataclass_fields__ if name != "headers"}
        return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """Raises `ValueError` if `handle` is no sampler handle."""
        try:
            state = SamplerState(headers={}, **json.loads(base64.urlsafe_b64decode(handle)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"not a sampler handle: {handle[:40]!r}") from error
        return _rehydrate(state, api_key, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rehydrate, (self._state(), self._connection.config.api_key.get_secret_value(), self._retry)

    def _state(self) -> SamplerState:
        self._connection.link.mark_shared()
        return SamplerState(
            base_url=self._connection.config.base_url,
            session_id=self._session_id,
            sampling_session_id=self._sampling_session_id,
            base_model=self._base_model,
            tokenizer_id=self._tokenizer_id,
            flags=self._connection.link.flags.model_dump(),
            headers=dict(self._connection.config.headers),
            record_stability_info=self._record_stability_info,
            pid=os.getpid(),
            dynamic=self._connection.link.dynamic.model_dump(),
            timing=asdict(self._connection.config.timing),
        )

    # ---- one sample ----

    def _max_in_flight(self) -> int:
        flags = self._connection.link.flags
        if flags.sample_use_retrieve_futures:
            return sys.maxsize
        allowed = flags.sample_max_concurrent_requests
        return allowed if self._retry.max_connections is None else min(allowed, self._retry.max_connections)

    def _request(
        self, prompt: ModelInput, params: SamplingParams, options: Mapping[str, Any], target_prompt_logprobs: Any
    ) -> _Request:
        """The body of `asample` but for its number. Raises `ValueError` naming what is wrong."""
        if not isinstance(prompt, ModelInput):
            raise ValueError(f"prompt must be a ModelInput, not {type(prompt).__name__}")
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be a SamplingParams, not {type(params).__name__}")
        numbers = {name: _whole(name, options[name]) for name in _NUMBERS if options.get(name) is not None}
        if numbers.get("num_samples", 0) < 1:
            raise ValueError(f"num_samples must be at least 1, not {options['num_samples']!r}")
        if options["prompt_logprobs_last_n"] is not None and not options["prompt_logprobs"]:
            raise ValueError("prompt_logprobs_last_n needs include_prompt_logprobs=True")
        body = {
            "sampling_session_id": self._sampling_session_id,
            "prompt": prompt.model_dump(mode="json", exclude_none=True),
            "sampling_params": params.model_dump(mode="json", exclude_none=True),
            "record_stability_info": self._record_stability_info,
            "type": "sample",
            "prompt_logprobs": options["prompt_logprobs"],
            **numbers,
        }
        if target_prompt_logprobs is not None:
            body["target_prompt_logprobs"] = _targets(target_prompt_logprobs).model_dump()
        json_bytes({"sampling_params": body["sampling_params"]})
        text_only = all(isinstance(chunk, EncodedTextChunk) for chunk in prompt.chunks)
        return _Request(
            body=body,
            num_bytes=_prompt_bytes(prompt),
            prompt_tokens=prompt.length if text_only else None,
        )

    def _watched(self, request: _Request) -> Coroutine[Any, Any, SampleResponse]:
        span = Span(
            "sample",
            session_id=self._session_id,
            sampling_session_id=self._sampling_session_id,
            num_samples=request.body["num_samples"],
            prompt_tokens=request.prompt_tokens,
        )
        return self._connection.link.events.watch(lambda: self._sample(request), span, _sampled)

    async def _sample(self, request: _Request) -> SampleResponse:
        async with self._in_flight:
            response = await self._with_retries(request)
        if request.body["prompt_alt_tokens_k"] and response.prompt_alt_tokens is None:
            raise TinkerError("the server returned no prompt_alt_tokens although they were asked for")
        return response

    async def _score(self, request: _Request) -> list[float | None]:
        logprobs = (await self._sample(request)).prompt_logprobs
        if logprobs is None:
            raise TinkerError("the server returned no prompt log-probabilities although they were asked for")
        return logprobs

    async def _with_retries(self, request: _Request) -> SampleResponse:
        """Each attempt has a number of its own. Bounded by the time without any success of this client."""
        expired, started = 0, time.monotonic()
        for attempt in itertools.count():
            try:
                response = await self._attempt(request)
            except Exception as error:
                expired += isinstance(error, PromiseExpiredError)
                if not self._may_retry(error, expired, started):
                    raise
                logger.info("sampling from %s failed and is tried again: %s", self._sampling_session_id, error)
                await asyncio.sleep(self._retry.delay(attempt))
            else:
                self._last_progress = time.monotonic()
                return response
        raise AssertionError("unreachable")

    def _may_retry(self, error: Exception, expired: int, started: float) -> bool:
        if isinstance(error, PromiseExpiredError):
            return expired <= _RESUBMISSIONS_MAX
        flags = self._connection.link.flags
        if flags.sample_no_retries or not self._retry.enable_retry_logic or not self._retry.is_retryable(error):
            return False
        stuck = time.monotonic() - max(self._last_progress, started) >= self._retry.progress_timeout
        return not (stuck and self._retry.enable_stuck_detection and flags.sample_enable_stuck_detection)

    async def _attempt(self, request: _Request) -> SampleResponse:
        reply = await self._submit(request, await self._next_seq_id())
        try:
            finished = await self._result(reply.request_id)
        except asyncio.CancelledError:
            self._connection.link.give_up(reply.request_id)
            raise
        if self._connection.link.flags.json_only:
            return decode_sample_response_json(finished.response.content, reply.sample_sequence_ids or ())
        content = finished.proto_body()
        if reply.sample_sequence_ids is None:
            message = f"sample {reply.request_id!r} was acknowledged without sample_sequence_ids"
            raise APIResponseValidationError(finished.response, None, message)
        return decode_sample_response(content, reply.sample_sequence_ids)

    async def _result(self, request_id: str) -> Finished:
        """By a poll of its own, or by the one poll of the session where the server asks for that."""
        link = self._connection.link
        if not link.flags.sample_use_retrieve_futures:
            return await link.result(request_id, "Sample", self.on_queue_state_change)
        if self._completions is None:
            self._completions = CompletionPoller(
                link.http,
                link.config.timing,
                self._sampling_session_id,
                self._clone_number,
                billing_give_up=link.flags.billing_exception_max_pause_duration_sec,
            )
        ended = await self._completions.ended(request_id)
        size = ended.response_payload_uncompressed_size if isinstance(ended, FutureFinished) else None
        async with link.result_bytes.reserve(size or 0):
            try:
                return await link.result(request_id, "Sample", self.on_queue_state_change, metadata_only=not size)
            finally:
                self._completions.retrieved(request_id)

    async def _submit(self, request: _Request, seq_id: int) -> UntypedAPIFuture:
        """A server without room (429) is offered the same request again after a pause."""
        timing = self._connection.config.timing
        body = {**request.body, "seq_id": seq_id}
        call = post("asample", body, pool=Pool.SAMPLE, headers={"X-Tinker-Sampling-Backpressure": "1"})
        is_large = request.num_bytes > _LARGE_PROMPT_BYTES
        pause = timing.backpressure_pause_large if is_large else timing.backpressure_pause
        link = self._connection.link
        while True:
            try:
                async with link.samples.offer(request.num_bytes):
                    return await link.http.send_for(call, UntypedAPIFuture, link.sample_retry)
            except RateLimitError:
                link.samples.refused()
                await asyncio.sleep(pause)

    async def _next_seq_id(self) -> int:
        """Clones join the session, and learn their block of numbers, when they first need one."""
        if self._seq_ids is None:
            async with self._numbering:
                if self._seq_ids is None:
                    await self._connection.link.session_id()
                    self._clone_number = await self._clone_id()
                    self._seq_ids = itertools.count(self._clone_number * CLONE_BLOCK)
        return next(self._seq_ids)

    async def _clone_id(self) -> int:
        link = self._connection.link
        if not link.flags.sample_join_sampling_session:
            return random.SystemRandom().randrange(1, CLONE_BLOCK)
        body = {"sampling_session_id": self._sampling_session_id, "type": "join_sampling_session"}
        call = post("join_sampling_session", body, pool=Pool.SESSION)
        return (await link.http.send_for(call, JoinSamplingSessionResponse, link.submit_retry)).client_counter

    async def _describe(self) -> GetSamplerResponse:
        """What the server says of this sampler, asked once."""
        if self._description is None:
            self._description = await look_up_sampler(self._connection, self._sampling_session_id)
        return self._description


async def open_sampling_client(
    connection: Connection,
    *,
    model_path: str | None,
    base_model: str | None,
    retry_config: RetryConfig | None,
    record_stability_info: bool,
) -> SamplingClient:
    """Open a sampling session. With both a checkpoint and a base model, the checkpoint wins.

    Raises `ValueError` if neither is given or the path is no `tinker://` path.
    """
    if model_path is None and base_model is None:
        raise ValueError("a sampling client needs a model_path or a base_model")
    if model_path is not None:
        ParsedCheckpointTinkerPath.from_tinker_path(model_path)
    seq_id = next(connection.sampling_session_seq_ids)
    link = connection.link
    session_id = await link.session_id()
    body = {
        "session_id": session_id,
        "sampling_session_seq_id": seq_id,
        "base_model": base_model,
        "model_path": model_path,
        "type": "create_sampling_session",
    }
    call = post("create_sampling_session", {key: v for key, v in body.items() if v is not None}, pool=Pool.SESSION)
    reply = await link.http.send_for(call, CreateSamplingSessionResponse, link.submit_retry)
    tokenizer_id = None
    if base_model is None:
        sampler = await look_up_sampler(connection, reply.sampling_session_id)
        base_model, tokenizer_id = sampler.base_model, sampler.tokenizer_id
    return SamplingClient(
        connection,
        session_id,
        reply.sampling_session_id,
        base_model=base_model,
        tokenizer_id=tokenizer_id,
        retry_config=retry_config,
        record_stability_info=record_stability_info,
    )


async def _of_session(
    connection: Connection,
    sampling_session_id: str,
    *,
    base_model: str | None,
    retry_config: RetryConfig | None,
    record_stability_info: bool,
) -> SamplingClient:
    return SamplingClient(
        connection,
        await connection.link.session_id(),
        sampling_session_id,
        base_model=base_model,
        retry_config=retry_config,
        record_stability_info=record_stability_info,
        is_clone=True,
    )


def _sampled(response: SampleResponse) -> dict[str, Any]:
    return {
        "sampled_tokens": sum(0 if one.tokens_np is None else len(one.tokens_np) for one in response.sequences),
        "cached_prompt_tokens": response.prompt_cache_hit_tokens,
    }


async def look_up_sampler(connection: Connection, sampler_id: str) -> GetSamplerResponse:
    link = connection.link
    await link.configure()
    return await link.http.send_for(get(f"samplers/{escaped(sampler_id)}"), GetSamplerResponse, link.submit_retry)


def _rehydrate(state: SamplerState, api_key: str | None, retry: RetryConfig | None) -> SamplingClient:
    """A clone of a sampling client, on a connection of its own."""
    if is_local_url(state.base_url) and state.pid != os.getpid():
        raise ConfigurationError(
            f"this sampling client belongs to the server embedded in process {state.pid} ({state.base_url}), "
            f"which process {os.getpid()} cannot reach; run `tinsmith serve` to sample from several processes"
        )
    config = resolve_config(
        base_url=state.base_url, api_key=api_key, headers=state.headers, timing=Timing(**state.timing)
    )
    joined = JoinedSession(
        session_id=state.session_id,
        flags=ServerFlags.model_validate(dict(state.flags)),
        dynamic=ClientDynamicConfigResponse.model_validate(dict(state.dynamic)),
    )
    return SamplingClient(
        Connection(config, joined=joined),
        state.session_id,
        state.sampling_session_id,
        base_model=state.base_model,
        tokenizer_id=state.tokenizer_id,
        retry_config=retry,
        record_stability_info=state.record_stability_info,
        is_clone=True,
    )


def _whole(name: str, value: Any) -> int:
    """Also of numpy's. Raises `ValueError` naming what is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return operator.index(value)


def _targets(value: Any) -> TensorData:
    """Raises `ValueError` unless `value` is an int64 matrix."""
    targets = as_tensor_data("target_tokens", value)
    if targets.dtype != "int64" or len(targets.shape or ()) != 2:
        raise ValueError(f"target_prompt_logprobs must be int64 of shape [len - 1, K], not {targets!r}")
    return targets


def _prompt_bytes(prompt: ModelInput) -> int:
    """The size a server reckons with when it is short of room."""
    size = 0
    for chunk in prompt.chunks:
        match chunk:
            case EncodedTextChunk():
                size += _BYTES_PER_SAMPLING_TOKEN * len(chunk.tokens)
            case ImageChunk():
                size += len(chunk.data)
            case DmelChunk():
                size += len(chunk.dmel)
            case ImageAssetPointerChunk():
                size += len(chunk.location)
    return size
