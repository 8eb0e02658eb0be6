"""Training that goes on: against a real server that is killed, a model that is corrupted, a session that is ended."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

import tinsmith as tinker
from tinsmith import types
from tinsmith.client import Timing
from tinsmith.recovery import CheckpointPolicy, Recovery, RecoveryPolicy, Step, Trigger
from tinsmith.types.events import Event

NUM_STEPS = 30
PATIENT = Timing(poll_retry_initial=0.1, poll_retry_max=0.5, retry_initial=0.1, retry_max=0.5, close_timeout=2.0)
POLICY = RecoveryPolicy(enabled=True, backoff_ms=200, poll_interval_ms=60_000)


class Kept:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        return None

    def recovery(self) -> list[str]:
        return [event.name.removeprefix("recovery.") for event in self.events if event.name.startswith("recovery.")]


class Server:
    """`tinsmith serve` on one port and one data folder, which can be killed and come back."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._folder = folder
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        # without a ledger, as servers of others are: one that has it would go on by itself
        command = [sys.executable, "-c", "import tinsmith.cli as c; c.main()", "serve", "--dtype", "float32"]
        command += ["--no-ledger"]
        self._process = subprocess.Popen(
            [*command, "--port", str(self._port), "--data-dir", str(self._folder)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert re.search(r"http://127\.0\.0\.1:\d+", ready), f"the server said {ready!r}"

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("data"))
    yield running
    running.stop()


def batch(position: int) -> list[types.Datum]:
    tokens = np.random.default_rng(position).integers(5, 200, size=(2, 12))
    return [
        types.Datum(types.ModelInput.from_ints(row[:-1].tolist()), {"target_tokens": row[1:], "weights": [1.0] * 11})
        for row in tokens
    ]


def poison() -> list[types.Datum]:
    """Finite data whose gradient is not."""
    tokens = [7, 8, 9, 10]
    return [types.Datum(types.ModelInput.from_ints(tokens), {"target_tokens": tokens, "weights": [3e38] * 4})]


def train(step: Step[list[types.Datum]]) -> None:
    """Rates differ by step, so that a step taken twice, or out of its place, would show in the weights."""
    passed = step.client.forward_backward(step.batch, "cross_entropy")
    step.client.optim_step(types.AdamParams(learning_rate=1e-3 * (1 + step.index % 7))).result(120)
    step.report(loss=passed.result(120).loss)


def fingerprint(client: tinker.TrainingClient) -> list[float]:
    outputs = client.forward(batch(10_000), "cross_entropy").result(60)
    return [value for tensor in outputs.logprobs for value in tensor.tolist()]


def undisturbed(server: Server, **model: Any) -> list[float]:
    with tinker.ServiceClient(base_url=server.url) as service:
        client = service.create_lora_training_client("tinsmith/tiny", rank=4, seed=5).result(60)
        for position in range(NUM_STEPS):
            client.forward_backward(batch(position), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-3 * (1 + position % 7)))
        return fingerprint(client)


def end_session(server: Server, recovery: Recovery) -> None:
    session_id = recovery.service.holder.link.opened_session_id
    body = {"reason": {"type": "interrupted"}, "detail": "a test"}
    httpx2.post(f"{server.url}/api/v1/sessions/{session_id}/finish", json=body).raise_for_status()


