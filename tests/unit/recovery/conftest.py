"""A fake server whose runs can be corrupted, forgotten or stalled, and which keeps a list of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker, Seen
from tinsmith.client import ServiceClient
from tinsmith.types.events import Event

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class Kept:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        return None

    def recovery(self) -> list[str]:
        return [event.name.removeprefix("recovery.") for event in self.events if event.name.startswith("recovery.")]

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


@dataclass
class RecoverableTinker(FakeTinker):
    """`state[model]` is the list of optimizer steps in it; loading a checkpoint brings its list back."""

    corrupted: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)
    state: dict[str, list[float]] = field(default_factory=dict)
    dead_sessions: set[str] = field(default_factory=set)
    sessions: int = 0

    async def usual(self, seen: Seen) -> httpx2.Response:
        parts = seen.path.split("/")
        if parts[0] == "training_runs" and len(parts) == 2:
            return self._run(parts[1])
        if parts[0] == "training_runs" and parts[-1] == "checkpoints":
            return httpx2.Response(200, json={"checkpoints": self._listed(parts[1])})
        if parts[0] == "training_runs" and len(parts) == 5:
            path = f"tinker://{parts[1]}/{parts[3]}/{parts[4]}"
            return httpx2.Response(204 if self.stored.pop(path, None) else 404)
        if parts[0] == "checkpoints":
            return httpx2.Response(200, json={"checkpoints": self._listed(None)})
        if seen.path == "session_heartbeat" and seen.body["session_id"] in self.dead_sessions:
            return httpx2.Response(410, json={"detail": "the session has ended"})
        return await super().usual(seen)

    def do_create_session(self, _: Any) -> httpx2.Response:
        self.sessions += 1
        return httpx2.Response(200, json={"session_id": f"s{self.sessions}"})

    def do_create_model(self, body: Any) -> httpx2.Response:
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        self.state[model_id] = []
        return self._accept(model_id, 0, {"model_id": model_id})

    def do_optim_step(self, body: Any) -> httpx2.Response:
        if refusal := self._refusal(body):
            return refusal
        self.state[body["model_id"]].append(body["adam_params"]["learning_rate"])
        return super().do_optim_step(body)

    def do_forward_backward(self, body: Any) -> httpx2.Response:
        return self._refusal(body) or super().do_forward_backward(body)

    def do_save_weights(self, body: Any) -> httpx2.Response:
        if refusal := self._refusal(body):
            return refusal
        path = f"tinker://{body['model_id']}/weights/{body['path']}"
        self.stored[path] = {
            "state": list(self.state[body["model_id"]]),
            "time": EPOCH + timedelta(seconds=len(self.stored)),
            "user_metadata": body.get("user_metadata"),
        }
        return super().do_save_weights(body)

    def do_load_weights(self, body: Any) -> httpx2.Response:
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        if body["path"] not in self.stored:
            return httpx2.Response(404, json={"detail": f"no checkpoint {body['path']}"})
        self.state[model_id] = list(self.stored[body["path"]]["state"])
        return self._accept(model_id, 0, {"model_id": model_id, "path": body["path"]})

    def do_get_info(self, body: Any) -> httpx2.Response:
        if body["model_id"] in self.gone:
            return httpx2.Response(404, json={"detail": f"no model {body['model_id']}"})
        return super().do_get_info(body)

    def _refusal(self, body: Any) -> httpx2.Response | None:
        model = body["model_id"]
        if model in self.corrupted or model in self.gone or model.partition(":")[0] in self.dead_sessions:
            refused = {"error": f"{model} refuses", "category": "user"}
            return self._accept(model, body["seq_id"], refused)
        return None

    def _run(self, run_id: str) -> httpx2.Response:
        run = {
            "training_run_id": run_id,
            "base_model": "m",
            "model_owner": "o",
            "is_lora": True,
            "corrupted": run_id in self.corrupted,
            "last_request_time": EPOCH.isoformat(),
        }
        return httpx2.Response(200, json=run)

    def _listed(self, run_id: str | None) -> list[dict[str, Any]]:
        return [
            {
                "checkpoint_id": path.removeprefix("tinker://").partition("/")[2],
                "checkpoint_type": "training",
                "time": kept["time"].isoformat(),
                "tinker_path": path,
                "user_metadata": kept["user_metadata"],
            }
            for path, kept in self.stored.items()
            if run_id is None or path.startswith(f"tinker://{run_id}/")
        ]


@pytest.fixture
def server() -> RecoverableTinker:
    return RecoverableTinker()


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def service(server: RecoverableTinker, kept: Kept) -> Iterator[ServiceClient]:
    with ServiceClient(
        base_url="http://fake.test", api_key="tml-k", timing=FAST, transport=server, telemetry=[kept]
    ) as client:
        yield client
