"""Keys and tokens are nowhere but in memory: not in the data folder, not in logs, not in answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.unit.server.chat_server import tiny_card
from tests.unit.server.keyed import keyed_server
from tests.unit.server.tinker_client import Client, OpenServer, train_body

pytestmark = pytest.mark.anyio


def _telemetry(secret: str) -> dict[str, Any]:
    """As the official SDK reports a failed poll: with the headers of the request."""
    data = {"request_headers": {"X-API-Key": secret}, "traceback": f"… key={secret} …"}
    event = {"event": "GENERIC_EVENT", "event_name": "APIFuture.result_async.api_status_error", "event_data": data}
    return {"events": [event], "platform": "Linux", "sdk_version": "0.38.0", "session_id": "sess-1"}


async def _use(client: Client, secret: str) -> list[httpx2.Response]:
    """A session's life, with mistakes."""
    http, model_name = client.http, client.engine.card.name
    session = await client.session()
    model = await client.model(session)
    receipts = [
        await client.train(model, 1),
        await client.post("save_weights", {"model_id": model, "seq_id": 2, "path": "a"}),
        await client.post("save_weights", {"model_id": model, "seq_id": 3, "path": "not / a name"}),
        await client.send_train(train_body("sess-0:train:0", 1)),
        await client.sample(await client.sampler(session)),
    ]
    results = [await client.poll(receipt) for receipt in receipts]
    chat = {"model": model_name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    path = f"/api/v1/training_runs/{model}/checkpoints/weights/a"
    return [
        *receipts,
        *results,
        await client.post("telemetry", _telemetry(secret)),
        await http.post("/v1/chat/completions", json=chat),
        await http.post("/v1/messages", json=chat | {"model": "no such model"}),
        await http.post("/optim_step", json={"model_id": "x", "adam_params": {"learning_rate": 1e-4}}),
        await client.post("create_session", {"tags": 7}),
        await http.post("/api/v1/asample", content=b"{not json"),
        await client.get("no/such/path"),
        await client.get("audit"),
        await client.get(f"sessions/{session}/trace_export"),
        await http.get(f"{path}/archive"),
        await http.post(f"{path}/publish"),
        await http.get("/openapi.json"),
        await client.get("auth/apikey/me"),
    ]


async def test_a_key_and_its_tokens_are_written_nowhere(
    open_server: OpenServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    settings: dict[str, Any] = {"control": {"ledger": True}, "card": tiny_card()}
    async with keyed_server(open_server, **settings, record_folder=tmp_path / "data" / "recorded") as server:
        await server.user("anna")
        secret, key = await server.key("anna")
        exchanged = await server.client(secret).post("auth/token", {})
        token = exchanged.json()["jwt"]
        bearer = server.client(None, authorization=f"Bearer {secret}")
        answers: list[httpx2.Response] = []
        for client, sent in ((server.client(secret), secret), (bearer, secret), (server.client(token), token)):
            answers += await _use(client, sent)

        async def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("a fault inside")

        monkeypatch.setattr(server.app.state.service.control.library, "list_sessions", broken)
        answers.append(await server.client(secret).get("sessions"))
        assert answers[-1].status_code == 500
        await server.deeds.revoke_key(key.key_id)
        answers += [await server.client(sent).get("sessions") for sent in (secret, token, secret + "x")]
        assert [answer.status_code for answer in answers[-3:]] == [401, 401, 401]
        await server.app.state.service.control.sweep()
    hidden = (secret[len(key.prefix) :], token.rpartition(".")[2])
    written = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert len(written) > 5
    for canary in hidden:
        assert not [path for path in written if canary.encode() in path.read_bytes()]
        assert canary not in caplog.text
        assert not [answer.url for answer in answers if canary in answer.text or canary in str(answer.headers)]
    assert key.prefix.encode() in b"".join(path.read_bytes() for path in written)  # what is looked for would be found
