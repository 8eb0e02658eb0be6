"""Every route of the application, called by Ben with the ids of Anna's things.

What Ben gets is what ids get that were never given out; no list holds anything of Anna's; and Anna's things are as
they were. A route without a case here fails the test.
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import httpx2
import pytest

from tests.unit.server.chat_server import tiny_card
from tests.unit.server.keyed import Keyed
from tests.unit.server.test_custom_losses import loss_body
from tests.unit.server.tinker_client import PROTOBUF, Client, sample_body, train_body
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FAKE_CARD, FakeEngine
from tinsmith.server import ServerSettings, create_app

pytestmark = pytest.mark.anyio

MARK = "annas-own"
"""In names and labels of all that is Anna's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    session: str
    sampler: str
    request: str
    key_id: int
    name: str = MARK

    @property
    def model(self) -> str:
        return f"{self.session}:train:0"

    def at(self, kind: str) -> str:
        return f"/api/v1/training_runs/{self.model}/checkpoints/{kind}/{self.name}"

    def path(self, kind: str = "weights") -> str:
        return f"tinker://{self.model}/{kind}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mine:
    """What Ben has."""

    session: str
    model: str
    numbers: Iterator[int]
    seqs: Iterator[int]
    """Of requests of the model."""


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    url: str
    json: Any = None
    content: bytes | None = None
    headers: dict[str, str] | None = None


Calls: TypeAlias = Callable[[Ids, Mine], list[Call]]
Kind: TypeAlias = Literal["names", "lists", "admins"]
"""`names`: ids are in it. `lists`: none, and nothing of Anna's may come back. `admins`: not for Ben at all."""

CASES: dict[str, tuple[Kind, Calls]] = {}


def case(kind: Kind, *routes: str) -> Callable[[Calls], Calls]:
    def declare(calls: Calls) -> Calls:
        CASES.update(dict.fromkeys(routes, (kind, calls)))
        return calls

    return declare


def plain(kind: Kind, route: str, url: str | None = None, body: Any = None) -> None:
    method, _, path = route.partition(" ")
    CASES[route] = (kind, lambda ids, mine: [Call(method, url or path, body)])


def named(route: str, body: Callable[[Ids, Mine], Any] | None = None) -> None:
    """A route whose path holds the ids, or whose body does."""
    method, _, template = route.partition(" ")

    def calls(ids: Ids, mine: Mine) -> list[Call]:
        fill = {"run_id": ids.model, "session_id": ids.session, "sampler_id": ids.sampler, "name": ids.name}
        kinds = ("weights", "sampler_weights", "external_weights") if "{kind}" in template else ("",)
        urls = [template.format(**fill, kind=kind, file="adapter_config.json") for kind in kinds]
        return [Call(method, url, None if body is None else body(ids, mine)) for url in urls]

    CASES[route] = ("names", calls)


# ---- what anybody may know, and what is Ben's own ----

for _route in (
    "GET /",
    "GET /healthz",
    "GET /readyz",
    "GET /api/v1/healthz",
    "GET /api/v1/readyz",
    "GET /openapi.json",
    "GET /docs",
    "GET /docs/oauth2-redirect",
    "GET /metrics",
    "GET /api/v1/get_server_capabilities",
    "GET /get_server_capabilities",
    "GET /list_loss_functions",
    "GET /api/v1/auth/apikey/me",
    "GET /api/v1/sessions",
    "GET /api/v1/training_runs",
    "GET /api/v1/checkpoints",
    "GET /api/v1/audit",
    "GET /api/v1/billing/usage/checkpoints/current",
    "GET /v1/models",
):
    plain("lists", _route)
for _route in ("/api/v1/auth/token", "/api/v1/client/config", "/api/v1/client/dynamic_config", "/api/v1/telemetry"):
    plain("lists", f"POST {_route}", body={})
