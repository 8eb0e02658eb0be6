"""Copies, projects, search, audit, usage."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.server.tinker_client import Client, OpenServer

pytestmark = pytest.mark.anyio
ON_BOTH_DATABASES = True


async def saved(client: Client, model_id: str, seq_id: int = 1, name: str = "a") -> str:
    body = {"model_id": model_id, "seq_id": seq_id, "path": name}
    path: str = (await client.result(await client.post("save_weights", body)))["path"]
    return path


async def search(client: Client, **query: Any) -> list[str]:
    answer = await client.post("sessions/search", query)
    assert answer.status_code == 200, answer.text
    return [session["session_id"] for session in answer.json()["sessions"]]


def this_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def window() -> dict[str, str]:
    return {
        "starting_on": (this_hour() - timedelta(hours=1)).isoformat(),
        "ending_before": (this_hour() + timedelta(hours=2)).isoformat(),
    }


# ---- copies ----


async def test_a_copy_has_a_run_and_a_life_of_its_own(client: Client, tmp_path: Path) -> None:
    path = await saved(client, await client.model())
    body = {"source_path": path, "destination_project_id": "archive", "ttl_seconds": 7200}
    copy = (await client.post("copy_weights", body)).json()["tinker_path"]
    run_id = copy.removeprefix("tinker://").split("/")[0]
    assert copy == f"tinker://{run_id}/weights/a" != path
    run = (await client.get(f"training_runs/{run_id}")).json()
    assert run["last_checkpoint"]["tinker_path"] == copy
    assert run["last_checkpoint"]["expires_at"]
    owned = (await client.get("training_runs", params={"project_id": "archive"})).json()
    assert [run["training_run_id"] for run in owned["training_runs"]] == [run_id]
    original = path.removeprefix("tinker://").replace("/", "/checkpoints/", 1)
    assert (await client.http.delete(f"/api/v1/training_runs/{original}")).status_code == 204
    session_id = await client.session()
    load = {"session_id": session_id, "model_seq_id": 0, "path": copy, "optimizer": True}
    assert "error" not in await client.result(await client.post("load_weights", load))


async def test_the_same_copy_asked_for_again_is_the_same_copy(client: Client) -> None:
    path = await saved(client, await client.model())
    headers = {"x-idempotency-key": "one"}
    copies = [(await client.post("copy_weights", {"source_path": path}, headers=headers)).json() for _ in range(2)]
    assert copies[0] == copies[1]
    other = await client.post("copy_weights", {"source_path": path, "ttl_seconds": 7200}, headers=headers)
    assert other.status_code == 400
    assert (await client.post("copy_weights", {"source_path": path})).json() != copies[0]


async def test_a_copy_may_go_into_a_live_session(client: Client) -> None:
    path = await saved(client, await client.model())
    session_id = await client.session()
    body = {"source_path": path, "session_id": session_id, "model_seq_id": 4}
    copy = (await client.post("copy_weights", body)).json()["tinker_path"]
    assert copy == f"tinker://{session_id}:train:4/weights/a"
    again = await client.post("copy_weights", body)
    assert again.status_code == 400
    assert f"{session_id}:train:4" in again.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"source_path": "tinker://none/weights/x"}, 404, "none"),
        ({"source_path": "/etc/passwd"}, 400, "/etc/passwd"),
        ({"ttl_seconds": 5}, 400, "ttl_seconds"),
        ({"session_id": "sess-none"}, 400, "model_seq_id"),
        ({"session_id": "sess-none", "model_seq_id": 0}, 404, "sess-none"),
    ],
)
async def test_a_copy_that_cannot_be_says_why(client: Client, fields: dict[str, Any], status: int, named: str) -> None:
    path = await saved(client, await client.model())
    answer = await client.post("copy_weights", {"source_path": path} | fields)
    assert answer.status_code == status
    assert named in answer.json()["detail"]


# ---- projects and search ----


async def labelled(client: Client, **labels: Any) -> str:
    session_id: str = (await client.post("create_session", labels)).json()["session_id"]
    return session_id


async def test_sessions_are_found_by_what_they_are_called_and_labelled(client: Client) -> None:
    def new(**fields: Any) -> dict[str, Any]:
        return {"tags": [], "user_metadata": {}, **fields}

    bodies = [
        new(display_name="Math GRPO run", user_metadata={"seed": "1", "task": "math"}),
        new(display_name="math sft", user_metadata={"seed": "2", "task": "math"}, project_id="p1"),
        new(display_name="chat"),
    ]
    ids = [(await client.post("create_session", body)).json()["session_id"] for body in bodies]
    assert await search(client) == ids[::-1]
    assert await search(client, display_name="MATH") == [ids[1], ids[0]]
    assert await search(client, display_name="run math") == [ids[0]]
    assert await search(client, display_name="chat", session_id=ids[0]) == [ids[2], ids[0]]
    assert await search(client, user_metadata={"task": "math", "seed": "2"}) == [ids[1]]
    assert await search(client, project_ids=["p1"]) == [ids[1]]
    assert await search(client, project_ids=["default"]) == [ids[2], ids[0]]
    assert await search(client, owner={"type": "user", "owner_urns": ["someone:else"]}) == []
    assert await search(client, owner={"type": "user", "owner_urns": ["tinsmith:user:local"]}, limit=1) == [ids[2]]


async def test_sessions_are_found_by_how_they_ended(client: Client) -> None:
    running, done, broken = [await client.session() for _ in range(3)]
    await client.post(f"sessions/{done}/finish", {"reason": {"type": "success"}, "detail": None})
    await client.post(f"sessions/{broken}/finish", {"reason": {"type": "errored"}, "detail": "boom"})
    finished = {"type": "client_finished"}
    assert await search(client, statuses=[{"type": "active"}]) == [running]
    assert await search(client, statuses=[finished]) == [broken, done]
    assert await search(client, statuses=[finished | {"reasons": ["errored"]}, {"type": "active"}]) == [broken, running]
    assert await search(client, statuses=[{"type": "failed"}, {"type": "cancelled"}]) == []
    summaries = (await client.post("sessions/search", {})).json()["sessions"]
    assert summaries[0]["status"] == {"type": "client_finished", "reason": {"type": "errored"}, "detail": "boom"}
    assert summaries[2]["status"] == {"type": "active"}


async def test_a_session_that_fell_silent_was_not_finished_by_its_client(open_server: OpenServer) -> None:
    async with open_server(control={"session_timeout_s": 0.01, "sweep_interval_s": 30.0}) as client:
        await client.session()
        time.sleep(0.05)  # noqa: ASYNC251 - silence
        await client.app.state.service.control.sweep()
        await client.app.state.service.control._registry.flush()
        found = (await client.post("sessions/search", {})).json()["sessions"]
        assert "status" not in found[0]


async def test_sessions_are_found_by_what_summaries_show_of_their_labels(client: Client) -> None:
    labels = {'"': "x", 'a"b': "x", "a\\": "x", "n": 3, "rate": 1.5, "flag": True, "deep": {"a": [1]}}
    session_id = await labelled(client, user_metadata=labels, display_name="Größe 100%")
    await labelled(client, user_metadata={"n": 4})
    (shown,) = (await client.post("sessions/search", {"session_id": session_id})).json()["sessions"]
    for key, value in shown["user_metadata"].items():
        assert await search(client, user_metadata={key: value}) == [session_id], key
    assert await search(client, display_name="GRÖSSE 0%") == [session_id]
    assert await search(client, display_name="0_%") == []
    assert await search(client, user_metadata={"n": "3"}, display_name="chat") == []


async def test_a_search_for_much_is_no_fault_of_the_server(client: Client) -> None:
    session_id = await labelled(client, display_name="a" * 60_000)
    many = [str(number) for number in range(2000)]
    assert await search(client, display_name="A" * 60_000) == [session_id]
    assert await search(client, display_name="a " * 2000) == [session_id]
    assert await search(client, user_metadata=dict.fromkeys(many, "a")) == []
    assert await search(client, statuses=[{"type": "active"}] * 2000) == [session_id]
    answer = await client.post("sessions/search", {"project_ids": many})
    assert answer.status_code == 400
    assert "project_ids" in answer.json()["detail"]


async def test_whose_sessions_to_search_is_said_in_full(client: Client) -> None:
    for owner in (
        {"type": "user"},
        {"type": "user", "owner_urns": []},
        {"type": "user", "owner_urns": ["tinsmith:user:local"] * 11},
        {"type": "own", "owner_urns": ["tinsmith:user:local"]},
    ):
        answer = await client.post("sessions/search", {"owner": owner})
        assert answer.status_code == 400, owner
        assert "owner_urns" in answer.json()["detail"]


async def test_labels_that_are_no_json_are_refused(client: Client) -> None:
    deep = "[" * 300 + "]" * 300
    for value in ("NaN", "-Infinity", "1e400", "[NaN]", '{"a": Infinity}', deep):
        body = f'{{"user_metadata": {{"a": {value}}}}}'
        headers = {"content-type": "application/json"}
        answer = await client.http.post("/api/v1/create_session", content=body, headers=headers)
        assert answer.status_code == 400, value
        assert "user_metadata" in answer.json()["detail"]


async def test_a_long_search_comes_in_pages(client: Client) -> None:
    ids = [await client.session() for _ in range(5)]
    cursor, found = None, []
    for _ in range(3):
        answer = (await client.post("sessions/search", {"limit": 2, "cursor": cursor})).json()
        found += [session["session_id"] for session in answer["sessions"]]
        cursor = answer.get("next_cursor")
    assert found == ids[::-1]
    assert cursor is None


async def test_a_session_moves_to_a_project_with_its_runs_and_checkpoints(client: Client) -> None:
    session_id = await client.session()
    model_id = await client.model(session_id)
    await saved(client, model_id)
    moved = await client.http.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": "p9"})
    assert moved.status_code == 204
    runs = (await client.get("training_runs", params={"project_id": "p9"})).json()
    assert [run["training_run_id"] for run in runs["training_runs"]] == [model_id]
    assert runs["cursor"]["total_count"] == 1
    assert (await client.get("training_runs", params={"project_id": "p8"})).json()["training_runs"] == []
    stored = (await client.get("billing/usage/checkpoints/current", params={"project_id": "p9"})).json()["data"]
    assert [(share["project_id"], share["checkpoint_count"]) for share in stored] == [("p9", 1)]
    missing = await client.http.put("/api/v1/sessions/sess-none/project", json={"project_id": "p9"})
    assert missing.status_code == 404


# ---- audit ----


async def test_what_happens_to_checkpoints_is_on_record(client: Client) -> None:
    session_id = await client.session()
    model_id = await client.model(session_id)
    path = await saved(client, model_id)
    url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/a"
    await client.http.post(f"{url}/publish")
    await client.http.post(f"{url}/publish")
    await client.http.put(f"{url}/ttl", json={"ttl_seconds": 7200})
    await client.result(
        await client.post("load_weights", {"model_id": model_id, "seq_id": 2, "path": path, "optimizer": False})
    )
    await client.sampler(session_id, model_path=path)
    await client.http.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": "p1"})
    await client.http.delete(url)
    entries = (await client.get("audit")).json()["entries"]
    assert [entry["event"] for entry in entries] == [
        *("checkpoint_create", "checkpoint_publish", "checkpoint_ttl_set", "checkpoint_read", "checkpoint_read"),
        *("project_session_assign", "checkpoint_delete"),
    ]
    assert [entry.get("purpose") for entry in entries if entry["event"] == "checkpoint_read"] == [
        "load_weights",
        "sampling",
    ]
    assert entries[0]["tinker_path"] == path
    assert entries[0]["model_id"] == model_id
    only = (await client.get("audit", params={"event_type": "projects"})).json()["entries"]
    assert [entry["event_details"]["project_id"] for entry in only] == ["p1"]
    for day in ("2020-01-01", "0001-01-01", "9999-12-31"):
        assert (await client.get("audit", params={"day": day})).json()["entries"] == []


@pytest.mark.parametrize("params", [{"day": "yesterday"}, {"day": "2020-13-01"}, {"event_type": "weather"}])
async def test_an_audit_query_that_makes_no_sense_is_named(client: Client, params: dict[str, str]) -> None:
    answer = await client.get("audit", params=params)
    assert answer.status_code == 400
    assert next(iter(params.values())) in answer.json()["detail"]


# ---- usage ----


async def test_usage_counts_tokens_checkpoints_and_storage(client: Client) -> None:
    created = await client.post("create_session", {"user_metadata": {"team": "blue"}, "project_id": "p1"})
    session_id = created.json()["session_id"]
    model_id = await client.model(session_id)
    await client.result(await client.train(model_id, 1))
    await client.result(await client.train(model_id, 2, loss_fn="hinge"))
    await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 3, "path": "a"}))
    await client.result(await client.sample(await client.sampler(session_id), num_samples=2))
    answer = (await client.get("billing/usage/events", params=window())).json()
    infos = {(event["event_info"]["type"]): event for event in answer["data"]}
    assert infos["training"]["event_info"]["token_count"] == 3
    assert infos["sampling_prefill"]["event_info"] == {"type": "sampling_prefill", "cached": False, "token_count": 3}
    assert infos["sampling_sample"]["event_info"]["token_count"] == 8
    assert infos["checkpoint"]["event_info"]["count"] == 1
    assert infos["storage"]["event_info"]["gigabyte_hours"] > 0
    assert set(infos["storage"]["event_info"]) == {"type", "gigabyte_hours"}, "older SDKs refuse more"
    assert {event["session_id"] for event in answer["data"]} == {session_id}
    assert {event["project_id"] for event in answer["data"]} == {"p1"}
    assert answer["sessions"] == {session_id: {"user_metadata": {"team": "blue"}}}
    hours = {datetime.fromisoformat(event["bucket_start"]) for event in answer["data"]}
    assert hours <= {this_hour(), this_hour() - timedelta(hours=1)}


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("soon", "2026-01-01T00:00:00Z"),
        ("2026-01-01T00:30:00Z", "2026-01-01T02:00:00Z"),
        ("2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"),
    ],
)
async def test_a_time_that_makes_no_sense_is_named(client: Client, start: str, end: str) -> None:
    answer = await client.get("billing/usage/events", params={"starting_on": start, "ending_before": end})
    assert answer.status_code == 400
    assert start in answer.json()["detail"]


async def test_text_that_is_no_unicode_is_refused(client: Client) -> None:
    for path, body in (
        ("sessions/search", b'{"display_name": "\\ud800"}'),
        ("create_session", b'{"user_metadata": {"a": "\\ud800"}}'),
        ("create_session", b'{"display_name": "\\ud800"}'),
        ("create_session", b'{"user_metadata": {"a": ["\\ud800"]}}'),
        ("create_session", b'{"user_metadata": {"a": {"b": {"\\ud800": 1}}}}'),
        ("copy_weights", b'{"source_path": "tinker://\\ud800/weights/x"}'),
        ("optim_step", b'{"model_id": "\\ud800", "seq_id": 1, "adam_params": {}}'),
        ("asample", b'{"sampling_session_id": "\\ud800", "seq_id": 1, "prompt": {"chunks": []}}'),
    ):
        headers = {"content-type": "application/json"}
        answer = await client.http.post(f"/api/v1/{path}", content=body, headers=headers)
        assert answer.status_code == 400
        assert "Unicode" in answer.json()["detail"]