@pytest.mark.timeout(280)
def test_a_run_that_is_corrupted_killed_and_cut_off_ends_with_the_weights_of_an_undisturbed_one(server: Server) -> None:
    expected = undisturbed(server)
    troubles = {7, 15, 22}
    taken: Counter[int] = Counter()
    kept, told = Kept(), []
    policy = RecoveryPolicy(
        enabled=True,
        backoff_ms=200,
        poll_interval_ms=60_000,
        on_recovery=lambda old, client, checkpoint: told.append((old, client.model_id, checkpoint.step)),
    )
    with tinker.ServiceClient(base_url=server.url, timing=PATIENT, telemetry=[kept]) as service:
        recovery = Recovery.start(
            service,
            policy=policy,
            checkpoints=CheckpointPolicy(save_every=5, keep_last=2),
            base_model="tinsmith/tiny",
            rank=4,
            seed=5,
        )
        with recovery:
            for step in recovery.steps(NUM_STEPS, batch):
                with step:
                    if step.number in troubles:
                        troubles.discard(step.number)
                        match step.number:
                            case 7:
                                step.client.forward_backward(poison(), "cross_entropy")
                            case 15:
                                server.kill()
                                threading.Thread(target=server.start).start()
                            case 22:
                                end_session(server, recovery)
                    train(step)
                    taken[step.number] += 1
            assert recovery.done == NUM_STEPS
            assert fingerprint(recovery.client) == expected
            lineage = recovery.lineage
            steps_saved = [one.step for one in recovery.checkpoints]
    assert [change.trigger for change in lineage] == [Trigger.CORRUPTED, Trigger.DEAD_SESSION, Trigger.DEAD_SESSION]
    assert [(change.at_step, change.checkpoint.step) for change in lineage] == [(6, 5), (14, 10), (21, 20)]
    assert taken == Counter(dict.fromkeys(range(1, 31), 1)) + Counter([6, 11, 12, 13, 14, 21])
    assert [(old, new) for old, new, _ in told] == [(change.old_run_id, change.new_run_id) for change in lineage]
    assert steps_saved == [25, 30]
    one = ["detected", "started", "checkpoint_selected", "client_created", "completed"]
    assert [name for name in kept.recovery() if name != "attempt_failed"] == one * 3


def test_three_runs_recover_side_by_side(server: Server) -> None:
    expected = undisturbed(server)
    results: dict[int, list[float]] = {}

    def one(number: int) -> None:
        with tinker.ServiceClient(base_url=server.url, timing=PATIENT) as service:
            checkpoints = CheckpointPolicy(save_every=5)
            model: dict[str, Any] = {"base_model": "tinsmith/tiny", "rank": 4, "seed": 5}
            with Recovery.start(service, policy=POLICY, checkpoints=checkpoints, **model) as recovery:
                for step in recovery.steps(NUM_STEPS, batch):
                    with step:
                        if step.number == 8 + number and not recovery.lineage:
                            step.client.forward_backward(poison(), "cross_entropy")
                        train(step)
                assert len(recovery.lineage) == 1
                results[number] = fingerprint(recovery.client)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert set(results) == {0, 1, 2}
    for values in results.values():
        np.testing.assert_allclose(values, expected, rtol=0, atol=2e-4)


def test_another_process_goes_on_where_the_first_one_stopped(server: Server) -> None:
    model: dict[str, Any] = {"base_model": "tinsmith/tiny", "rank": 4, "seed": 5}
    checkpoints = CheckpointPolicy(save_every=4)
    with tinker.ServiceClient(base_url=server.url) as service:
        with Recovery.resume(service, name="long-run", policy=POLICY, checkpoints=checkpoints, **model) as recovery:
            for step in recovery.steps(NUM_STEPS, batch):
                with step:
                    train(step)
                if step.number == 13:
                    break
    with tinker.ServiceClient(base_url=server.url) as service:
        with Recovery.resume(service, name="long-run", policy=POLICY, checkpoints=checkpoints, **model) as recovery:
            assert recovery.done == 12
            for step in recovery.steps(NUM_STEPS, batch):
                with step:
                    train(step)
            assert fingerprint(recovery.client) == undisturbed(server)


def take_step(recovery: Recovery, data: list[types.Datum]) -> None:
    for step in recovery.steps(1):
        with step:
            step.client.forward_backward(data, "cross_entropy").result(60)


def test_mistakes_in_the_data_are_not_recovered_from(server: Server) -> None:
    bad = [types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 10**6], "weights": [1.0, 1.0]})]
    kept = Kept()
    with tinker.ServiceClient(base_url=server.url, telemetry=[kept]) as service:
        with Recovery.start(service, policy=POLICY, base_model="tinsmith/tiny", rank=4, seed=5) as recovery:
            with pytest.raises(tinker.RequestFailedError, match="1000000"):
                take_step(recovery, bad)
            assert recovery.done == 0
    assert kept.recovery() == []
