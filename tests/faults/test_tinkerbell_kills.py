"""A script of the Tinkerbell dialect goes on under the same names and futures when its server is killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.faults.killing import Daemon, daemon

CHATS = [
    [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}] for word in ("one", "two")
]
REWARDS = {"rewards": [1.0, -1.0], "kl_coeff": 0.1}
ADAM = {"adam_params": {"learning_rate": 0.01}}
WAIT_S = 240.0


class Script:
    """Sends again until it is answered only where nothing was taken: asking for results."""

    def __init__(self, server: Daemon) -> None:
        self._server = server
        self._http = httpx2.Client(base_url=server.url, timeout=60)

    def start(self, path: str, **body: Any) -> str:
        answer = self._http.post(f"/api/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def end(self, request_id: str) -> Any:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                answer = self._http.post("/retrieve_future", json={"request_id": request_id})
            except httpx2.TransportError:
                time.sleep(0.2)
                continue
            if answer.status_code in (200, 500):
                assert answer.status_code == 200, answer.text
                return answer.json()
            assert answer.status_code in (202, 503), answer.text
            time.sleep(0.05)
        raise AssertionError(f"no result; the server said:\n{self._server.log()[-3000:]}")

    def steps(self, name: str, *, kill: bool) -> list[Any]:
        asked = [
            self.start("forward_backward_async", model_id=name, data=CHATS, loss_fn="cross_entropy"),
            self.start(
                "forward_backward_async",
                model_id=name,
                data=CHATS,
                loss_fn="importance_sampling",
                loss_fn_inputs=REWARDS,
            ),
            self.start("optim_step_async", model_id=name, **ADAM),
            self.start(
                "asample", model_id=name, prompts=["Once"], sampling_params={"max_tokens": 8, "seed": 5}, num_samples=2
            ),
        ]
        if kill:
            self._server.kill_server()
        return [self.end(request_id) for request_id in asked]

    def close(self) -> None:
        self._http.close()


def run(folder: Path, kills: frozenset[int]) -> tuple[int, list[Any]]:
    """How often the server was started, and all that a run of three rounds was told."""
    with daemon(folder, snapshot_requests=4) as server:
        script = Script(server)
        try:
            made = script.end(script.start("add_lora_async", rank=4, seed=1))["model_id"]
            told: list[Any] = []
            for number in range(3):
                told += script.steps(made, kill=number in kills)
        finally:
            script.close()
        for result in told:
            assert result.pop("model_id") == made
        return server.num_starts, told


@pytest.mark.timeout(600)
def test_names_futures_and_training_survive_the_death_of_the_server_bitwise(tmp_path: Path) -> None:
    num_starts, undisturbed = run(tmp_path / "undisturbed", frozenset())
    assert num_starts == 1
    num_starts, disturbed = run(tmp_path / "disturbed", frozenset({1, 2}))
    assert num_starts == 3
    assert disturbed == undisturbed
