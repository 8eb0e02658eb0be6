"""SIGTERM with work in flight: what runs is finished, what waits goes on later, a second signal ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.protocol.conftest import Server, running_server
from tests.unit.server.tinker_client import datum
from tinsmith.wire.tinker_proto import CONTENT_TYPE, TrainRequest, encode_train_request

OPTIONS = ("--dtype", "float32", "--deterministic")
STEPS = 24
MAX_TOKENS = 400


class Work:
    """One model that is trained and one sampler that draws, through plain HTTP."""

    def __init__(self, server: Server) -> None:
        self.http = httpx2.Client(base_url=f"{server.url}/api/v1/", timeout=60)

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *failure: object) -> None:
        self.http.close()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def begin(self) -> list[str]:
        """Ids of many training requests, optimizer steps and samples, all under way."""
        session = self.post("create_session")["session_id"]
        config = {"rank": 4, "seed": 1}
        made = self.post(
            "create_model", session_id=session, model_seq_id=0, base_model="tinsmith/tiny", lora_config=config
        )
        model = f"{session}:train:0"
        self.result(made["request_id"])
        sampler = self.post(
            "create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="tinsmith/tiny"
        )["sampling_session_id"]
        ids = [self.train(model, 2 * step + 1) for step in range(STEPS)]
        steps = ({"model_id": model, "seq_id": 2 * step + 2, "adam_params": {}} for step in range(STEPS))
        ids += [self.post("optim_step", **body)["request_id"] for body in steps]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
        params = {"max_tokens": MAX_TOKENS, "temperature": 1.0, "seed": 3}
        for seq in range(4):
            sample = {"sampling_session_id": sampler, "seq_id": seq, "num_samples": 2, "prompt": prompt}
            ids.append(self.post("asample", **sample, sampling_params=params)["request_id"])
        return ids

    def train(self, model: str, seq: int) -> str:
        data = tuple(datum(list(range(10 + i, 74 + i))) for i in range(8))
        request = TrainRequest(
            model_id=model, seq_id=seq, data=data, loss_fn="cross_entropy", loss_fn_config={}, forward_only=False
        )
        headers = {"content-type": CONTENT_TYPE}
        answer = self.http.post("forward_backward", content=encode_train_request(request), headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def result(self, request_id: str) -> dict[str, Any]:
        for _ in range(20):
            answer = self.http.post("retrieve_future", json={"request_id": request_id})
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()
        raise AssertionError(f"no result of {request_id}")

    def answer(self, request_id: str) -> dict[str, Any]:
        """As `result`; names of the process's own left out."""
        return {key: value for key, value in self.result(request_id).items() if key != "request_id"}


def stop(server: Server, *signals: signal.Signals) -> float:
    """Seconds until the server and its engine are gone; it must say 0."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    began = time.monotonic()
    for number in signals:
        server.process.send_signal(number)
        time.sleep(0.3)
    try:
        assert server.process.wait(60) == 0, server.log.read_text()
    except subprocess.TimeoutExpired:
        raise AssertionError(server.log.read_text()) from None
    took = time.monotonic() - began
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    return took


def test_what_is_in_flight_at_the_end_goes_on_at_the_next_start(tmp_path: Path) -> None:
    with running_server(tmp_path, *OPTIONS) as undisturbed, Work(undisturbed) as work:
        expected = [work.answer(request_id) for request_id in work.begin()]
    (tmp_path / "again").mkdir()
    with running_server(tmp_path / "again", *OPTIONS) as first, Work(first) as work:
        ids = work.begin()
        stop(first, signal.SIGTERM)
        said = first.log.read_text()
        assert "Stopping: what runs is finished, what waits is kept." in said
        assert "go on at the next start." in said
        assert "Traceback" not in said
        assert "ERROR" not in said
    with running_server(tmp_path / "again", *OPTIONS) as second, Work(second) as work:
        assert [work.answer(request_id) for request_id in ids] == expected


def test_a_second_signal_ends_a_server_whose_engine_hangs(tmp_path: Path) -> None:
    with running_server(tmp_path, *OPTIONS) as first, Work(first) as work:
        ids = work.begin()
        (engine,) = psutil.Process(first.process.pid).children()
        os.kill(engine.pid, signal.SIGSTOP)
        assert stop(first, signal.SIGTERM, signal.SIGINT) < 20
        said = first.log.read_text()
        assert "Stopping at once." in said
        assert "Traceback" not in said
    with running_server(tmp_path, *OPTIONS) as second, Work(second) as work:
        assert all("error" not in work.answer(request_id) for request_id in ids[-6:])
