"""A server of the Tinkerbell dialect that was killed goes on: same names, same futures, same numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.unit.control.harness import Harness, ManualClock
from tests.unit.control.restarts import Server
from tests.unit.server.test_tinkerbell import ADAM, CARD, CHAT, Bell
from tests.unit.server.tinker_client import Client
from tinsmith.control.errors import NotTaken
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FakeEngine
from tinsmith.server import ServerSettings, create_app

pytestmark = pytest.mark.anyio

SAMPLE = {"prompts": ["Once", "Twice"], "sampling_params": {"max_tokens": 3}, "num_samples": 2}
TRAIN = {"data": [CHAT], "loss_fn": "cross_entropy"}


class Killable:
    """A server with a ledger; `kill` is how `running` ends for what comes after."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._server = Server(folder / "data", **settings)
        self.control: Control

    @asynccontextmanager
    async def running(self, *, kill: bool = True) -> AsyncIterator[Bell]:
        engine = FakeEngine(CARD)
        values = {"data_dir": self._server.data_dir, "ledger": True, "sweep_interval_s": 3600.0}
        control = self.control = Control(ControlSettings(**values), [engine])
        app = create_app(control, ServerSettings(poll_hold_s=5.0))
        async with app.router.lifespan_context(app):
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
                yield Bell(Client(http, engine, app))
            if kill:
                await self._server.kill(Harness(control, engine, ManualClock()))


@pytest.fixture
def server(tmp_path: Path) -> Killable:
    return Killable(tmp_path)


async def script(bell: Bell, name: str, steps: int) -> list[Any]:
    """Train, step and sample; what comes of it, ids aside."""
    told = []
    for _ in range(steps):
        told.append((await bell.train(name))["logprobs"])
        await bell.ok("/api/v1/optim_step", model_id=name, **ADAM)
        drawn = await bell.ok("/api/v1/sample", model_id=name, **SAMPLE | {"sampling_params": {"seed": 3}})
        told.append(drawn["sequences"])
    return told


async def test_adapters_keep_their_names_and_their_weights(server: Killable, tmp_path: Path) -> None:
    async with Killable(tmp_path / "other").running(kill=False) as bell:
        undisturbed = [await script(bell, await bell.lora(seed=1), 3), await script(bell, "mine", 2)]
    async with server.running() as bell:
        made = await bell.lora(seed=1)
        first = await script(bell, made, 1)
        auto = await script(bell, "mine", 1)
    async with server.running() as bell:
        first += await script(bell, made, 1)
    async with server.running(kill=False) as bell:
        first += await script(bell, made, 1)
        auto += await script(bell, "mine", 1)
        assert "created" not in await bell.train("mine")
        assert (await bell.ok("/get_info", model_id="mine"))["is_lora"]
        another = await bell.lora()
    assert first == undisturbed[0]
    assert auto == undisturbed[1]
    assert another not in (made, "mine")


async def test_futures_that_were_told_of_end_after_a_kill_as_they_would_have(server: Killable, tmp_path: Path) -> None:
    async def ask(bell: Bell) -> list[Any]:
        asked = [("forward_backward_async", TRAIN), ("forward_async", TRAIN), ("optim_step_async", ADAM)]
        asked += [("asample", SAMPLE | {"sampling_params": {"seed": 3}}), ("save_weights_async", {"path": "kept"})]
        return [await bell.ok(f"/api/v1/{path}", model_id="mine", **body) for path, body in asked]

    async def ends(bell: Bell, receipts: list[Any]) -> list[Any]:
        results = [await bell.result(receipt) for receipt in receipts]
        assert results[-1].pop("path").endswith("/weights/kept")
        return results

    async with Killable(tmp_path / "other").running(kill=False) as bell:
        undisturbed = await ends(bell, await ask(bell))
    async with server.running() as bell:
        bell.engine.pause()
        receipts = await ask(bell)
        assert (await bell.retrieve(receipts[0]["request_id"])).status_code == 202
    async with server.running() as bell:
        again = await ends(bell, receipts)
    assert again == undisturbed
    assert again[0]["created"] is True
    assert {result["model_id"] for result in again} == {"mine"}
    async with server.running(kill=False) as bell:  # what was fetched a moment before is still there
        assert await ends(bell, receipts) == undisturbed
        unknown = await bell.retrieve("req-unknown")
        assert unknown.status_code == 404


