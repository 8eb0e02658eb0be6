"""How one client talks to one server. A value of its own per client: nothing here is global."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypedDict

import httpx2
from pydantic import SecretStr

from tinsmith.client.credentials import stored_key
from tinsmith.client.errors import ConfigurationError
from tinsmith.types.events import EventSink
from tinsmith.types.replies import ClientConfigResponse
from tinsmith.types.rest import is_hosted

LOCAL_URL = "local:"
"""The server embedded in this process, with the base model that ships."""

LOCAL_API_KEY = "tml-local"
"""Sent where no key is configured and none is needed: to the embedded server and to loopback addresses."""

PROTOCOL_VERSION = "0.38.0"
"""The revision of the Tinker protocol this client speaks, sent as `sdk_version`."""

Timeout = httpx2.Timeout
"""For annotations of older scripts; here a timeout is a number of seconds."""


class RequestOptions(TypedDict, total=False):
    """For annotations of older scripts: no public method takes one."""

    headers: Mapping[str, str]
    max_retries: int
    timeout: float | Timeout | None
    params: Mapping[str, object]
    extra_json: Mapping[str, object]
    idempotency_key: str
    follow_redirects: bool


_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Every wait of the client, in seconds. The defaults suit both a laptop and a hosted service."""

    request_timeout: float = 60.0
    heartbeat_timeout: float = 10.0
    poll_timeout: float = 45.0
    """A poll that got no answer by then is a failed poll; servers hold polls 20 to 30 s."""
    startup_give_up: float = 30.0
    """How long a server that cannot be reached is tried before the first call fails."""
    submit_give_up: float = 300.0
    """How long one submit is retried."""
    poll_give_up: float = 300.0
    """How long polls of one request may keep failing. Polls that answer "not yet" are no failures."""
    retry_initial: float = 0.5
    retry_max: float = 10.0
    poll_retry_initial: float = 1.0
    poll_retry_max: float = 30.0
    poll_pause_initial: float = 0.02
    """First pause after a "not yet" that the server did not hold."""
    poll_pause_max: float = 1.0
    poll_held: float = 1.0
    """A "not yet" that took at least this long was held, and is asked again at once."""
    backpressure_pause: float = 1.0
    """Pause before a sample is offered again to a server that had no room for it."""
    backpressure_pause_large: float = 5.0
    billing_pause: float = 5.0
    """Pause before a request that was answered 402 is tried again."""
    breaker_threshold: int = 5
    """So many calls in a row that failed after all their retries make an endpoint rest; 0 never does."""
    breaker_reset: float = 30.0
    heartbeat_every: float = 10.0
    heartbeat_warn_after: float = 120.0
    close_timeout: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Raises `ConfigurationError` where the server is neither local nor loopback and no key is known."""

    base_url: str
    api_key: SecretStr
    credential_command: str | None = field(default=None, repr=False)
    """A shell command that prints a credential: used where there is no key, or where the server asks for it."""
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    """Sent with every request, over the client's own."""
    timing: Timing = Timing()
    transport: httpx2.AsyncBaseTransport | None = field(default=None, repr=False, compare=False)
    """Takes the place of the network; for tests, and for servers reached in other ways."""
    sinks: tuple[EventSink, ...] = field(default=(), repr=False, compare=False)
    """Where the client's events go."""
    reports_to_server: bool = False
    """Whether the client sends the server telemetry of the Tinker protocol (`TINKER_TELEMETRY=1`)."""

    @property
    def is_local(self) -> bool:
        return is_local_url(self.base_url)

    @property
    def is_loopback(self) -> bool:
        return self.is_local or httpx2.URL(self.base_url).host in _LOOPBACK_HOSTS


def resolve_config(
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    timing: Timing | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
    sinks: Sequence[EventSink] = (),
    environ: Mapping[str, str] | None = None,
) -> ClientConfig:
    """Arguments first, then the environment, then the embedded server. An empty string counts as unset."""
    env = os.environ if environ is None else environ
    url = base_url or env.get("TINKER_BASE_URL") or env.get("TINSMITH_BASE_URL") or LOCAL_URL
    url, login = (url, {}) if is_local_url(url) else _checked_url(url)
    key, command = _credential_for(url, api_key, env)
    return ClientConfig(
        base_url=url,
        api_key=SecretStr(key),
        credential_command=command,
        headers=MappingProxyType({**_access_headers(env), **login, **(headers or {})}),
        timing=timing or Timing(),
        transport=transport,
        sinks=tuple(sinks),
        reports_to_server=env.get("TINKER_TELEMETRY", "").lower() in ("1", "true", "yes", "on"),
    )


def is_local_url(url: str) -> bool:
    return url.startswith(LOCAL_URL)


def _checked_url(url: str) -> tuple[str, dict[str, str]]:
    """The URL without a login, and the header that carries the login, so that no message can show it."""
    parsed = httpx2.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError(f"base_url {parsed!r} must start with http://, https:// or {LOCAL_URL}")
    if not parsed.userinfo:
        return url.rstrip("/"), {}
    login = base64.b64encode(f"{parsed.username}:{parsed.password}".encode()).decode()
    return str(parsed.copy_with(userinfo=b"")).rstrip("/"), {"Authorization": f"Basic {login}"}


def _credential_for(url: str, api_key: str | None, env: Mapping[str, str]) -> tuple[str, str | None]:
    """A key, or a command that prints one. The hosted service takes only keys of its own form."""
    if is_local_url(url):
        return api_key or LOCAL_API_KEY, None
    command = env.get("TINKER_CREDENTIAL_CMD") or None
    key = api_key or env.get("TINKER_API_KEY")
    if key:
        well_formed = key.startswith(("tml-", "eyJ"))
        if well_formed or not is_hosted(url):
            return key, command
        if command is None:
            raise ConfigurationError("the API key of the hosted service must start with 'tml-'")
    if command is not None:
        return "", command
    if httpx2.URL(url).host in _LOOPBACK_HOSTS:
        return LOCAL_API_KEY, None
    if key := stored_key():
        return key, None
    raise ConfigurationError(
        f"no API key for {httpx2.URL(url).host}: set TINKER_API_KEY or TINKER_CREDENTIAL_CMD, or give api_key"
    )


def _access_headers(env: Mapping[str, str]) -> dict[str, str]:
    names = {
        "CF-Access-Client-Id": "CLOUDFLARE_ACCESS_CLIENT_ID",
        "CF-Access-Client-Secret": "CLOUDFLARE_ACCESS_CLIENT_SECRET",
    }
    return {header: env[name] for header, name in names.items() if env.get(name)}


class ServerFlags(ClientConfigResponse):
    """What is known of a server."""

    json_only: bool = False
    """It has no `client/config`, so it is older than protobuf on this wire: training and samples travel as JSON."""


"""What the server tells its clients at the start."""
