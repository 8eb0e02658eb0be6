"""Sessions: heartbeats, farewell, and what a client leaves behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time

import pytest

from tests.unit.client.fake_tinker import FakeTinker, no_connection, status, until
from tinsmith import types
from tinsmith.client import (
    NotFoundError,
    ServiceClient,
    Timing,
    TrainingClient,
)
from tinsmith.client.config import resolve_config
from tinsmith.client.http import Http
from tinsmith.client.session import heartbeats


def client_of(server: FakeTinker, **timing: float) -> ServiceClient:
    times = {"retry_initial": 0.005, "retry_max": 0.02, "startup_give_up": 0.2, "close_timeout": 0.3, **timing}
    return ServiceClient(base_url="http://fake.test", api_key="k", timing=Timing(**times), transport=server)


def wait_for(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.005)
    assert condition()  # type: ignore[operator]


def test_a_session_says_who_it_is(server: FakeTinker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TAGS", "a, b")
    with ServiceClient(
        {"user": "x"}, "project", display_name="night run", base_url="http://f.test", api_key="k", transport=server
    ) as service:
        service.create_sampling_client(base_model="m").result(5)
    body = server.of("create_session")[0].body
    assert body.pop("sdk_version")
    assert body == {
        "tags": ["a", "b"],
        "user_metadata": {"user": "x"},
        "project_id": "project",
        "display_name": "night run",
        "type": "create_session",
    }


def test_one_session_serves_many_clients_made_at_once(service: ServiceClient, server: FakeTinker) -> None:
    futures = [service.create_lora_training_client("m") for _ in range(8)]
    assert sorted(future.result(5).model_id for future in futures) == [f"s:train:{i}" for i in range(8)]
    assert (len(server.of("create_session")), len(server.of("client/config"))) == (1, 1)


def test_heartbeats_come_on_time(server: FakeTinker) -> None:
    with client_of(server, heartbeat_every=0.02) as service:
        service.create_lora_training_client("m").result(5)
        started = time.monotonic()
        wait_for(lambda: len(server.of("session_heartbeat")) >= 10)
        assert time.monotonic() - started < 1.0
    assert server.of("session_heartbeat")[0].body == {"session_id": "s", "type": "session_heartbeat"}
    beats = len(server.of("session_heartbeat"))
    time.sleep(0.05)
    assert len(server.of("session_heartbeat")) == beats


def test_heartbeats_go_on_after_errors_and_end_when_the_session_is_gone(server: FakeTinker) -> None:
    server.script("session_heartbeat", status(500), no_connection(), status(410))
    with client_of(server, heartbeat_every=0.01) as service:
        service.create_lora_training_client("m").result(5)
        wait_for(lambda: len(server.of("session_heartbeat")) >= 3)
        time.sleep(0.05)
    assert len(server.of("session_heartbeat")) == 3


def test_long_silence_is_warned_about_once_per_period(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeTinker()
    server.always["session_heartbeat"] = status(503)
    timing = Timing(heartbeat_every=0.01, heartbeat_warn_after=0.1)
    config = resolve_config(base_url="http://fake.test", api_key="k", timing=timing)

    async def beat() -> None:
        http = Http(config, server)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.35):
                await heartbeats(http, "s", config)
        await http.close()

    with caplog.at_level(logging.WARNING, "tinsmith.client"):
        asyncio.run(beat())
    warnings = [record.getMessage() for record in caplog.records if "no heartbeat" in record.getMessage()]
    assert 1 <= len(warnings) <= 3
    assert warnings[0].startswith("no heartbeat of session s has reached http://fake.test for")


def test_sixty_blocked_samples_delay_no_heartbeat_and_no_poll(server: FakeTinker) -> None:
    gate = threading.Event()
    server.always["asample"] = until(gate)
    with client_of(server, heartbeat_every=0.02) as service:
        training = service.create_lora_training_client("m").result(5)
        sampling = service.create_sampling_client(base_model="m").result(5)
        prompt, params = types.ModelInput.from_ints([1]), types.SamplingParams(max_tokens=1)
        samples = [sampling.sample(prompt, 1, params) for _ in range(60)]
        wait_for(lambda: len(server.of("asample")) == 50)
        beats, started = len(server.of("session_heartbeat")), time.monotonic()
        assert training.optim_step(types.AdamParams()).result(1).metrics == {"step:sum": 1.0}
        wait_for(lambda: len(server.of("session_heartbeat")) >= beats + 5)
        assert time.monotonic() - started < 1.0
        assert len(server.of("asample")) == 50
        gate.set()
        assert all(len(sample.result(5).sequences) == 1 for sample in samples)


@pytest.mark.parametrize(
    ("error", "reason"), [(None, "success"), (ValueError("bad lr"), "errored"), (KeyboardInterrupt(), "interrupted")]
)
def test_leaving_the_block_tells_the_server_how_it_went(
    server: FakeTinker, error: BaseException | None, reason: str
) -> None:
    def run() -> None:
        with client_of(server) as service:
            service.create_lora_training_client("m").result(5)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    (finish,) = server.of("sessions/s/finish")
    assert finish.body["reason"] == {"type": reason}
    assert finish.body["detail"] == ("ValueError: bad lr" if reason == "errored" else finish.body["detail"])


def test_close_is_idempotent_and_the_first_reason_wins(server: FakeTinker) -> None:
    service = client_of(server)
    service.create_lora_training_client("m").result(5)
    assert service.close("errored", "diverged").result(5) is None
    assert service.close("success").result(5) is None
    with service:
        pass
    (finish,) = server.of("sessions/s/finish")
    assert finish.body == {"reason": {"type": "errored"}, "detail": "diverged"}
    with pytest.raises(ValueError, match="status must be one of"):
        service.close("fine")  # type: ignore[arg-type]


def test_a_farewell_the_server_refuses_is_raised_by_close_and_logged_by_the_block(
    server: FakeTinker, caplog: pytest.LogCaptureFixture
) -> None:
    server.always["sessions/s/finish"] = status(404)
    service = client_of(server)
    service.create_lora_training_client("m").result(5)
    with pytest.raises(NotFoundError):
        service.close().result(5)
    with client_of(server) as service:
        service.create_lora_training_client("m").result(5)
    assert "the end of the session could not be reported" in caplog.text


def test_closing_fails_what_is_under_way(training: TrainingClient, service: ServiceClient, server: FakeTinker) -> None:
    server.always["retrieve_future"] = until(threading.Event())
    future = training.optim_step(types.AdamParams())
    service.close().result(5)
    with pytest.raises(Exception, match="closed before this request finished"):
        future.result(5)


def drop(owned: list[TrainingClient]) -> None:
    owned.clear()
    gc.collect()


def test_a_client_nobody_closed_says_goodbye_when_it_is_collected(server: FakeTinker) -> None:
    service = client_of(server)
    training = service.create_lora_training_client("m").result(5)
    del service
    gc.collect()
    assert training.optim_step(types.AdamParams()).result(5) is not None
    owned = [training]
    del training
    with pytest.warns(ResourceWarning, match=r"a ServiceClient of http://fake\.test was never closed"):
        drop(owned)
    wait_for(lambda: len(server.of("sessions/s/finish")) == 1)
    assert server.of("sessions/s/finish")[0].body["reason"] == {"type": "success"}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_pending_result_keeps_its_client_alive(server: FakeTinker) -> None:
    gate = threading.Event()
    service = client_of(server)
    training = service.create_lora_training_client("m").result(5)
    server.script("retrieve_future", until(gate))
    future = training.optim_step(types.AdamParams())
    del service, training
    gc.collect()
    gate.set()
    assert future.result(5).metrics == {"step:sum": 1.0}


def test_a_session_shared_with_other_processes_outlives_a_collected_client(server: FakeTinker) -> None:
    service = client_of(server)
    sampling = service.create_sampling_client(base_model="m").result(5)
    sampling.get_sampler_handle()
    thread = sampling._connection.loop
    del service, sampling
    gc.collect()
    thread.join(5)
    assert server.of("sessions/s/finish") == []


@pytest.mark.parametrize(("ending", "reason"), [("", "success"), ("raise ValueError('x')", "errored")])
def test_a_program_that_just_ends_says_goodbye(ending: str, reason: str) -> None:
    program = f"""