plain("lists", "POST /register_custom_loss", body={})
plain("lists", "POST /api/v1/create_session", body={"tags": [], "user_metadata": {}})
for _path in ("/add_lora", "/api/v1/add_lora", "/api/v1/add_lora_async"):
    plain("lists", f"POST {_path}", body={"base_model": "base", "rank": 2})
plain("lists", "DELETE /api/v1/auth/apikey/me")
for _path in ("resolve/{revision}/{path:path}", "revision/{revision}", "tree/{revision}"):
    _prefix = "/hf/{name:path}" if _path.startswith("resolve") else "/hf/api/models/{name:path}"
    plain("lists", f"GET {_prefix}/{_path}", f"/hf/{'' if 'resolve' in _path else 'api/models/'}x/resolve/main/y")
plain("lists", "HEAD /hf/{name:path}/resolve/{revision}/{path:path}", "/hf/x/resolve/main/y")
plain("lists", "GET /hf/api/models/{name:path}/tree/{revision}/{folder:path}", "/hf/api/models/x/tree/main/y")
plain("lists", "GET /hf/api/models/{name:path}", "/hf/api/models/x")
plain("lists", "POST /v1/messages/count_tokens", body={"model": FAKE_CARD.name, "messages": []})


@case("lists", "GET /api/v1/billing/usage/events")
def _usage(ids: Ids, mine: Mine) -> list[Call]:
    span = "starting_on=2026-11-20T00:00:00Z&ending_before=2026-11-30T00:00:00Z"
    return [Call("GET", f"/api/v1/billing/usage/events?{span}")]


# ---- sessions ----

named("GET /api/v1/sessions/{session_id}")
named("GET /api/v1/sessions/{session_id}/trace_export")
named("POST /api/v1/sessions/{session_id}/finish", lambda ids, mine: {"reason": {"type": "success"}})
named("PUT /api/v1/sessions/{session_id}/project", lambda ids, mine: {"project_id": "p"})
named("POST /api/v1/session_heartbeat", lambda ids, mine: {"session_id": ids.session})


