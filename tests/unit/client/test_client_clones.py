"""What a sampling client does in another process: on a session that somebody else opened."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker
from tests.unit.client.test_client_auth import Exchanging
from tests.unit.client.test_client_service_settings import PARAMS, PROMPT, wait_for
from tinsmith.client import SamplingClient, ServiceClient
from tinsmith.client.config import ServerFlags, resolve_config
from tinsmith.client.connection import Connection
from tinsmith.client.session import JoinedSession
from tinsmith.types.replies import ClientDynamicConfigResponse


@contextmanager
def clone_of(server: FakeTinker, **settings: object) -> Iterator[SamplingClient]:
    timing = replace(FAST, heartbeat_every=0.01)
    config = resolve_config(base_url="http://fake.test", api_key="tml-raw", timing=timing, transport=server)
    joined = JoinedSession(
        session_id="s",
        flags=ServerFlags.model_validate(server.flags),
        dynamic=ClientDynamicConfigResponse.model_validate(settings),
    )
    connection = Connection(config, joined=joined)
    yield SamplingClient(connection, "s", "s:sample:0", base_model=None, is_clone=True)
    connection.close("success", None).result(5)


def test_a_clone_keeps_the_session_alive_and_never_finishes_it() -> None:
    server = FakeTinker()
    with clone_of(server) as clone:
        clone.sample(PROMPT, 1, PARAMS).result(5)
        wait_for(lambda: len(server.of("session_heartbeat")) >= 2)
    assert server.of("session_heartbeat")[0].body["session_id"] == "s"
    assert not server.of("sessions/s/finish")
    assert not server.of("create_session")


def test_a_clone_exchanges_its_key_where_the_server_wants_tokens() -> None:
    server = Exchanging()
    with clone_of(server) as clone:
        clone.sample(PROMPT, 1, PARAMS).result(5)
    assert server.keys("auth/token") == ["tml-raw"]
    assert set(server.keys("asample") + server.keys("retrieve_future")) == {server.given[0]}


def test_a_clone_that_only_describes_itself_shows_a_token_too() -> None:
    server = Exchanging()

    async def describe(_: FakeTinker, __: object) -> httpx2.Response:
        return httpx2.Response(200, json={"sampler_id": "s:sample:0", "base_model": "m"})

    server.always["samplers/s:sample:0"] = describe
    with clone_of(server) as clone:
        assert clone.get_base_model() == "m"
    assert server.keys("samplers/s:sample:0") == server.given


@pytest.mark.parametrize("in_a_handle", [True, False])
def test_a_clone_takes_the_servers_settings_and_its_own_along(in_a_handle: bool, server: FakeTinker) -> None:
    server.settings = {"sample_cancel_enabled": True}
    with ServiceClient(base_url="http://127.0.0.1:9", timing=FAST, transport=server) as service:
        sampling = service.create_sampling_client(base_model="m").result(5)
        if in_a_handle:
            clone = SamplingClient.from_sampler_handle(sampling.get_sampler_handle())
        else:
            clone = pickle.loads(pickle.dumps(sampling))
        assert clone._connection.link.dynamic.sample_cancel_enabled
        assert clone._connection.config.timing == FAST
        clone._connection.close("success", None).result(5)


def test_a_handle_of_an_older_client_still_works(server: FakeTinker) -> None:
    with ServiceClient(base_url="http://127.0.0.1:9", timing=FAST, transport=server) as service:
        handle = service.create_sampling_client(base_model="m").result(5).get_sampler_handle()
    told = json.loads(base64.urlsafe_b64decode(handle))
    for newer in ("dynamic", "timing"):
        told.pop(newer, None)
    clone = SamplingClient.from_sampler_handle(base64.urlsafe_b64encode(json.dumps(told).encode()).decode())
    assert not clone._connection.link.dynamic.sample_cancel_enabled
    clone._connection.close("success", None).result(5)
