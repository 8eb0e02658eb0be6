"""Keys over HTTP: in which forms they come, what is told without one, and how soon they end."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from tests.unit.server.keyed import Keyed, keyed_server
from tests.unit.server.tinker_client import Client, OpenServer, sample_body
from tinsmith.runtime.fake import FAKE_CARD

pytestmark = pytest.mark.anyio


async def test_a_server_without_keys_takes_any_and_none(client: Client) -> None:
    for headers in ({}, {"x-api-key": "tml-x"}, {"authorization": "Bearer sk-x"}):
        assert (await client.get("sessions", headers=headers)).status_code == 200


@pytest.mark.parametrize("form", ["x-api-key", "bearer", "Bearer", "token"])
async def test_a_key_comes_in_any_of_the_forms_that_clients_send(open_server: OpenServer, form: str) -> None:
    async with keyed_server(open_server) as server:
        await server.user("anna")
        secret, key = await server.key("anna")
        if form == "token":
            exchanged = await server.client(secret).post("auth/token", {})
            headers = {"x-api-key": exchanged.json()["jwt"]}
        else:
            headers = {"x-api-key": secret} if form == "x-api-key" else {"authorization": f"{form} {secret}"}
        described = await server.client(None, **headers).get("auth/apikey/me")
        assert described.status_code == 200
        assert (described.json()["key_id"], described.json()["name"]) == (key.key_id, key.prefix)
        assert described.json()["details"]["user_details"] == {"email": "anna"}
        for path, status in (("/v1/models", 200), ("/metrics", 403), ("/hf/api/models/no-such-model", 404)):
            assert (await server.client(None, **headers).http.get(path)).status_code == status


@pytest.mark.parametrize(
    ("path", "headers", "error"),
    [
        ("/api/v1/sessions", {}, ["detail"]),
        ("/hf/api/models/x", {}, ["detail"]),
        ("/metrics", {}, ["detail"]),
        ("/nowhere", {}, ["detail"]),
        ("/v1/models", {}, ["error", "message"]),
        ("/v1/models", {"anthropic-version": "2023-06-01"}, ["error", "message"]),
        ("/v1/messages", {}, ["error", "message"]),
    ],
)
@pytest.mark.parametrize("key", [None, "tml-" + 48 * "0", "eyJhbGciOiJIUzI1NiJ9.e30.x"])
async def test_without_a_good_key_the_answer_is_401_as_the_dialect_has_it(
    open_server: OpenServer, path: str, headers: dict[str, str], error: list[str], key: str | None
) -> None:
    async with keyed_server(open_server) as server:
        await server.member("anna")
        answer = await server.client(key, **headers).http.get(path)
        assert answer.status_code == 401
        told: Any = answer.json()
        for name in error:
            told = told[name]
        assert "key" in told
        if "anthropic-version" in headers or path == "/v1/messages":
            assert answer.json()["error"]["type"] == "authentication_error"
        elif path == "/v1/models":
            assert answer.json()["error"]["code"] == "invalid_api_key"
        is_token = key is not None and key.startswith("eyJ")
        assert ('error="invalid_token"' in answer.headers["www-authenticate"]) == is_token


async def test_whether_the_server_is_there_anybody_may_know(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        anna = await server.member("anna")
        stranger = server.client(None)
        for path in ("/", "/healthz", "/readyz", "/api/v1/healthz", "/api/v1/readyz", "/openapi.json"):
            assert (await stranger.http.get(path)).status_code == 200
        assert (await stranger.http.get("/")).json()["models"] == []
        assert (await anna.http.get("/")).json()["models"] == [FAKE_CARD.name]


def claims(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    read: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return read


async def test_a_token_says_whose_it_is_and_ends_with_its_key(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        await server.deeds.create_user("anna", email="anna@example.org")
        secret, key = await server.key("anna", expires_in_s=100.0)
        token = (await server.client(secret).post("auth/token", {})).json()["jwt"]
        told = claims(token)
        assert (told["sub"], told["org_id"], told["email"]) == ("tinsmith:user:anna", "local", "anna@example.org")
        assert told["exp"] - told["iat"] in (100, 101)
        assert secret not in token
        holder = server.client(token)
        assert (await holder.get("sessions")).status_code == 200
        forged = ".".join([*token.split(".")[:2], token.split(".")[2][::-1]])
        assert (await server.client(forged).get("sessions")).status_code == 401
        await server.deeds.revoke_key(key.key_id)
        refused = await holder.get("sessions")
        assert refused.status_code == 401
        assert "invalid_token" not in refused.headers["www-authenticate"]  # another token would not help


async def test_a_token_of_the_time_before_keys_ends_with_the_first_key(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        token = (await server.client(None).post("auth/token", {})).json()["jwt"]
        assert (await server.client(token).get("sessions")).status_code == 200
        await server.member("anna")
        assert (await server.client(token).get("sessions")).status_code == 401


async def test_a_caller_revokes_its_own_key(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        anna = await server.member("anna")
        assert (await anna.http.delete("/api/v1/auth/apikey/me")).status_code == 200
        assert (await anna.get("sessions")).status_code == 401


async def test_a_poll_that_is_held_when_its_key_ends_tells_no_result(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        await server.user("anna")
        secret, key = await server.key("anna")
        anna = server.client(secret)
        sampler = await anna.sampler()
        server.engine.pause()
        receipt = await anna.sample(sampler)
        poll = asyncio.create_task(anna.poll(receipt))
        await asyncio.sleep(0.05)
        await server.deeds.revoke_key(key.key_id)
        server.engine.resume()
        assert (await asyncio.wait_for(poll, 10.0)).status_code == 401


async def test_a_key_that_expires_stops_by_itself(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        await server.user("anna")
        secret, _ = await server.key("anna", expires_in_s=0.3)
        anna = server.client(secret)
        assert (await anna.get("sessions")).status_code == 200
        await asyncio.sleep(0.35)
        answer = await anna.get("sessions")
        assert answer.status_code == 401
        assert "expired" in answer.json()["detail"]


async def _links(anna: Client) -> list[str]:
    session = await anna.session()
    model = await anna.model(session)
    save = {"model_id": model, "seq_id": 1, "path": "out"}
    await anna.result(await anna.post("save_weights_external", save))
    answer = await anna.get(f"training_runs/{model}/checkpoints/external_weights/out/external_weights_urls")
    trace = await anna.get(f"sessions/{session}/trace_export")
    return [*answer.json()["urls"].values(), trace.json()["url"]]


async def test_a_signed_link_needs_no_key_and_ends_with_the_key_it_was_given_for(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        await server.user("anna")
        secret, key = await server.key("anna")
        links = await _links(server.client(secret))
        await server.member("ben")
        stranger = server.client(None).http
        for link in links:
            assert (await stranger.get(link)).status_code == 200
            assert f"key={key.key_id}" in link
            assert (await stranger.get(link.replace(f"key={key.key_id}", f"key={key.key_id + 1}"))).status_code == 403
        await server.deeds.revoke_key(key.key_id)
        for link in links:
            assert (await stranger.get(link)).status_code == 403


async def test_scopes_and_roles_say_what_a_key_is_for(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        viewer = await server.member("vera", "viewer")
        assert (await viewer.get("sessions")).status_code == 200
        refused = await viewer.post("create_session", {"tags": [], "user_metadata": {}})
        assert refused.status_code == 403
        assert "'train' or 'sample'" in refused.json()["detail"]
        sampling = await server.member("sam", scopes=["sample"])
        sampler = await sampling.sampler()
        assert (await sampling.result(await sampling.sample(sampler)))["type"] == "sample"
        body = {"session_id": sampler.partition(":")[0], "model_seq_id": 0, "base_model": FAKE_CARD.name}
        assert (await sampling.post("create_model", body)).status_code == 403
        assert (await viewer.post("asample", sample_body(sampler))).status_code == 403
        chat = {"model": FAKE_CARD.name, "messages": [{"role": "user", "content": "x"}]}
        told = await viewer.http.post("/v1/chat/completions", json=chat)
        assert (told.status_code, told.json()["error"]["type"]) == (403, "permission_error")


async def test_projects_are_for_their_members(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        anna = await server.member("anna")
        await server.deeds.create_project("evals")
        body = {"tags": [], "user_metadata": {}, "project_id": "evals"}
        assert (await anna.post("create_session", body)).status_code == 404
        await server.deeds.add_member("evals", "anna")
        session_id = (await anna.post("create_session", body)).json()["session_id"]
        found = (await anna.post("sessions/search", {})).json()["sessions"]
        assert [(s["session_id"], s["project_id"], s["owner"]) for s in found] == [
            (session_id, "evals", "tinsmith:user:anna")
        ]
        other = await anna.http.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": "other"})
        assert other.status_code == 404
        secret, _ = await server.key("anna", project_id="evals")
        await server.client(secret).session()
        assert len((await anna.post("sessions/search", {"project_ids": ["evals"]})).json()["sessions"]) == 2


async def test_only_admins_see_what_is_not_theirs(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        anna, root = await server.member("anna"), await server.member("root", "admin")
        model = await anna.model()
        assert (await root.get(f"training_runs/{model}")).json()["model_owner"] == "anna"
        own = await root.get("training_runs")
        everyones = await root.get("training_runs?access_scope=accessible")
        assert [len(answer.json()["training_runs"]) for answer in (own, everyones)] == [0, 1]
        refused = await root.post("optim_step", {"model_id": model, "seq_id": 1, "adam_params": {}})
        assert (await root.result(refused))["error"] == f"no model {model!r}"
        assert (await anna.get("training_runs?access_scope=accessible")).json()["cursor"]["total_count"] == 1


async def test_what_is_published_is_there_for_all_and_written_by_none(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        anna, ben = await server.member("anna"), await server.member("ben")
        model = await anna.model()
        await anna.result(await anna.post("save_weights", {"model_id": model, "seq_id": 1, "path": "a"}))
        path, at = f"tinker://{model}/weights/a", f"/api/v1/training_runs/{model}/checkpoints/weights/a"
        load = {"session_id": await ben.session(), "model_seq_id": 0, "path": path, "optimizer": False}
        assert (await ben.post("weights_info", {"tinker_path": path})).status_code == 404
        assert "no checkpoint" in (await ben.result(await ben.post("load_weights", load)))["error"]
        assert (await anna.http.post(f"{at}/publish")).status_code == 204
        assert (await ben.post("weights_info", {"tinker_path": path})).status_code == 200
        load["model_seq_id"] = 1
        loaded = await ben.result(await ben.post("load_weights", load))
        assert loaded["path"] == path
        copy = await ben.post("copy_weights", {"source_path": path})
        assert (await ben.get("checkpoints")).json()["checkpoints"][0]["tinker_path"] == copy.json()["tinker_path"]
        for call in (ben.http.delete(at), ben.http.delete(f"{at}/publish"), ben.http.put(f"{at}/ttl", json={})):
            assert (await call).status_code == 404
        assert (await anna.http.delete(f"{at}/publish")).status_code == 204
        assert (await ben.post("weights_info", {"tinker_path": path})).status_code == 404


async def test_adapters_of_the_tinkerbell_dialect_belong_to_their_key(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        anna, ben = await server.member("anna"), await server.member("ben")
        made = (await anna.post("add_lora", {"base_model": "base", "rank": 4})).json()["model_id"]
        step = {"model_id": made, "adam_params": {"learning_rate": 1e-4}}
        assert (await anna.http.post("/optim_step", json=step)).status_code == 200
        refused = await ben.http.post("/optim_step", json=step)
        unknown = await ben.http.post("/optim_step", json=step | {"model_id": "sess-0:train:0"})
        assert refused.status_code == unknown.status_code == 404
        assert refused.json()["detail"].replace(made, "X") == unknown.json()["detail"].replace("sess-0:train:0", "X")


def test_no_route_module_reaches_around_the_guard() -> None:
    from pathlib import Path

    import tinsmith.server

    root = Path(tinsmith.server.__file__).parent
    trusted = {"app.py", "assemble.py", "auth.py", "run.py", "service.py", "openapi.py"}
    reached = ("control.service", "control.accounts", "app.state", "ServerState", "state_of", "._control._", "._state")
    for path in root.rglob("*.py"):
        if path.parent == root and path.name in trusted:
            continue
        text = path.read_text()
        found = [word for word in reached if word in text]
        if path.name == "routes.py" and path.parent.name == "tinkerbell":
            assert text.count("ServerState") == 3  # the import, and where routes are made
            assert text.count("state.control") == text.count("state.control.base_models") == 1
            found.remove("ServerState")
        assert not found, (path, found)


async def test_who_is_unknown_learns_nothing_of_a_path(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        await server.member("anna")
        stranger = server.client("tml-wrong")
        answers = [
            await stranger.http.request(m, p) for m in ("GET", "POST") for p in ("/api/v1/sessions", "/no/where")
        ]
        assert {(answer.status_code, answer.text) for answer in answers} == {(401, answers[0].text)}


def _held(server: Keyed) -> int:
    return len(server.app.state.service._services)


async def test_callers_whose_keys_ended_are_forgotten(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        await server.user("anna")
        for _ in range(5):
            secret, key = await server.key("anna")
            assert (await server.client(secret).get("sessions")).status_code == 200
            await server.deeds.revoke_key(key.key_id)
        assert _held(server) == 1
