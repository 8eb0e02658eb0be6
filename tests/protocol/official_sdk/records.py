"""Runs, checkpoints, sessions, samplers."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.request import urlopen

import tinker
from kit import MODEL, Shared, check, failure_of
from tinker import types

# ---- lists ----


@check
def the_run_is_listed_with_its_metadata_and_checkpoints() -> None:
    run = Shared.rest.get_training_run(Shared.trainer.model_id).result()
    assert run.base_model == MODEL
    assert run.lora_rank == 8
    assert run.user_metadata == {"purpose": "protocol test"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == Shared.state_path
    assert run.last_sampler_checkpoint is not None
    assert run.last_sampler_checkpoint.tinker_path == Shared.sampler_path
    runs = Shared.rest.list_training_runs(limit=2).result()
    assert len(runs.training_runs) == 2
    assert runs.cursor.total_count >= 3
    assert Shared.rest.get_training_run_by_tinker_path(Shared.state_path).result() == run


@check
def checkpoints_are_listed_published_dated_and_deleted() -> None:
    rest, run_id = Shared.rest, Shared.trainer.model_id
    path = Shared.trainer.save_state("short-lived", ttl_seconds=7200).result().path

    def listed() -> dict[str, Any]:
        return {c.tinker_path: c for c in rest.list_checkpoints(run_id).result().checkpoints}

    assert listed()[path].expires_at is not None
    assert (listed()[path].size_bytes or 0) > 0
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert listed()[path].expires_at is None
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert listed()[path].public is True
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert listed()[path].public is False
    assert rest.list_user_checkpoints(limit=1).result().checkpoints[0].tinker_path == path
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert path not in listed()
    failure_of(lambda: rest.delete_checkpoint_from_tinker_path(path).result(), "404", "short-lived")


@check
def weights_info_sessions_and_samplers_are_described() -> None:
    info = Shared.rest.get_weights_info_by_tinker_path(Shared.state_path).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 8)
    sessions = Shared.rest.list_sessions(limit=5).result().sessions
    mine = Shared.trainer.model_id.split(":")[0]
    assert mine in sessions
    session = Shared.rest.get_session(mine).result()
    assert Shared.trainer.model_id in session.training_run_ids
    assert session.sampler_ids
    sampler = Shared.rest.get_sampler(session.sampler_ids[0]).result()
    assert sampler.base_model == MODEL


# ---- downloads, copies, projects ----


def _fetch(url: str) -> bytes:
    with urlopen(url, timeout=30) as answer:
        content: bytes = answer.read()
    return content


@check
def an_external_checkpoint_is_downloaded_file_by_file() -> None:
    saved = Shared.trainer.save_weights_external("export", ttl_seconds=3600).result()
    links = Shared.rest.get_external_weights_urls(saved.path).result()
    files = {name: _fetch(url) for name, url in links.urls.items()}
    config = json.loads(files["adapter_config.json"])
    assert config["peft_type"] == "LORA"
    assert len(files["adapter_model.safetensors"]) > 1000
    assert links.expires > datetime.now(UTC) + timedelta(minutes=30)
    forged = links.urls["adapter_config.json"].replace("expires=1", "expires=2")
    failure_of(lambda: _fetch(forged), "HTTPError", "403")
    Shared.rest.delete_checkpoint_from_tinker_path(saved.path).result()


@check
def weights_are_copied_into_a_project() -> None:
    copy = Shared.rest.copy_weights(Shared.state_path, "archive", ttl_seconds=7200).result()
    assert copy != Shared.state_path
    runs = Shared.rest.list_training_runs(project_id="archive").result().training_runs
    assert [run.last_checkpoint.tinker_path for run in runs] == [copy]
    loaded = Shared.service.create_training_client_from_state_with_optimizer(copy).result()
    assert loaded.get_info().lora_rank == 8
    by_service = tinker.ServiceClient(project_id="archive").copy_weights(Shared.sampler_path).result()
    assert by_service.endswith("/sampler_weights/" + Shared.sampler_path.rpartition("/")[2])


@check
def sessions_are_found_and_moved_to_a_project() -> None:
    mine = Shared.trainer.model_id.split(":")[0]
    Shared.rest.assign_session_project(mine, "research").result()
    request = types.SessionSearchRequest(
        session_id=mine, project_ids=["research"], statuses=[types.ActiveSessionStatusQuery()]
    )
    found = Shared.rest.search_sessions(request).result().sessions
    assert [(session.session_id, session.project_id) for session in found] == [(mine, "research")]
    assert found[0].checkpoints_count > 0
    page = Shared.rest.search_sessions(types.SessionSearchRequest(limit=1)).result()
    assert page.next_cursor is not None
    second = Shared.rest.search_sessions(types.SessionSearchRequest(limit=1, cursor=page.next_cursor)).result()
    assert page.sessions[0].session_id != second.sessions[0].session_id


# ---- what was done and used ----


@check
def a_trace_of_the_session_is_exported() -> None:
    url = Shared.rest.export_session_trace(Shared.trainer.model_id.split(":")[0]).result()
    events = json.loads(_fetch(url))["traceEvents"]
    names = {event["name"] for event in events}
    assert {"ForwardBackward", "OptimStep", "SaveWeights", "Sample", "queued", "running"} <= names
    rows = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert Shared.trainer.model_id in rows


@check
def the_audit_log_tells_what_happened_to_checkpoints() -> None:
    admin = tinker.AdminClient()
    events = {entry.event for entry in admin.get_audit_log("checkpoints").result().entries}
    assert {"checkpoint_create", "checkpoint_read", "checkpoint_publish", "checkpoint_delete"} <= events
    assert admin.get_audit_log("teams").result().entries == []
    yesterday = (datetime.now(UTC) - timedelta(days=400)).date()
    assert admin.get_audit_log(day=yesterday).result().entries == []


@check
def usage_counts_tokens_and_storage() -> None:
    admin = tinker.AdminClient()
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    usage = admin.get_billing_usage(hour - timedelta(hours=2), hour + timedelta(hours=2)).result()
    mine = [event for event in usage.data if event.session_id == Shared.trainer.model_id.split(":")[0]]
    kinds = {event.event_info.type: event.event_info for event in mine}
    assert kinds["training"].token_count > 1000
    assert kinds["sampling_sample"].token_count > 100
    assert kinds["checkpoint"].count > 0
    assert all(event.estimated_cost_usd is None for event in usage.data)
    storage = admin.get_current_checkpoint_storage_usage().result().data
    assert sum(share.size_bytes for share in storage) > 0
