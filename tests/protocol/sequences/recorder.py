"""A server that answers a client well enough to go on, fails where a scenario says so, and records what it sees."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from google.protobuf.json_format import MessageToDict

from tinsmith.types import ForwardBackwardOutput, SampledSequence, SampleResponse, TensorData
from tinsmith.wire import tinker_pb2 as pb
from tinsmith.wire.tinker_proto import decode_train_request, encode_forward_backward_output, encode_sample_response

JSON, PROTO = b"application/json", b"application/x-protobuf"
KEPT_HEADERS = ("accept", "content-type", "x-tinker-request-iteration", "x-tinker-request-type")
SESSION = "sess-1"
RUN = f"{SESSION}:train:0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request, with what a server could tell of it."""

    at: float
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    idempotency_key: str | None
    body: Any

    @property
    def told(self) -> tuple[Any, ...]:
        return self.method, self.path, self.query, dict(self.headers), self.body


@dataclass(slots=True)
class Recorder:
    flags: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, list[Seen]] = field(default_factory=lambda: defaultdict(list))
    """By scenario."""
    _scenario: str = "start"
    _faults: dict[str, list[Any]] = field(default_factory=dict)
    """What the next requests of a path are answered instead: a status, "drop", or a JSON body."""
    _results: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    _counter: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = await _read(receive)
        path = scope["path"].removeprefix("/api/v1/")
        if path == "scenario":
            self._begin(json.loads(body))
            await _answer(send, 200, JSON, b"{}")
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen[self._scenario].append(_noted(scope, path, headers, body))
        if faults := self._faults.get(path):
            fault = faults.pop(0)
            if isinstance(fault, dict):
                await _answer(send, 200, JSON, json.dumps(fault).encode())
            elif isinstance(fault, int):
                await _answer(send, fault, JSON, json.dumps({"error": "as planned", "category": "server"}).encode())
            else:
                raise ConnectionAbortedError("dropped as planned")
            return
        kind, content = self._reply(path, body)
        await _answer(send, 200, kind, content)

    def _begin(self, plan: Mapping[str, Any]) -> None:
        self._scenario = plan["name"]
        self._faults = {path: list(faults) for path, faults in plan["faults"].items()}

    def _reply(self, path: str, body: bytes) -> tuple[bytes, bytes]:
        if path == "forward_backward":
            request = decode_train_request(body)
            outputs = [
                {"logprobs": TensorData.from_numpy(np.full(len(datum.loss_fn_inputs["target_tokens"].flat), -1.0))}
                for datum in request.data
            ]
            result = ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": 1.0})
            return self._later(PROTO, encode_forward_backward_output(result))
        told = json.loads(body) if body else {}
        if path == "retrieve_future":
            return self._results[told["request_id"]]
        if path == "asample":
            sequences = [SampledSequence("stop", f"q-{i}", np.array([3, 4]), np.array([-1.0, -2.0])) for i in range(1)]
            response = SampleResponse(sequences, prompt_logprobs_np=np.array([np.nan, -1.0, -2.0]))
            return self._later(PROTO, encode_sample_response(response), sample_sequence_ids=["q-0"])
        if (result := _result_of(path, told)) is not None:
            return self._later(JSON, json.dumps(result).encode())
        return JSON, json.dumps(self._at_once(path, told)).encode()

    def _later(self, kind: bytes, result: bytes, **more: Any) -> tuple[bytes, bytes]:
        self._counter += 1
        request_id = f"req-{self._counter}"
        self._results[request_id] = (kind, result)
        return JSON, json.dumps({"request_id": request_id, **more}).encode()

    def _at_once(self, path: str, told: Mapping[str, Any]) -> Any:
        match path:
            case "client/config":
                return self.flags
            case "create_session":
                return {"session_id": SESSION, "type": "create_session"}
            case "get_info":
                model = {"arch": "stub", "model_name": "stub", "tokenizer_id": "stub"}
                return {"model_id": told["model_id"], "model_data": model, "is_lora": True, "lora_rank": 8}
            case "create_sampling_session":
                return {"sampling_session_id": f"{SESSION}:sample:{told['sampling_session_seq_id']}"}
            case "telemetry":
                return {"status": "accepted"}
            case _ if path.startswith("samplers/"):
                return {"sampler_id": path.partition("/")[2], "base_model": "stub", "model_path": None}
            case _:
                return {}


def _result_of(path: str, told: Mapping[str, Any]) -> Any:
    match path:
        case "create_model" | "unload_model":
            return {"model_id": f"{SESSION}:train:{told.get('model_seq_id', 0)}", "type": path}
        case "optim_step":
            return {"metrics": {}, "type": path}
        case "save_weights":
            return {"path": f"tinker://{RUN}/weights/{told['path']}", "type": path}
        case "save_weights_for_sampler" if told.get("path"):
            return {"path": f"tinker://{RUN}/sampler_weights/{told['path']}", "type": path}
        case "save_weights_for_sampler":
            return {"sampling_session_id": f"{SESSION}:sample:{told['sampling_session_seq_id']}", "type": path}
        case "load_weights":
            return {"path": told["path"], "type": path}
        case "create_custom_loss":
            return {"loss_id": "loss-1", "type": path}
        case _:
            return None


def _noted(scope: Any, path: str, headers: Mapping[str, str], body: bytes) -> Seen:
    return Seen(
        at=time.monotonic(),
        method=scope["method"],
        path=path,
        query=scope["query_string"].decode(),
        headers={name: headers[name] for name in KEPT_HEADERS if name in headers},
        idempotency_key=headers.get("x-idempotency-key"),
        body=_legible(headers.get("content-type", ""), body),
    )


def _legible(content_type: str, body: bytes) -> Any:
    """Messages field by field, since maps of protobuf have no order; JSON as it parses."""
    if not body:
        return None
    if PROTO.decode() in content_type:
        return MessageToDict(pb.ForwardBackwardRequest.FromString(body), preserving_proto_field_name=True)
    return json.loads(body)


async def _read(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _answer(send: Any, status: int, kind: bytes, content: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


@contextmanager
def recording(flags: Mapping[str, Any]) -> Iterator[tuple[Recorder, str]]:
    recorder = Recorder(flags=dict(flags))
    server = uvicorn.Server(uvicorn.Config(recorder, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="recorder")
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield recorder, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