async def test_a_sample_without_a_seed_is_the_same_when_it_is_drawn_again(server: Killable) -> None:
    async with server.running() as bell:
        receipts = [await bell.ok("/api/v1/asample", model_id=name, **SAMPLE) for name in ("mine", "base")]
        first = [await bell.result(receipt) for receipt in receipts]
    async with server.running(kill=False) as bell:
        assert [await bell.result(receipt) for receipt in receipts] == first
        more = [await bell.ok("/api/v1/sample", model_id=name, **SAMPLE) for name in ("mine", "base")]
        assert all(one["sequences"] != other["sequences"] for one, other in zip(more, first, strict=True))


async def test_a_request_that_was_wrong_stays_wrong(server: Killable) -> None:
    async with server.running() as bell:
        wrong = TRAIN | {"data": [[{"role": "user", "content": "word " * 9000}]]}
        receipt = await bell.ok("/api/v1/forward_backward_async", model_id="mine", **wrong)
        step = await bell.ok("/api/v1/optim_step_async", model_id="mine", **ADAM)
        first = await bell.end(receipt)
        assert first.status_code == 500
    async with server.running(kill=False) as bell:
        assert (await bell.end(receipt)).json() == first.json()
        assert (await bell.result(step))["status"] == "applied"


async def test_removed_names_stay_removed(server: Killable) -> None:
    async with server.running() as bell:
        made = await bell.lora()
        await bell.train("mine")
        for name in (made, "mine"):
            await bell.ok("/api/v1/remove_lora", model_id=name)
    async with server.running(kill=False) as bell:
        gone = await bell.post("/api/v1/optim_step", model_id=made, **ADAM)
        assert "remove_lora" in gone.json()["detail"]
        assert (await bell.train("mine"))["created"] is True


async def test_keys_keep_what_is_theirs(server: Killable) -> None:
    mine, other = {"x-api-key": "one"}, {"x-api-key": "two"}
    async with server.running() as bell:
        made = (await bell.http.post("/api/v1/add_lora", json={}, headers=mine)).json()["model_id"]
    async with server.running(kill=False) as bell:
        body = {"model_id": made} | ADAM
        assert (await bell.http.post("/api/v1/optim_step", json=body, headers=mine)).status_code == 200
        assert (await bell.http.post("/api/v1/optim_step", json=body, headers=other)).status_code == 400


async def test_nothing_is_told_before_it_is_on_disk(server: Killable) -> None:
    async with server.running(kill=False) as bell:
        await bell.train("mine")
        ledger = server.control._ledger
        assert ledger is not None
        held: list[Any] = []
        ledger.post, post = lambda changes, on_written: held.append((changes, on_written)), ledger.post
        asked = [("forward_backward_async", TRAIN), ("optim_step_async", ADAM), ("asample", SAMPLE)]
        asked += [("add_lora_async", {}), ("forward_async", TRAIN | {"model_id": "another"})]
        bodies = [(path, {"model_id": "mine"} | body if path != "add_lora_async" else body) for path, body in asked]
        waiting = [asyncio.create_task(bell.post(f"/api/v1/{path}", **body)) for path, body in bodies]
        done, _ = await asyncio.wait(waiting, timeout=0.5)
        assert not done
        ledger.post = post  # type: ignore[method-assign]
        for changes, on_written in held:
            post(changes, on_written)
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 5


async def test_an_adapter_that_could_not_be_written_is_not_there(server: Killable) -> None:
    async with server.running(kill=False) as bell:
        await bell.lora()
        ledger = server.control._ledger
        assert ledger is not None
        post = ledger.post
        ledger.post = lambda changes, on_written: on_written(NotTaken("the disk is full"))  # type: ignore[method-assign]
        refused = await bell.post("/api/v1/forward_backward", model_id="mine", **TRAIN)
        assert refused.status_code == 507
        ledger.post = post  # type: ignore[method-assign]
        assert (await bell.train("mine"))["created"] is True


async def test_a_dead_engine_is_a_pause(server: Killable) -> None:
    async with server.running(kill=False) as bell:
        await bell.train("mine")
        bell.engine.pause()
        asked = [("forward_backward_async", TRAIN), ("optim_step_async", ADAM), ("asample", SAMPLE)]
        receipts = [await bell.ok(f"/api/v1/{path}", model_id="mine", **body) for path, body in asked]
        bell.engine.resume()
        bell.engine.die()
        results = [await bell.result(receipt) for receipt in receipts]
        assert results[1]["metrics"]["step_applied"] == 1.0
        assert [result["model_id"] for result in results] == ["mine"] * 3
