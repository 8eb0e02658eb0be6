"""Our own client against a real server with other settings: one poll for all samples, little room, keys for tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinsmith as tinker
from tests.protocol.conftest import Server, running_server
from tinsmith.client import Timing
from tinsmith.types.events import Event

PROMPT = tinker.ModelInput.from_ints([20, 21, 22])
SOON = Timing(backpressure_pause=0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, str(Path(__file__).with_name("serve_with_settings.py"))]
    arguments = [
        json.dumps({"sample_poller": True, "poll_hold_s": 2.0}),
        json.dumps({"max_pending_samples": 8}),
        "tinsmith/tiny",
    ]
    with running_server(tmp_path_factory.mktemp("own"), command=command + arguments) as running:
        yield running


class Paths:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def write(self, event: Event) -> None:
        if event.name == "http.request":
            self.seen.append(str(event.fields["path"]))

    def close(self) -> None:
        return None


def test_many_samples_share_one_poll_and_find_room_in_a_small_server(server: Server) -> None:
    paths = Paths()
    with tinker.ServiceClient(base_url=server.url, timing=SOON, telemetry=[paths]) as service:
        sampler = service.create_sampling_client(base_model="tinsmith/tiny").result(60)
        params = tinker.SamplingParams(max_tokens=4, temperature=0.0)
        futures = [sampler.sample(PROMPT, 1, params) for _ in range(30)]
        drawn = {tuple(future.result(60).sequences[0].tokens) for future in futures}
    assert len(drawn) == 1
    assert paths.seen.count("retrieve_future") == 30
    assert 1 <= paths.seen.count("retrieve_futures") < 60
    assert paths.seen.count("asample") > 30


def test_a_server_that_wants_tokens_gets_one_and_says_who_we_are(server: Server) -> None:
    paths = Paths()
    with tinker.ServiceClient(
        base_url=server.url, telemetry=[paths], default_headers_overrides={"User-Agent": "another client"}
    ) as service:
        me = tinker.RestClient(service.holder).whoami().result(30)
        client = service.create_lora_training_client("tinsmith/tiny", rank=2).result(60)
        assert client.optim_step(tinker.AdamParams()).result(60).metrics is not None
    assert me.user_urn
    assert me.org_urn.startswith("tml:organization:")
    assert paths.seen[:3] == ["client/config", "auth/token", "client/dynamic_config"]
    assert paths.seen.count("auth/token") == 1
