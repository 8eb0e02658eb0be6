"""HTTP exchanges: retries, secrets, addresses."""

from __future__ import annotations

import logging
import pickle
import time

import httpx2
import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker, after, no_connection, status
from tinsmith import types
from tinsmith.client import (
    AdminClient,
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestFailedError,
    RestClient,
    ServiceClient,
    Timing,
    TinkerError,
    TrainingClient,
    UnprocessableEntityError,
    errors,
)
from tinsmith.client.config import LOCAL_API_KEY, resolve_config
from tinsmith.client.http import json_bytes

KEY = "tml-very-secret"


def step(client: TrainingClient) -> dict[str, float] | None:
    return client.optim_step(types.AdamParams()).result(5).metrics


# ---- retries ----


@pytest.mark.parametrize("fault", [status(503), status(408), status(409), status(429), no_connection()])
def test_what_may_pass_is_tried_again(training: TrainingClient, server: FakeTinker, fault: object) -> None:
    server.script("optim_step", fault, fault)  # type: ignore[arg-type]
    assert step(training) == {"step:sum": 1.0}
    assert server.submitted() == [1, 1, 1]


@pytest.mark.parametrize(
    ("code", "kind"),
    [(401, AuthenticationError), (403, PermissionDeniedError), (404, NotFoundError),
     (422, UnprocessableEntityError)],
)  # fmt: skip
def test_what_will_not_pass_is_not_tried_again(
    training: TrainingClient, server: FakeTinker, code: int, kind: type[Exception]
) -> None:
    server.script("optim_step", status(code))
    with pytest.raises(kind, match=f"Error code: {code}"):
        step(training)
    assert server.submitted() == [1]


def test_the_server_may_overrule_what_is_tried_again(training: TrainingClient, server: FakeTinker) -> None:
    server.script("optim_step", status(400, **{"x-should-retry": "true"}))
    assert step(training) == {"step:sum": 1.0}
    server.script("optim_step", status(503, **{"x-should-retry": "false"}))
    with pytest.raises(InternalServerError) as failure:
        step(training)
    assert not failure.value.retryable


def test_retry_after_is_waited_for(training: TrainingClient, server: FakeTinker) -> None:
    server.script("optim_step", status(429, **{"retry-after-ms": "120"}))
    started = time.monotonic()
    step(training)
    assert time.monotonic() - started >= 0.12


def test_retries_end_with_the_last_error(training: TrainingClient, server: FakeTinker) -> None:
    server.always["optim_step"] = status(409, {"detail": "still busy"})
    with pytest.raises(ConflictError, match="still busy"):
        step(training)
    assert len(server.submitted()) > 5


def test_a_request_without_an_answer_times_out(server: FakeTinker) -> None:
    timing = Timing(request_timeout=0.02, startup_give_up=0.05, retry_initial=0.005)
    server.always["client/config"] = after(5)
    with ServiceClient(base_url="http://fake.test", api_key="k", timing=timing, transport=server) as service:
        with pytest.raises(APIConnectionError, match=r"client/config had no answer within 0\.02 s"):
            service.create_lora_training_client("m").result(5)


def test_every_request_says_what_the_protocol_wants(training: TrainingClient, server: FakeTinker) -> None:
    training.forward(
        [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [1], "weights": [1.0]})], "cross_entropy"
    ).result(5)
    submit, poll = server.seen
    assert submit.headers["x-api-key"] == "tml-secret"
    assert submit.headers["content-type"] == "application/x-protobuf"
    assert submit.headers["user-agent"].startswith("tinsmith/")
    assert submit.headers["x-idempotency-key"] != poll.headers["x-idempotency-key"]
    assert poll.headers["accept"] == "application/x-protobuf"
    assert poll.headers["content-type"] == "application/json"
    assert poll.headers["x-tinker-request-type"] == "Forward"


# ---- secrets ----


