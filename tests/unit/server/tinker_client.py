"""A hand-driven Tinker client, and the bodies it sends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx2

from tinsmith.runtime.fake import FakeEngine
from tinsmith.types import Datum, ModelInput
from tinsmith.wire.tinker_proto import CONTENT_TYPE, TrainRequest, encode_train_request

PROTOBUF = {"content-type": CONTENT_TYPE}


class Client:
    """One method per step, nothing hidden."""

    def __init__(self, http: httpx2.AsyncClient, engine: FakeEngine, app: Any) -> None:
        self.http = http
        self.engine = engine
        self.app = app

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx2.Response:
        return await self.http.post(f"/api/v1/{path}", json=body, **options)

    async def get(self, path: str, **options: Any) -> httpx2.Response:
        return await self.http.get(f"/api/v1/{path}", **options)

    async def session(self) -> str:
        return (await self.post("create_session", {"tags": [], "user_metadata": {}})).json()["session_id"]

    async def model(self, session_id: str | None = None, model_seq_id: int = 0) -> str:
        session_id = session_id or await self.session()
        body = {"session_id": session_id, "model_seq_id": model_seq_id, "base_model": self.engine.card.name}
        receipt = await self.post("create_model", body | {"lora_config": {"rank": 4}})
        return (await self.result(receipt))["model_id"]

    async def train(self, model_id: str, seq_id: int, **changes: Any) -> httpx2.Response:
        return await self.send_train(train_body(model_id, seq_id, **changes))

    async def send_train(self, body: bytes, **headers: str) -> httpx2.Response:
        return await self.http.post(
            "/api/v1/forward_backward",
            content=body,
            headers=PROTOBUF | {k.replace("_", "-"): v for k, v in headers.items()},
        )

    async def poll(
        self, receipt: httpx2.Response, *, accept: str = "application/json", metadata_only: bool = False
    ) -> httpx2.Response:
        assert receipt.status_code == 200, receipt.text
        return await self.poll_id(receipt.json()["request_id"], accept=accept, metadata_only=metadata_only)

    async def poll_id(
        self, request_id: str, *, accept: str = "application/json", metadata_only: bool = False
    ) -> httpx2.Response:
        body = {"request_id": request_id, "allow_metadata_only": metadata_only}
        return await self.post("retrieve_future", body, headers={"accept": accept})

    async def result(self, receipt: httpx2.Response, **options: Any) -> Any:
        """The JSON of a finished request, failed or not."""
        for _ in range(100):
            answer = await self.poll(receipt, **options)
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()
        raise AssertionError("no result after 100 polls")

    async def sampler(self, session_id: str | None = None, **fields: Any) -> str:
        session_id = session_id or await self.session()
        body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": self.engine.card.name} | fields
        return (await self.post("create_sampling_session", body)).json()["sampling_session_id"]

    async def sample(self, sampler: str, seq_id: int = 0, **fields: Any) -> httpx2.Response:
        return await self.post("asample", sample_body(sampler, seq_id, **fields))


def train_body(model_id: str, seq_id: int, **changes: Any) -> bytes:
    fields = {
        "model_id": model_id,
        "seq_id": seq_id,
        "data": (datum([1, 2, 3]),),
        "loss_fn": "cross_entropy",
        "loss_fn_config": {},
        "forward_only": False,
    }
    return encode_train_request(TrainRequest(**(fields | changes)))


def datum(tokens: list[int], **inputs: Any) -> Datum:
    given = {"target_tokens": [t + 1 for t in tokens], "weights": [1.0] * len(tokens)} | inputs
    return Datum(ModelInput.from_ints(tokens), given)


def sample_body(sampler: str, seq_id: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 4, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": 7},
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "type": "sample",
    } | fields


OpenServer = Callable[..., AbstractAsyncContextManager[Client]]
"""`async with open_server(control={…}, **server_settings) as client`."""
