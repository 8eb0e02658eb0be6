"""Keys, commands, stored keys, and tokens that a server gives in exchange."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

import tinsmith.auth
from tests.unit.client.fake_tinker import FAST, Action, FakeTinker, Seen, status
from tinsmith.client import AuthenticationError, ConfigurationError, RestClient, ServiceClient
from tinsmith.client.config import resolve_config
from tinsmith.client.credentials import CommandKey, claims, stored_key
from tinsmith.types import AdamParams


def token(name: str, *, lives_s: float = 3600.0, **more: Any) -> str:
    now = time.time()
    told = {"exp": now + lives_s, "iat": now, "sub": f"tml:user:{name}", "org_id": "o1", "email": "a@b.test", **more}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({"alg": "x"}, told)]
    return ".".join([*parts, "signature"])


class Exchanging(FakeTinker):
    """Gives a new token at each exchange."""

    lives_s = 3600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.flags["pjwt_auth_enabled"] = True
        self.given: list[str] = []

    def do_auth_token(self, _: Any) -> httpx2.Response:
        self.given.append(token(f"u{len(self.given)}", lives_s=self.lives_s))
        return httpx2.Response(200, json={"jwt": self.given[-1]})

    def keys(self, path: str) -> list[str]:
        return [seen.headers["x-api-key"] for seen in self.of(path)]


def client_of(server: FakeTinker) -> ServiceClient:
    return ServiceClient(base_url="http://fake.test", api_key="tml-raw", timing=FAST, transport=server)


def rejecting(key: str) -> Action:
    async def act(_: FakeTinker, seen: Seen) -> httpx2.Response | None:
        if seen.headers["x-api-key"] != key:
            return None
        return httpx2.Response(401, json={}, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})

    return act


def test_a_key_is_exchanged_once_after_the_settings_and_the_token_is_sent_from_then_on() -> None:
    server = Exchanging()
    with client_of(server) as service:
        service.create_lora_training_client("m").result(5)
    assert [seen.path for seen in server.seen][:4] == [
        "client/config", "auth/token", "client/dynamic_config", "create_session"
    ]  # fmt: skip
    assert server.keys("auth/token") == ["tml-raw"]
    assert set(server.keys("create_model") + server.keys("retrieve_future")) == {server.given[0]}


def test_a_refused_token_is_replaced_once_and_the_request_repeated() -> None:
    server = Exchanging()
    with client_of(server) as service:
        training = service.create_lora_training_client("m").result(5)
        server.always["optim_step"] = rejecting(server.given[0])
        assert training.optim_step(AdamParams()).result(5).metrics == {"step:sum": 1.0}
        server.script("optim_step", status(401), status(401))
        with pytest.raises(AuthenticationError):
            training.optim_step(AdamParams()).result(5)
    assert len(server.given) == 2
    assert server.keys("optim_step") == [server.given[0], server.given[1], server.given[1]]


def test_a_token_about_to_end_is_renewed_before_it_is_sent() -> None:
    server = Exchanging()
    server.lives_s = 30.0
    with client_of(server) as service:
        service.create_lora_training_client("m").result(5)
    assert len(server.given) > 2


def test_a_key_the_exchange_refuses_is_an_error_at_once() -> None:
    server = Exchanging()
    server.always["auth/token"] = status(401)
    with client_of(server) as service, pytest.raises(AuthenticationError):
        service.create_lora_training_client("m").result(5)
    assert len(server.of("auth/token")) == 1


def test_who_one_is_stands_in_the_token() -> None:
    server = Exchanging()
    with client_of(server) as service:
        me = RestClient(service.holder).whoami().result(5)
    assert (me.user_urn, me.org_urn, me.email) == ("tml:user:u0", "tml:organization:o1", "a@b.test")


def test_a_server_may_want_credentials_from_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeTinker(flags={"credential_default_source": "credential_cmd"})
    monkeypatch.delenv("TINKER_CREDENTIAL_CMD", raising=False)
    with client_of(server) as service, pytest.raises(ConfigurationError, match="TINKER_CREDENTIAL_CMD"):
        service.create_lora_training_client("m").result(5)
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "echo tml-printed")
    with client_of(server) as service:
        service.create_lora_training_client("m").result(5)
    assert {seen.headers["x-api-key"] for seen in server.of("create_session")} == {"tml-printed"}


@pytest.mark.anyio
@pytest.mark.parametrize("command", ["true", "echo; exit 3", f"echo {token('old', lives_s=-5)}"])
async def test_a_command_that_prints_nothing_valid_is_an_error(command: str) -> None:
    with pytest.raises(ConfigurationError, match="TINKER_CREDENTIAL_CMD"):
        await CommandKey(command).value()


def test_an_expired_token_as_key_is_refused_before_it_is_sent() -> None:
    server = FakeTinker()
    old = token("u", lives_s=-1)
    with ServiceClient(base_url="http://fake.test", api_key=old, timing=FAST, transport=server) as service:
        with pytest.raises(ConfigurationError, match="has expired"):
            service.create_lora_training_client("m").result(5)
    assert server.seen == []


def test_credentials_are_found_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    url = "https://tinker.example.test"
    with pytest.raises(ConfigurationError, match="no API key for"):
        resolve_config(base_url=url, environ={})
    (tmp_path / ".tinker").mkdir()
    stored = {"version": 1, "default": "a", "keys": {"a": {"type": "manual", "key": "tml-stored", "name": "a"}}}
    (tmp_path / ".tinker" / "credentials.json").write_text(json.dumps(stored))
    both = {"TINKER_API_KEY": "tml-env", "TINKER_CREDENTIAL_CMD": "echo x"}
    assert resolve_config(base_url=url, environ={}).api_key.get_secret_value() == "tml-stored"
    assert resolve_config(base_url=url, environ={"TINKER_CREDENTIAL_CMD": "echo x"}).credential_command == "echo x"
    assert resolve_config(base_url=url, environ=both).api_key.get_secret_value() == "tml-env"
    assert resolve_config(base_url=url, api_key="k", environ=both).api_key.get_secret_value() == "k"


def test_a_damaged_file_of_credentials_is_named(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    assert stored_key(path) is None
    path.write_text("{")
    with pytest.raises(ConfigurationError, match=r"credentials\.json"):
        stored_key(path)


def test_the_hosted_service_takes_only_keys_of_its_form() -> None:
    with pytest.raises(ConfigurationError, match="must start with 'tml-'"):
        resolve_config(base_url="https://tinker.thinkingmachines.dev/x", api_key="sk-1", environ={})


def test_a_text_without_claims_is_no_token() -> None:
    with pytest.raises(ValueError, match="not a token"):
        claims("eyJ.!!")


def test_the_module_auth_answers_without_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TINKER_BASE_URL", "https://tinker.example.test")
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    assert tinsmith.auth.get_tinker_token() is None
    assert not tinsmith.auth.tinker_has_credentials()
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    assert tinsmith.auth.get_tinker_token() == "tml-x"
    assert tinsmith.auth.tinker_has_credentials()


def test_no_error_shows_a_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server = Exchanging()
    with client_of(server) as service:
        training = service.create_lora_training_client("m").result(5)
        server.script("optim_step", status(400))
        failure = training.optim_step(AdamParams()).exception(5)
    shown = f"{failure!r} {failure.__dict__} {failure.request.headers} {caplog.text}"  # type: ignore[union-attr]
    assert "tml-raw" not in shown
    assert server.given[0] not in shown
    assert "tml-raw" not in repr(service.holder.config)