def test_no_key_appears_in_an_error_a_log_or_a_repr(server: FakeTinker, caplog: pytest.LogCaptureFixture) -> None:
    server.always["optim_step"] = status(400, {"detail": "no"})
    caplog.set_level(logging.DEBUG)
    with ServiceClient(
        base_url="http://user:hush@fake.test", api_key=KEY, timing=FAST, transport=server,
        default_headers_overrides={"Authorization": "Bearer token-of-hers"},
    ) as service:  # fmt: skip
        training = service.create_lora_training_client("m").result(5)
        with pytest.raises(APIStatusError) as failure:
            step(training)
        server.always["create_sampling_session"] = no_connection()
        with pytest.raises(APIConnectionError) as lost:
            service.create_sampling_client(base_model="m").result(5)
        shown = [repr(service), repr(training), repr(service.holder), repr(service.holder.config), caplog.text]
    headers = server.of("optim_step")[0].headers
    assert (headers["x-api-key"], headers["authorization"]) == (KEY, "Bearer token-of-hers")
    for error in (failure.value, lost.value):
        shown += [repr(error), str(error), repr(dict(error.request.headers)), str(error.request.url)]
        shown.append(repr(pickle.dumps(error)))
    shown.append(repr(dict(failure.value.response.request.headers)))
    assert not [text for text in shown if any(secret in text for secret in (KEY, "hush", "token-of"))]


# ---- errors ----


def test_errors_are_structured_and_survive_pickling() -> None:
    request = httpx2.Request("POST", "http://x.test/api/v1/optim_step")
    response = httpx2.Response(429, json={"detail": "slow down"}, headers={"retry-after": "2"}, request=request)
    limited = errors.status_error(response)
    originals: list[TinkerError] = [
        limited,
        APIConnectionError(request),
        errors.APITimeoutError(request=request),
        errors.APIResponseValidationError(response, body=None),
        RequestFailedError("bad token", "r1", types.RequestErrorCategory.User),
    ]
    table = [(e.type, e.status, str(e.category), e.request_id, e.retryable, e.retry_after_ms) for e in originals]
    assert table == [
        ("api_status", 429, "unknown", None, True, 2000),
        ("api_connection", None, "unknown", None, True, None),
        ("api_timeout", None, "unknown", None, True, None),
        ("validation", 429, "server", None, False, None),
        ("request_failed", None, "user", "r1", False, None),
    ]
    assert isinstance(limited, RateLimitError)
    assert limited.body == {"detail": "slow down"}
    for original in originals:
        copy = pickle.loads(pickle.dumps(original))
        assert (type(copy), copy.message, copy.status) == (type(original), original.message, original.status)
    assert originals[-1].user_error


def test_http_dates_and_nonsense_in_retry_after() -> None:
    def asked(value: str) -> int | None:
        request = httpx2.Request("GET", "http://x.test")
        return errors.retry_after_ms(httpx2.Response(503, headers={"retry-after": value}, request=request))

    assert asked("Fri, 31 Dec 2100 23:59:59 GMT")
    assert [asked("Fri, 31 Dec 1999 23:59:59 GMT"), asked("-1"), asked("soon"), asked("inf")] == [None] * 4
    assert asked("0.5") == 500


def test_numbers_json_cannot_hold_are_named() -> None:
    with pytest.raises(ValueError, match=r"params.stop\[1\] = inf must be a finite number"):
        json_bytes({"params": {"stop": [1.0, float("inf")]}})


# ---- addresses and keys ----


@pytest.mark.parametrize(
    ("given", "env", "url"),
    [
        (None, {}, "local:"),
        ("", {"TINKER_BASE_URL": ""}, "local:"),
        (None, {"TINSMITH_BASE_URL": "http://a.test"}, "http://a.test"),
        (None, {"TINKER_BASE_URL": "http://b.test/x/", "TINSMITH_BASE_URL": "http://a.test"}, "http://b.test/x"),
        ("https://c.test/", {"TINKER_BASE_URL": "http://b.test"}, "https://c.test"),
        ("local:?dtype=float32", {"TINKER_BASE_URL": "http://b.test"}, "local:?dtype=float32"),
    ],
)
def test_the_address_comes_from_the_argument_then_the_environment_then_is_local(
    given: str | None, env: dict[str, str], url: str
) -> None:
    assert resolve_config(base_url=given, environ={"TINKER_API_KEY": "k", **env}).base_url == url