@case("names", "POST /api/v1/sessions/search")
def _search(ids: Ids, mine: Mine) -> list[Call]:
    cursor = {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": ids.session}
    anna = {"type": "user", "owner_urns": ["tinsmith:user:anna"]}
    bodies = [
        {"session_id": ids.session},
        {"session_id": ids.session, "owner": {"type": "accessible"}},
        {"session_id": ids.session, "owner": anna},
        {"display_name": ids.name, "owner": {"type": "accessible"}},
        {"user_metadata": {"label": ids.name}},
        {"cursor": cursor},
    ]
    return [Call("POST", "/api/v1/sessions/search", body) for body in bodies]


# ---- models and training ----


@case("names", "POST /api/v1/create_model")
def _create_model(ids: Ids, mine: Mine) -> list[Call]:
    body = {"session_id": ids.session, "base_model": FAKE_CARD.name, "lora_config": {"rank": 2}}
    return [Call("POST", "/api/v1/create_model", body | {"model_seq_id": n}) for n in (0, 7)]


@case("names", "POST /api/v1/create_custom_loss")
def _create_custom_loss(ids: Ids, mine: Mine) -> list[Call]:
    return [Call("POST", "/api/v1/create_custom_loss", loss_body(ids.session, 0))]


named("POST /api/v1/get_info", lambda ids, mine: {"model_id": ids.model})
named("POST /get_info", lambda ids, mine: {"model_id": ids.model})
named("POST /api/v1/unload_model", lambda ids, mine: {"model_id": ids.model})
for _op in ("save_weights", "save_weights_external", "save_weights_for_sampler"):
    named(f"POST /api/v1/{_op}", lambda ids, mine: {"model_id": ids.model, "seq_id": 50, "path": "x"})


@case("names", "POST /api/v1/load_weights")
def _load_weights(ids: Ids, mine: Mine) -> list[Call]:
    made = {"session_id": mine.session, "optimizer": False}
    new = [
        made | {"model_seq_id": next(mine.numbers), "path": ids.path(kind)} for kind in ("weights", "sampler_weights")
    ]
    theirs = {"session_id": ids.session, "model_seq_id": 9, "path": ids.path(), "optimizer": False}
    into = {"model_id": ids.model, "seq_id": 50, "path": ids.path(), "optimizer": False}
    mixed = {"model_id": mine.model, "seq_id": next(mine.seqs), "path": ids.path(), "optimizer": False}
    latest = made | {"model_seq_id": next(mine.numbers), "path": f"tinker://{ids.model}/weights/~latest"}
    return [Call("POST", "/api/v1/load_weights", body) for body in (*new, theirs, into, mixed, latest)]


_CHAT = {"data": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}


@case("names", "POST /api/v1/forward_backward", "POST /api/v1/forward", "POST /api/v1/optim_step")
def _shared_with_tinkerbell(ids: Ids, mine: Mine) -> list[Call]:
    train = train_body(ids.model, 50)
    step = {"model_id": ids.model, "seq_id": 50, "adam_params": {"learning_rate": 1e-4}, "type": "optim_step"}
    lost = train_body(
        mine.model, next(mine.seqs), loss_fn="custom", loss_fn_config={"loss_id": f"{ids.session}:loss:0"}
    )
    return [
        *(Call("POST", f"/api/v1/{op}", content=train, headers=PROTOBUF) for op in ("forward_backward", "forward")),
        Call("POST", "/api/v1/forward_backward", content=lost, headers=PROTOBUF),
        Call("POST", "/api/v1/optim_step", step),
        *(Call("POST", f"/api/v1/{op}", {"model_id": ids.model} | _CHAT) for op in ("forward_backward", "forward")),
    ]


def _bell(name: str, body: Callable[[Ids], Any]) -> None:
    paths = [f"/api/v1/{name}", f"/api/v1/{name}_async"]
    legacy = {"forward": "/fwd", "forward_backward": "/fwdbwd"}.get(name, f"/{name}")
    for path in (*paths, legacy):
        CASES.setdefault(f"POST {path}", ("names", lambda ids, mine, path=path: [Call("POST", path, body(ids))]))


_bell("forward", lambda ids: {"model_id": ids.model} | _CHAT)
_bell("forward_backward", lambda ids: {"model_id": ids.model} | _CHAT)
_bell("optim_step", lambda ids: {"model_id": ids.model, "adam_params": {"learning_rate": 1e-4}})
_bell("remove_lora", lambda ids: {"model_id": ids.model})
_bell("save_weights", lambda ids: {"model_id": ids.model, "path": "x"})
_bell("save_weights_for_sampler", lambda ids: {"model_id": ids.model, "path": "x"})
_bell("load_weights", lambda ids: {"model_id": ids.model, "path": ids.path()})


# ---- sampling ----


@case("names", "POST /api/v1/create_sampling_session")
def _create_sampler(ids: Ids, mine: Mine) -> list[Call]:
    theirs = {"session_id": ids.session, "sampling_session_seq_id": 30, "base_model": FAKE_CARD.name}
    paths = [
        {"session_id": mine.session, "sampling_session_seq_id": next(mine.numbers), "model_path": ids.path(kind)}
        for kind in ("weights", "sampler_weights")
    ]
    return [Call("POST", "/api/v1/create_sampling_session", body) for body in (theirs, *paths)]


named("GET /api/v1/samplers/{sampler_id}")
named("POST /api/v1/join_sampling_session", lambda ids, mine: {"sampling_session_id": ids.sampler})


@case("names", "POST /api/v1/asample", "POST /api/v1/sample")
def _sample(ids: Ids, mine: Mine) -> list[Call]:
    names = (ids.model, ids.path("sampler_weights"))
    prompts = [{"model_id": name, "prompts": ["a"], "sampling_params": {"max_tokens": 2}} for name in names]
    return [
        Call("POST", "/api/v1/asample", sample_body(ids.sampler, 40)),
        Call("POST", "/api/v1/asample", sample_body(ids.sampler, 0)),
        *(Call("POST", f"/api/v1/{op}", body) for op in ("sample", "asample") for body in prompts),
    ]


@case("names", "POST /v1/completions", "POST /v1/chat/completions", "POST /v1/messages", "GET /v1/models/{model:path}")
def _chat(ids: Ids, mine: Mine) -> list[Call]:
    messages = [{"role": "user", "content": "a"}]
    calls = []
    for model in (ids.sampler, ids.path("sampler_weights"), ids.path("weights")):
        body = {"model": model, "max_tokens": 2}
        calls += [
            Call("POST", "/v1/completions", body | {"prompt": "a"}),
            Call("POST", "/v1/chat/completions", body | {"messages": messages}),
            Call("POST", "/v1/chat/completions", body | {"messages": messages, "stream": True}),
            Call("POST", "/v1/messages", body | {"messages": messages}),
            Call("POST", "/v1/messages/count_tokens", {"model": model, "messages": messages}),
            Call("GET", f"/v1/models/{model}"),
        ]
    return calls


# ---- futures ----

named("POST /retrieve_future", lambda ids, mine: {"request_id": ids.request})
named("POST /api/v1/retrieve_future", lambda ids, mine: {"request_id": ids.request})
named("POST /api/v1/cancel_future", lambda ids, mine: {"request_id": ids.request})


@case("names", "POST /api/v1/retrieve_futures")
def _retrieve_futures(ids: Ids, mine: Mine) -> list[Call]:
    target = {"sampling_session_id": ids.sampler, "cloned_sampler_id": 0}
    fetched = {"target": target, "timeout": 0.0, "retrieved_request_ids": [ids.request]}
    return [Call("POST", "/api/v1/retrieve_futures", fetched)]


# ---- runs and checkpoints ----

named("GET /api/v1/training_runs/{run_id}")
named("GET /api/v1/training_runs/{run_id}/checkpoints")
_CHECKPOINT = "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"
for _method, _rest in (
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/publish"),
    ("DELETE", "/publish"),
    ("POST", "/pin"),
    ("DELETE", "/pin"),
    ("GET", "/archive"),
    ("GET", "/external_weights_urls"),
):
    named(f"{_method} {_CHECKPOINT}{_rest}")
named(f"PUT {_CHECKPOINT}/ttl", lambda ids, mine: {"ttl_seconds": 1})
named(f"POST {_CHECKPOINT}/merged", lambda ids, mine: {})
named("POST /api/v1/weights_info", lambda ids, mine: {"tinker_path": ids.path()})


@case("names", "POST /api/v1/copy_weights")
def _copy(ids: Ids, mine: Mine) -> list[Call]:
    bodies = [
        {"source_path": ids.path("weights")},
        {"source_path": ids.path("sampler_weights")},
        {"source_path": ids.path(), "session_id": ids.session, "model_seq_id": 20},
        {"source_path": ids.path(), "session_id": mine.session, "model_seq_id": next(mine.numbers)},
    ]
    return [Call("POST", "/api/v1/copy_weights", body, headers={"x-idempotency-key": "annas-key"}) for body in bodies]


@case("lists", "POST /api/v1/checkpoints/import")
def _import(ids: Ids, mine: Mine) -> list[Call]:
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    headers = {"x-idempotency-key": "annas-key", "content-type": "application/x-tar"}
    return [Call("POST", "/api/v1/checkpoints/import?name=x", content=empty.getvalue(), headers=headers)]


@case(
    "names",
    "GET /api/v1/files/{run_id}/{kind}/{name}/{file:path}",
    "GET /api/v1/archives/{run_id}/{kind}/{name}",
    "GET /api/v1/traces/{session_id}",
)
def _forged_links(ids: Ids, mine: Mine) -> list[Call]:
    query = f"expires=99999999999&signature={'0' * 64}"
    places = (f"files/{ids.model}/external_weights/{ids.name}/adapter_config.json", f"traces/{ids.session}")
    paths = (*places, f"archives/{ids.model}/weights/{ids.name}")
    return [Call("GET", f"/api/v1/{p}?{query}{key}") for p in paths for key in ("", f"&key={ids.key_id}")]


# ---- administration ----

for _route, _url, _body in (
    ("GET /api/v1/admin/users", "", None),
    ("POST /api/v1/admin/users", "", {"user_id": "carl", "role": "admin"}),
    ("PUT /api/v1/admin/users/{user_id}", "/api/v1/admin/users/ben", {"role": "admin"}),
    ("GET /api/v1/admin/keys", "", None),
    ("POST /api/v1/admin/keys", "", {"user_id": "anna"}),
    ("DELETE /api/v1/admin/keys/{key_id}", "/api/v1/admin/keys/1", None),
    ("GET /api/v1/admin/projects", "", None),
    ("POST /api/v1/admin/projects", "", {"project_id": "mine"}),
    ("PUT /api/v1/admin/projects/{project_id}", "/api/v1/admin/projects/p", {"weight": 9.0}),
    ("PUT /api/v1/admin/projects/{project_id}/members/{user_id}", "/api/v1/admin/projects/p/members/ben", None),
    ("DELETE /api/v1/admin/projects/{project_id}/members/{user_id}", "/api/v1/admin/projects/p/members/anna", None),
    ("GET /api/v1/admin/quotas", "", None),
    ("PUT /api/v1/admin/quotas/{subject}/{subject_id}", "/api/v1/admin/quotas/user/anna", {"live_models": 0}),
    ("GET /api/v1/admin/usage", "/api/v1/admin/usage?start=0&end=3600", None),
):
    plain("admins", _route, _url or None, _body)


# ---- the test ----


def routes_of(app: Any) -> set[str]:
    """Of every method and path; HEAD beside GET is the same route."""
    found: set[str] = set()
    for route in app.routes:
        inner = route.effective_route_contexts() if hasattr(route, "effective_route_contexts") else [route]
        for one in inner:
            methods = set(one.methods or ()) - {"OPTIONS"}
            found |= {f"{method} {one.path}" for method in methods - ({"HEAD"} if "GET" in methods else set())}
    return found


def make_app(folder: Path) -> tuple[Any, FakeEngine]:
    card = tiny_card()
    engine = FakeEngine(card)
    control = Control(ControlSettings(data_dir=folder, ledger=True), [engine])
    return create_app(control, ServerSettings(poll_hold_s=2.0)), engine


def test_every_route_has_a_case(tmp_path: Path) -> None:
    routes = routes_of(make_app(tmp_path / "data")[0])
    assert len(routes) > 100
    assert sorted(routes - set(CASES)) == []
    assert sorted(set(CASES) - routes) == []


async def annas_things(anna: Client, key_id: int) -> Ids:
    body = {"tags": [MARK], "user_metadata": {"label": MARK}, "display_name": MARK}
    session = (await anna.post("create_session", body)).json()["session_id"]
    model = await anna.model(session)
    await anna.result(await anna.post("create_custom_loss", loss_body(session)))
    for seq, op in enumerate(("save_weights", "save_weights_for_sampler", "save_weights_external"), 1):
        await anna.result(await anna.post(op, {"model_id": model, "seq_id": seq, "path": MARK}))
    sampler = await anna.sampler(session)
    receipt = await anna.sample(sampler)
    await anna.result(receipt)
    return Ids(session=session, sampler=sampler, request=receipt.json()["request_id"], key_id=key_id)


async def state_of(anna: Client, ids: Ids) -> list[Any]:
    """Everything of Anna's, as she sees it."""
    urls = (f"sessions/{ids.session}", f"training_runs/{ids.model}/checkpoints", "checkpoints", "sessions", "audit")
    answers = [(await anna.get(url)).json() for url in urls]
    sampled = (await anna.poll_id(ids.request)).json()
    info = (await anna.post("get_info", {"model_id": ids.model})).json()
    return [*answers, sampled, info, (await anna.get(f"samplers/{ids.sampler}")).json()]


async def told(ben: Client, calls: list[Call], ids: Ids) -> list[tuple[int, str]]:
    """Status and text of each answer, and of the future behind it, without ids."""
    answers = []
    for call in calls:
        answer = await ben.http.request(
            call.method, call.url, json=call.json, content=call.content, headers=call.headers or {}
        )
        texts = [(answer.status_code, answer.text)]
        request_id = _request_id(answer)
        if request_id is not None:
            for _ in range(20):
                result = await ben.poll_id(request_id)
                if result.status_code != 408:
                    break
            texts.append((result.status_code, result.text))
        answers += [(status, _without_ids(text, ids)) for status, text in texts]
    return answers


def _request_id(answer: httpx2.Response) -> str | None:
    try:
        content = answer.json()
    except ValueError:
        return None
    return content.get("request_id") if answer.status_code == 200 and isinstance(content, dict) else None


def _without_ids(text: str, ids: Ids) -> str:
    for value, name in ((ids.request, "REQUEST"), (ids.session, "SESSION"), (ids.name, "NAME")):
        text = text.replace(value, name)
    text = re.sub(r"future_[0-9a-f]+", "FUTURE", text)
    text = re.sub(r"(chatcmpl|cmpl|msg|req)[-_][0-9a-f]+", "ANSWER", text)
    return re.sub(r":(train|sample):\d+", r":\1:N", text)


async def test_ben_can_do_nothing_with_annas_things(tmp_path: Path) -> None:
    app, engine = make_app(tmp_path / "data")
    async with app.router.lifespan_context(app):
        server = Keyed(Client(httpx2.AsyncClient(), engine, app))
        await server.deeds.create_project("p")
        await server.user("anna")
        secret, key = await server.key("anna")
        anna, ben = server.client(secret), await server.member("ben")
        ids = await annas_things(anna, key.key_id)
        unknown = Ids(
            session="sess-" + "0" * 12,
            sampler="sess-" + "0" * 12 + ids.sampler[len(ids.session) :],
            request="future_" + "0" * (len(ids.request) - len("future_")),
            key_id=key.key_id + 1000,
            name="never-saved",
        )
        session = await ben.session()
        mine = Mine(
            session=session, model=await ben.model(session), numbers=itertools.count(1), seqs=itertools.count(1)
        )
        before = await state_of(anna, ids)
        faults: dict[str, Any] = {}
        last = "DELETE /api/v1/auth/apikey/me"  # ends Ben's key
        for route in [*(r for r in CASES if r != last), last]:
            if (fault := await _fault(ben, route, ids, unknown, mine)) is not None:
                faults[route] = fault
        assert faults == {}
        assert await state_of(anna, ids) == before
        step = {"model_id": ids.model, "seq_id": 4, "adam_params": {"learning_rate": 1e-4}}
        assert "error" not in await anna.result(await anna.post("optim_step", step))
        assert (await ben.get("sessions")).status_code == 401


async def _fault(ben: Client, route: str, ids: Ids, unknown: Ids, mine: Mine) -> Any:
    """`None` if Ben got nothing."""
    kind, calls = CASES[route]
    if kind == "names":
        of_annas = await told(ben, calls(ids, mine), ids)
        of_nobodys = await told(ben, calls(unknown, mine), unknown)
        pairs = zip(of_annas, of_nobodys, strict=True)
        return [pair for pair in pairs if pair[0] != pair[1]] or None
    texts = await told(ben, calls(ids, mine), unknown)
    if kind == "admins":
        return None if [status for status, _ in texts] == [403] else texts
    secrets = (MARK, ids.session, "anna")
    return [(status, text) for status, text in texts if any(secret in text for secret in secrets)] or None
