"""Runs, checkpoints, sessions, samplers."""

from __future__ import annotations

from typing import Any

from kit import MODEL, Shared, check, failure_of

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