@pytest.mark.parametrize("url", ["local:", "http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:1"])
def test_local_and_loopback_servers_need_no_key(url: str) -> None:
    assert resolve_config(base_url=url, environ={}).api_key.get_secret_value() == LOCAL_API_KEY


def test_other_servers_need_a_key_and_the_argument_comes_first() -> None:
    with pytest.raises(ConfigurationError, match=r"no API key for a\.test: set TINKER_API_KEY"):
        resolve_config(base_url="http://a.test", environ={})
    env = {"TINKER_API_KEY": "tml-env"}
    assert resolve_config(base_url="http://a.test", environ=env).api_key.get_secret_value() == "tml-env"
    both = resolve_config(base_url="http://a.test", api_key="tml-arg", environ=env)
    assert both.api_key.get_secret_value() == "tml-arg"
    assert resolve_config(base_url="local:", environ=env).api_key.get_secret_value() == LOCAL_API_KEY


def test_a_login_in_the_address_travels_in_a_header() -> None:
    config = resolve_config(base_url="http://me:pw@a.test/x", api_key="k", environ={})
    assert config.base_url == "http://a.test/x"
    assert dict(config.headers) == {"Authorization": "Basic bWU6cHc="}


@pytest.mark.parametrize("url", ["ftp://a.test", "a.test", "http://"])
def test_addresses_of_other_kinds_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="must start with"):
        resolve_config(base_url=url, api_key="k", environ={})


def test_path_prefixes_are_kept_and_ids_are_escaped_only_where_they_must_be() -> None:
    seen: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.url.raw_path.decode())
        return httpx2.Response(200, json={})

    with ServiceClient(
        base_url="http://h.test/services/x/", api_key="k", transport=httpx2.MockTransport(answer)
    ) as service:
        rest = RestClient(service.holder)
        rest.delete_checkpoint("s:train:0", "weights/a b").result(5)
        rest.set_checkpoint_ttl_from_tinker_path("tinker://s:train:0/weights/a", None).result(5)
        rest.list_sessions(limit=3).result(5)
        with pytest.raises(ValueError, match="not a checkpoint path"):
            rest.publish_checkpoint_from_tinker_path("weights/a").result(5)
    assert seen == [
        "/services/x/api/v1/client/config",
        "/services/x/api/v1/client/dynamic_config",
        "/services/x/api/v1/training_runs/s:train:0/checkpoints/weights/a%20b",
        "/services/x/api/v1/training_runs/s:train:0/checkpoints/weights/a/ttl",
        "/services/x/api/v1/sessions?limit=3&offset=0&access_scope=owned",
    ]


def test_what_a_server_refuses_surfaces_as_it_said_it(server: FakeTinker, service: ServiceClient) -> None:
    server.script("audit", status(400, {"detail": "there is no audit log"}))
    with pytest.raises(APIStatusError, match="there is no audit log") as failure:
        AdminClient(service.holder).get_audit_log().result(5)
    assert failure.value.status_code == 400
    assert server.of("create_session") == []


def test_deprecated_helpers_of_the_service_client_work(service: ServiceClient) -> None:
    with pytest.warns(FutureWarning, match="create_rest_client"):
        rest = service.create_rest_client()
    assert rest.get_server_capabilities().result(5).supported_models[0].model_name == "tinsmith/tiny"
    with pytest.warns(FutureWarning, match="get_server_capabilities"):
        assert service.get_server_capabilities().supported_models[0].model_name == "tinsmith/tiny"
