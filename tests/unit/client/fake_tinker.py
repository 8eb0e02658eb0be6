"""A Tinker server of a few hundred lines that does what a test scripts: faults, delays, odd answers.

Its model is linear: the log-probability of a target token is `table[token]`, so gradients can be checked by hand.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx2
import numpy as np

from tinsmith.client import Timing
from tinsmith.types import ForwardBackwardOutput, SampledSequence, SampleResponse, TensorData
from tinsmith.wire.compression import decompress
from tinsmith.wire.tinker_proto import (
    decode_train_request,
    encode_forward_backward_output,
    encode_sample_response,
)

FAST = Timing(
    request_timeout=5.0,
    poll_timeout=2.0,
    startup_give_up=0.3,
    submit_give_up=0.5,
    poll_give_up=0.3,
    retry_initial=0.005,
    retry_max=0.02,
    poll_retry_initial=0.005,
    poll_retry_max=0.02,
    poll_pause_initial=0.01,
    poll_pause_max=0.05,
    backpressure_pause=0.01,
    backpressure_pause_large=0.02,
    close_timeout=0.5,
)
"""A client that waits milliseconds where a real one waits seconds."""

PROTO = {"content-type": "application/x-protobuf"}


@dataclass
class Seen:
    """One request as it arrived; `done_at` counts events, to tell what overlapped."""

    path: str
    body: Any
    headers: httpx2.Headers
    started: int
    done: int = 0


Action: TypeAlias = Callable[["FakeTinker", Seen], Awaitable[httpx2.Response | None]]
"""Takes the place of the usual answer; `None` means: answer as usual after all."""


def status(code: int, body: Any = None, **headers: str) -> Action:
    async def act(_: FakeTinker, __: Seen) -> httpx2.Response:
        return httpx2.Response(code, json=body or {"detail": f"scripted {code}"}, headers=headers)

    return act


def answer(body: Any) -> Action:
    async def act(_: FakeTinker, __: Seen) -> httpx2.Response:
        if isinstance(body, bytes):
            return httpx2.Response(200, content=body, headers={"content-type": "text/plain"})
        return httpx2.Response(200, json=body)

    return act


def no_connection() -> Action:
    async def act(_: FakeTinker, __: Seen) -> httpx2.Response:
        raise httpx2.ConnectError("scripted: connection refused")

    return act


def lose_reply() -> Action:
    """The server does the work; the client never hears of it."""

    async def act(server: FakeTinker, seen: Seen) -> httpx2.Response:
        await server.usual(seen)
        raise httpx2.ReadError("scripted: connection reset")

    return act


def after(seconds: float) -> Action:
    async def act(_: FakeTinker, __: Seen) -> None:
        await asyncio.sleep(seconds)

    return act


def until(event: threading.Event) -> Action:
    async def act(_: FakeTinker, __: Seen) -> None:
        while not event.is_set():  # noqa: ASYNC110  the event is set from another thread
            await asyncio.sleep(0.002)

    return act


def only_for(request_id: str, action: Action) -> Action:
    """`action` for the polls of one request, the usual answer for the others."""

    async def act(server: FakeTinker, seen: Seen) -> httpx2.Response | None:
        return await action(server, seen) if seen.body["request_id"] == request_id else None

    return act


@dataclass
class FakeTinker(httpx2.AsyncBaseTransport):
    flags: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `client/dynamic_config`."""
    vocab: int = 16
    seen: list[Seen] = field(default_factory=list)
    scripts: dict[str, deque[Action]] = field(default_factory=lambda: defaultdict(deque))
    always: dict[str, Action] = field(default_factory=dict)
    results: dict[str, dict[str, Any] | bytes] = field(default_factory=dict)
    executed: dict[tuple[str, int], str] = field(default_factory=dict)
    """(model or sampling session, seq) to request id: what took effect."""

    def __post_init__(self) -> None:
        self.table = -np.arange(1, self.vocab + 1, dtype=np.float64) / 10
        self.gradient = np.zeros(self.vocab)
        self._events = 0
        self._lock = threading.Lock()

    # ---- scripting and looking ----

    def script(self, path: str, *actions: Action) -> None:
        """The next requests to `path` get these, in turn."""
        self.scripts[path].extend(actions)

    def of(self, path: str) -> list[Seen]:
        return [seen for seen in list(self.seen) if seen.path == path]

    def submitted(self) -> list[int]:
        """Sequence numbers of training requests in the order they arrived, repeats included."""
        return [seen.body["seq_id"] for seen in list(self.seen) if "seq_id" in (seen.body or {})]

    def rewind(self) -> None:
        """Forget what was seen so far."""
        self.seen.clear()

    # ---- transport ----

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path.partition("/api/v1/")[2]
        return await self.handle(path, request.headers, await request.aread())

    async def handle(self, path: str, headers: httpx2.Headers, content: bytes) -> httpx2.Response:
        seen = Seen(path=path, body=_decoded(headers, content), headers=headers, started=self._tick())
        self.seen.append(seen)
        try:
            action = self.scripts[path].popleft() if self.scripts[path] else self.always.get(path)
            response = None if action is None else await action(self, seen)
            return response if response is not None else await self.usual(seen)
        finally:
            seen.done = self._tick()

    def _tick(self) -> int:
        with self._lock:
            self._events += 1
            return self._events

    # ---- what a server does ----

    async def usual(self, seen: Seen) -> httpx2.Response:
        method = getattr(self, "do_" + seen.path.replace("/", "_").replace(":", "_"), None)
        if method is None:
            if seen.path.endswith("/finish"):
                return httpx2.Response(204)
            if seen.path.startswith("samplers/"):
                reply = {"sampler_id": seen.path.partition("/")[2], "base_model": "tinsmith/tiny"}
                return httpx2.Response(200, json=reply)
            return httpx2.Response(404, json={"detail": f"no {seen.path}"})
        response: httpx2.Response = method(seen.body)
        return response

    def do_client_config(self, _: Any) -> httpx2.Response:
        return httpx2.Response(200, json=self.flags)

    def do_client_dynamic_config(self, _: Any) -> httpx2.Response:
        return httpx2.Response(200, json=self.settings)

    def do_create_session(self, _: Any) -> httpx2.Response:
        return httpx2.Response(200, json={"session_id": "s"})

    def do_session_heartbeat(self, _: Any) -> httpx2.Response:
        return httpx2.Response(200, json={})

    def do_create_model(self, body: Any) -> httpx2.Response:
        model_id = f"s:train:{body['model_seq_id']}"
        return self._accept(model_id, 0, {"model_id": model_id})

    def do_get_info(self, body: Any) -> httpx2.Response:
        data = {"model_name": "tinsmith/tiny", "tokenizer_id": "tinsmith/tiny", "arch": "fake"}
        return httpx2.Response(200, json={"model_id": body["model_id"], "model_data": data, "lora_rank": 8})

    def do_forward_backward(self, body: Any) -> httpx2.Response:
        outputs, loss = [], 0.0
        fresh = (body["model_id"], body["seq_id"]) not in self.executed
        for datum in body["request"].data:
            targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
            weights = datum.loss_fn_inputs["weights"].to_numpy()
            logprobs = self.table[targets]
            loss -= float((weights * logprobs).sum())
            if not body["request"].forward_only and fresh:
                np.subtract.at(self.gradient, targets.reshape(-1), weights.reshape(-1))
            outputs.append({"logprobs": TensorData.from_numpy(logprobs.astype(np.float32))})
        output = ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": loss, "chunk:unique": body["seq_id"]})
        return self._accept(body["model_id"], body["seq_id"], encode_forward_backward_output(output))

    def do_optim_step(self, body: Any) -> httpx2.Response:
        return self._accept(body["model_id"], body["seq_id"], {"metrics": {"step:sum": 1.0}})

    def do_save_weights(self, body: Any) -> httpx2.Response:
        path = f"tinker://{body['model_id']}/weights/{body['path']}"
        return self._accept(body["model_id"], body["seq_id"], {"path": path})

    def do_load_weights(self, body: Any) -> httpx2.Response:
        model_id = body.get("model_id") or f"s:train:{body['model_seq_id']}"
        return self._accept(model_id, body.get("seq_id", 0), {"model_id": model_id, "path": body["path"]})

    def do_save_weights_for_sampler(self, body: Any) -> httpx2.Response:
        if "path" in body:
            result = {"path": f"tinker://{body['model_id']}/sampler_weights/{body['path']}"}
        else:
            result = {"sampling_session_id": f"s:sample:{body['sampling_session_seq_id']}"}
        return self._accept(body["model_id"], body["seq_id"], result)

    def do_create_sampling_session(self, body: Any) -> httpx2.Response:
        return httpx2.Response(200, json={"sampling_session_id": f"s:sample:{body['sampling_session_seq_id']}"})

    def do_join_sampling_session(self, _: Any) -> httpx2.Response:
        return httpx2.Response(200, json={"client_counter": 7})

    def do_asample(self, body: Any) -> httpx2.Response:
        count = body["num_samples"]
        tokens = np.array([1, 2, 3], dtype=np.int32)
        prompt = [token for chunk in body["prompt"]["chunks"] for token in chunk["tokens"]]
        response = SampleResponse(
            sequences=[
                SampledSequence(stop_reason="length", tokens_np=tokens, logprobs_np=np.full(3, -0.5, np.float32))
                for _ in range(count)
            ]
        )
        if body["prompt_logprobs"]:
            response.prompt_logprobs_np = np.array([np.nan] + [-0.25] * (len(prompt) - 1), dtype=np.float32)
        ids = [f"{body['sampling_session_id']}:{body['seq_id']}:{i}" for i in range(count)]
        return self._accept(
            body["sampling_session_id"], body["seq_id"], encode_sample_response(response), sample_sequence_ids=ids
        )

    def do_retrieve_future(self, body: Any) -> httpx2.Response:
        result = self.results.get(body["request_id"])
        if result is None:
            return httpx2.Response(404, json={"detail": f"no request {body['request_id']}"})
        if isinstance(result, bytes):
            return httpx2.Response(200, content=result, headers=PROTO)
        return httpx2.Response(200, json=result)

    def do_get_server_capabilities(self, _: Any) -> httpx2.Response:
        return httpx2.Response(200, json={"supported_models": [{"model_name": "tinsmith/tiny"}]})

    def _accept(self, owner: str, seq_id: int, result: dict[str, Any] | bytes, **more: Any) -> httpx2.Response:
        """The same number again is the same request."""
        request_id = self.executed.setdefault((owner, seq_id), f"{owner}:{seq_id}")
        self.results.setdefault(request_id, result)
        return httpx2.Response(200, json={"request_id": request_id, **more})


def _decoded(headers: httpx2.Headers, content: bytes) -> Any:
    if headers.get("content-encoding") == "zstd":
        content = decompress(content, max_bytes=100_000_000)
    if "protobuf" in headers.get("content-type", ""):
        request = decode_train_request(content)
        return {"model_id": request.model_id, "seq_id": request.seq_id, "request": request}
    return json.loads(content) if content else None
