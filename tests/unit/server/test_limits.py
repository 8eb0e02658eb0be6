"""Every limit, over HTTP: the status, when to come back, and a sentence with the figure and the limit in it."""

from __future__ import annotations

import httpx2
import pytest

from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.control.identities import Quota

pytestmark = pytest.mark.anyio


def refused(answer: httpx2.Response, *words: str) -> None:
    """429, and a client knows when to come back and why."""
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-should-retry"] == "true"
    for word in words:
        assert word in answer.json()["detail"]


def set_quota(client: Client, quota: Quota) -> None:
    client.app.state.service.control.accounts.quota_of_user = lambda user_id: quota


async def test_waiting_requests_of_a_model(open_server: OpenServer) -> None:
    async with open_server(control={"max_pending_per_model": 2}) as client:
        model_id = await client.model()
        client.engine.pause()
        answers = [await client.train(model_id, n) for n in range(1, 12)]
        refused(answers[-1], "2 requests of model", "the most this server takes")
        client.engine.resume()
        for answer in answers[:2]:
            assert "error" not in await client.result(answer)


async def test_waiting_tokens_of_a_model(open_server: OpenServer) -> None:
    async with open_server(control={"max_pending_tokens_per_model": 8, "max_batch_tokens": 1}) as client:
        model_id = await client.model()
        client.engine.pause()
        answers = [await client.train(model_id, n) for n in range(1, 12)]
        refused(answers[-1], "tokens of model", "at most 8")


async def test_live_sessions(open_server: OpenServer) -> None:
    async with open_server(control={"max_live_sessions": 1}) as client:
        await client.session()
        refused(await client.post("create_session", {"tags": []}), "1 sessions are live, the most this server keeps")


async def test_samples_at_once_of_a_user(client: Client) -> None:
    sampler_id = await client.sampler()
    set_quota(client, Quota(concurrent_samples=1))
    client.engine.pause()
    first = await client.sample(sampler_id, 0)
    refused(await client.sample(sampler_id, 1), "user 'local' has 1 samples", "a quota of 1 at once")
    client.engine.resume()
    await client.result(first)
    assert "error" not in await client.result(await client.sample(sampler_id, 1))


async def test_live_models_of_a_user(client: Client) -> None:
    session_id = await client.session()
    await client.model(session_id, 0)
    set_quota(client, Quota(live_models=1))
    body = {"session_id": session_id, "model_seq_id": 1, "base_model": client.engine.card.name}
    answer = await client.post("create_model", body | {"lora_config": {"rank": 4}})
    refused(answer, "user 'local' has 1 live models, and a quota of 1")


async def test_tokens_per_minute_of_a_user(open_server: OpenServer) -> None:
    """Training waits and its poll says so; a sample is refused for as long as it takes, and never for more."""
    async with open_server(poll_hold_s=0.1) as client:
        model_id, sampler_id = await client.model(), await client.sampler()
        set_quota(client, Quota(tokens_per_minute=1))
        assert "error" not in await client.result(await client.train(model_id, 1))
        waiting = await client.poll(await client.train(model_id, 2))
        assert waiting.status_code == 408
        assert waiting.json()["queue_state"] == "paused_rate_limit"
        assert "user 'local' has used its 1 tokens per minute" in waiting.json()["queue_state_reason"]
        sampled = await client.sample(sampler_id)
        refused(sampled, "user 'local' has used its 1 tokens per minute")
        assert sampled.headers["retry-after"] == "60"
        set_quota(client, Quota())
        assert (await client.sample(sampler_id)).status_code == 200