from tests.unit.client.fake_tinker import FAST, FakeTinker, Seen
import tinsmith
class Loud(FakeTinker):
    async def usual(self, seen):
        if seen.path.endswith("/finish"):
            print(seen.body["reason"]["type"], flush=True)
        return await super().usual(seen)
service = tinsmith.ServiceClient(base_url="http://fake.test", api_key="k", timing=FAST, transport=Loud())
service.create_lora_training_client("m").result(5)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == f"{reason}\n"
    assert done.stderr.count("Traceback") == (1 if ending else 0)


def test_a_server_that_cannot_be_reached_is_an_error_soon_and_a_second_try_can_work(server: FakeTinker) -> None:
    server.always["client/config"] = no_connection()
    with client_of(server) as service:
        with pytest.raises(Exception, match=r"Connection error: POST http://fake\.test"):
            service.create_lora_training_client("m").result(5)
        del server.always["client/config"]
        assert service.create_lora_training_client("m").result(5).model_id == "s:train:1"


def test_unknown_arguments_are_ignored_with_a_warning(server: FakeTinker) -> None:
    with pytest.warns(FutureWarning, match="ignores unsupported arguments: colour"):
        client = ServiceClient(base_url="http://f.test", api_key="k", transport=server, colour="red")
    client.close().result(5)
