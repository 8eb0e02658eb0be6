"""One poll for all samples of a client."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.wire.tinker_proto import CONTENT_TYPE

pytestmark = pytest.mark.anyio

BLOCK = 10**9


async def polled(client: Client, sampler: str, cursor: int = 0, clone: int = 0, **fields: Any) -> dict[str, Any]:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    answer = await client.post("retrieve_futures", {"target": target, "prev_cursor": cursor, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_finished_and_failed_samples_are_announced_once_each(client: Client) -> None:
    sampler = await client.sampler()
    good = (await client.sample(sampler, 0)).json()["request_id"]
    bad = (await client.sample(sampler, 1, num_samples=0)).json()["request_id"]
    seen: dict[str, dict[str, Any]] = {}
    cursor = 0
    while len(seen) < 2:
        answer = await polled(client, sampler, cursor)
        assert answer["cursor"] > cursor
        cursor = answer["cursor"]
        seen |= {found["request_id"]: found for found in answer["completions"]}
    assert seen[good]["state"] == "finished"
    assert seen[good]["response_payload_uncompressed_size"] > 0
    assert seen[bad] == {"state": "failed", "request_id": bad}
    assert await polled(client, sampler, cursor, timeout=0.0) == {"completions": [], "cursor": cursor}


async def test_the_poll_is_held_until_something_ends(open_server: OpenServer) -> None:
    async with open_server(poll_hold_s=0.3) as client:
        sampler = await client.sampler()
        started = time.perf_counter()
        assert (await polled(client, sampler))["completions"] == []
        assert time.perf_counter() - started >= 0.29
        poll = asyncio.create_task(polled(client, sampler))
        await asyncio.sleep(0.05)
        receipt = await client.sample(sampler, 0)
        found = (await asyncio.wait_for(poll, 0.25))["completions"]
        assert [c["request_id"] for c in found] == [receipt.json()["request_id"]]


async def test_what_was_not_acknowledged_is_announced_again(client: Client) -> None:
    sampler = await client.sampler()
    for seq in range(3):
        await client.result(await client.sample(sampler, seq))
    first = await polled(client, sampler)
    assert len(first["completions"]) == 3
    assert await polled(client, sampler) == first


async def test_clones_hear_of_their_own_samples_only(client: Client) -> None:
    sampler = await client.sampler()
    mine = await client.sample(sampler, 5)
    theirs = await client.sample(sampler, 7 * BLOCK)
    for clone, receipt in ((0, mine), (7, theirs)):
        await client.result(receipt)
        found = await polled(client, sampler, clone=clone)
        assert [c["request_id"] for c in found["completions"]] == [receipt.json()["request_id"]]


async def test_a_number_used_again_with_another_payload_is_announced_as_failed(client: Client) -> None:
    sampler = await client.sampler()
    await client.result(await client.sample(sampler, 0))
    clash = (await client.sample(sampler, 0, num_samples=2)).json()["request_id"]
    found = (await polled(client, sampler))["completions"]
    assert {"state": "failed", "request_id": clash} in found


async def test_a_result_that_was_fetched_is_let_go(client: Client) -> None:
    sampler = await client.sampler()
    receipt = await client.sample(sampler, 0)
    request_id = receipt.json()["request_id"]
    cursor = (await polled(client, sampler))["cursor"]
    assert (await client.poll(receipt, accept=CONTENT_TYPE)).status_code == 200
    await polled(client, sampler, cursor, timeout=0.0, retrieved_request_ids=[request_id])
    assert (await client.poll(receipt)).status_code == 410
    assert (await client.sample(sampler, 0)).json()["request_id"] == request_id


async def test_results_of_others_are_not_let_go(client: Client) -> None:
    sampler = await client.sampler()
    receipt = await client.sample(sampler, 0)
    await client.result(receipt)
    await polled(client, sampler, clone=3, timeout=0.0, retrieved_request_ids=[receipt.json()["request_id"]])
    assert "error" not in await client.result(receipt)


async def test_no_such_sampler_is_404(client: Client) -> None:
    target = {"type": "sampling_session", "sampling_session_id": "sess-none:sample:0"}
    answer = await client.post("retrieve_futures", {"target": target})
    assert answer.status_code == 404
    assert "sess-none:sample:0" in answer.json()["detail"]


async def test_what_nobody_polls_for_is_not_kept_for_ever(open_server: OpenServer) -> None:
    async with open_server(control={"future_ttl_s": 0.05, "sweep_interval_s": 0.02}) as client:
        sampler = await client.sampler()
        for seq in range(10):
            await client.result(await client.sample(sampler, seq))
        await asyncio.sleep(0.3)
        assert len(client.app.state.service.control._futures.completions) == 0


@pytest.mark.parametrize("timeout", ["NaN", "Infinity", "-1", "true"])
async def test_a_timeout_that_makes_no_sense_is_named(client: Client, timeout: str) -> None:
    body = f'{{"target": {{"sampling_session_id": "s"}}, "timeout": {timeout}}}'
    answer = await client.http.post("/api/v1/retrieve_futures", content=body)
    assert answer.status_code == 400
    assert "timeout" in answer.json()["detail"]
