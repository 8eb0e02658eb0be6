"""Checkpoints, runs and what survives a restart, through the facade."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.control.conftest import OpenControl
from tests.unit.control.harness import Harness, draw, forward_backward, optim
from tinsmith.control import records
from tinsmith.control.errors import FutureExpired, ModelEnded, SessionEnded
from tinsmith.control.requests import CreateModelFromCheckpoint, LoadState, SaveForSampler, SaveState
from tinsmith.runtime.fake import FAKE_CARD, FakeEngine
from tinsmith.types import LoraConfig
from tinsmith.types.errors import (
    AlreadyExists,
    CheckpointDamaged,
    InvalidInput,
    NotFound,
    StorageError,
    UserError,
)
from tinsmith.types.operations import LoadAdapter, SaveAdapter

pytestmark = pytest.mark.anyio
ON_BOTH_DATABASES = True


def save(model_id: str, seq_id: int, name: str = "a", **kwargs: object) -> SaveState:
    return SaveState(model_id=model_id, seq_id=seq_id, name=name, **kwargs)  # type: ignore[arg-type]


async def train(h: Harness, model_id: str, seq_id: int) -> float:
    """One step, with two requests; the loss before it."""
    loss = h.submit(forward_backward(model_id, seq_id))
    await h.result(h.submit(optim(model_id, seq_id + 1)))
    return float((await h.result(loss)).loss_sum)


async def from_checkpoint(
    h: Harness, session_id: str, n: int, path: str, *, optimizer: bool = False, base_model: str | None = None
) -> str:
    request = CreateModelFromCheckpoint(
        session_id=session_id, model_seq_id=n, path=path, optimizer=optimizer, base_model=base_model
    )
    receipt = await h.control.create_model_from_checkpoint(request)
    outcome = await h.outcome(receipt)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.request_type == "LoadWeights"
    assert (outcome.result.path, outcome.result.model_id) == (path, receipt.model_id)
    assert receipt.model_id == f"{session_id}:train:{n}"
    return receipt.model_id


async def test_a_saved_state_is_listed_with_what_is_known_of_it(h: Harness, tmp_path: Path) -> None:
    model_id = await h.model(user_metadata={"recipe": "sft"})
    loss = await train(h, model_id, 1)
    path = await h.result(h.submit(save(model_id, 3, "step-1", ttl_seconds=3600, user_metadata={"k": "v"})))
    assert path == f"tinker://{model_id}/weights/step-1"
    (listed,) = await h.control.library.list_checkpoints(model_id)
    assert (listed.checkpoint_id, listed.checkpoint_type, listed.tinker_path) == ("weights/step-1", "training", path)
    assert listed.user_metadata == {"k": "v"}
    assert listed.time.timestamp() == h.clock.now
    assert listed.expires_at is not None
    assert listed.expires_at.timestamp() == h.clock.now + 3600
    folder = tmp_path / "data" / "checkpoints" / model_id.replace(":", "~") / "weights" / "step-1" / "v1"
    assert listed.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    record = json.loads((folder / "checkpoint.json").read_text())
    assert (record["name"], record["version"], record["parent"], record["step"]) == ("step-1", 1, None, 1)
    assert record["metrics"]["loss:sum"] == pytest.approx(loss)
    assert (record["base_model"], record["tokenizer"]) == ("tinsmith/fake", "tinsmith/fake")
    run = await h.control.library.get_training_run(model_id)
    assert run.last_checkpoint == listed
    assert (run.base_model, run.lora_rank, run.is_lora, run.user_metadata) == (
        "tinsmith/fake",
        4,
        True,
        {"recipe": "sft"},
    )
    info = await h.control.library.weights_info(path)
    assert (info.base_model, info.lora_rank, info.train_mlp) == ("tinsmith/fake", 4, True)


async def test_a_name_that_is_taken_fails_unless_overwrite_is_asked(h: Harness, tmp_path: Path) -> None:
    model_id = await h.model()
    await h.result(h.submit(save(model_id, 1, user_metadata={"old": "1"})))
    clash = await h.error(h.submit(save(model_id, 2)))
    assert isinstance(clash, AlreadyExists)
    assert f"'tinker://{model_id}/weights/a' exists" in str(clash)
    assert len(h.asked(SaveAdapter)) == 1
    sampler = SaveForSampler(model_id=model_id, seq_id=3, name="a")
    assert (await h.result(h.submit(sampler))).path == f"tinker://{model_id}/sampler_weights/a"
    await h.result(h.submit(save(model_id, 4, overwrite=True)))
    weights = [c for c in await h.control.library.list_checkpoints(model_id) if c.checkpoint_type == "training"]
    assert [c.user_metadata for c in weights] == [None]
    versions = await h.control._registry.read(lambda c: records.versions(c, model_id, "weights", "a"))
    assert [(v.version, v.superseded_at is None) for v in versions] == [(2, True), (1, False)]
    assert versions[0].parent != versions[1].checkpoint_id  # between the two, the sampler checkpoint was saved


async def test_an_overwrite_that_fails_leaves_the_old_checkpoint(h: Harness) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    path = await h.result(h.submit(save(model_id, 1)))
    h.engine.fail_next(SaveAdapter, StorageError("no space left on device"))
    error = await h.error(h.submit(save(model_id, 2, overwrite=True)))
    assert isinstance(error, StorageError)
    assert error.category == "server"
    assert len(await h.control.library.list_checkpoints(model_id)) == 1
    await from_checkpoint(h, session_id, 1, path, optimizer=True)
    await h.result(h.submit(save(model_id, 3, "b")))


async def test_superseded_versions_stay_as_long_as_the_setting_says(open_control: OpenControl, tmp_path: Path) -> None:
    async with open_control(superseded_versions_kept=1) as h:
        model_id = await h.model()
        for seq in range(1, 5):
            await h.result(h.submit(save(model_id, seq, overwrite=True)))
        folder = tmp_path / "data" / "checkpoints" / model_id.replace(":", "~") / "weights" / "a"
        assert sorted(path.name for path in folder.iterdir()) == ["v3", "v4"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b"}, "checkpoint name 'a/b'"),
        ({"name": ""}, "checkpoint name ''"),
        ({"name": "../x"}, "checkpoint name '../x'"),
        ({"ttl_seconds": 10}, "ttl_seconds 10 is outside 3600"),
    ],
)
async def test_bad_saves_are_named(h: Harness, fields: dict[str, object], message: str) -> None:
    model_id = await h.model()
    error = await h.error(h.submit(save(model_id, 1, **fields)))  # type: ignore[arg-type]
    assert isinstance(error, InvalidInput)
    assert message in str(error)


async def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(h: Harness) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    await train(h, model_id, 1)
    path = await h.result(h.submit(save(model_id, 3)))
    resumed = await from_checkpoint(h, session_id, 1, path, optimizer=True)
    assert await train(h, resumed, 1) == pytest.approx(await train(h, model_id, 4))
    assert h.control.model_info(resumed).lora_rank == 4
    child = await h.result(h.submit(save(resumed, 3, "child")))
    (row,) = await h.control._registry.read(lambda c: records.versions(c, resumed, "weights", "child"))
    (parent,) = await h.control._registry.read(lambda c: records.versions(c, model_id, "weights", "a"))
    assert row.parent == parent.checkpoint_id
    assert row.step == 2
    assert child.startswith(f"tinker://{resumed}/")


async def test_a_live_model_takes_over_a_checkpoints_weights_and_shape(h: Harness) -> None:
    session_id = await h.session()
    small, large = await h.model(session_id, 0), await h.model(session_id, 1, lora_config=LoraConfig(rank=16, seed=1))
    loss = await train(h, small, 1)
    path = await h.result(h.submit(save(small, 3)))
    result = await h.result(h.submit(LoadState(model_id=large, seq_id=1, path=path, optimizer=False)))
    assert (result.path, result.model_id) == (path, large)
    assert h.control.model_info(large).lora_rank == 4
    assert (await h.control.library.get_training_run(large)).lora_rank == 4
    assert await train(h, large, 2) == pytest.approx(0.8 * loss)


@pytest.mark.parametrize(
    ("path", "optimizer", "kind", "message"),
    [
        ("tinker://run/weights/none", False, NotFound, "no checkpoint 'tinker://run/weights/none'"),
        ("/tmp/x", False, InvalidInput, "not a checkpoint path: '/tmp/x'"),
        ("tinker://run/external_weights/x", False, UserError, "is external"),
        ("tinker://run/sampler_weights/x", True, InvalidInput, "sampler checkpoint and has no optimizer state"),
    ],
)
async def test_what_cannot_be_loaded_fails_through_the_future(
    h: Harness, path: str, optimizer: bool, kind: type[UserError], message: str
) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    error = await h.error(h.submit(LoadState(model_id=model_id, seq_id=1, path=path, optimizer=optimizer)))
    assert isinstance(error, kind)
    assert message in str(error)
    with pytest.raises(kind):
        await from_checkpoint(h, session_id, 1, path, optimizer=optimizer)
    late = await h.error(h.submit(forward_backward(f"{session_id}:train:1", 1)))
    assert "could not be created" in str(late)
    await train(h, model_id, 2)


async def test_a_damaged_checkpoint_is_refused_and_the_model_keeps_its_weights(h: Harness, tmp_path: Path) -> None:
    session_id = await h.session()
    model_id = await h.model(session_id)
    await h.result(h.submit(save(model_id, 1)))
    (weights,) = (tmp_path / "data").rglob("adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    path = f"tinker://{model_id}/weights/a"
    error = await h.error(h.submit(LoadState(model_id=model_id, seq_id=2, path=path, optimizer=True)))
    assert isinstance(error, CheckpointDamaged)
    with pytest.raises(CheckpointDamaged):
        await from_checkpoint(h, session_id, 1, path)
    await train(h, model_id, 3)


async def test_a_checkpoint_of_another_base_model_is_refused(open_control: OpenControl) -> None:
    engines = [FakeEngine(), FakeEngine(replace(FAKE_CARD, name="other"))]
    async with open_control(engines) as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        path = await h.result(h.submit(save(model_id, 1)))
        with pytest.raises(InvalidInput, match="trained on base model 'tinsmith/fake' and does not fit 'other'"):
            await from_checkpoint(h, session_id, 1, path, base_model="other")
        await from_checkpoint(h, session_id, 2, path, base_model="tinsmith/fake:long")
        assert engines[1].operations == []


async def test_deleting_removes_the_checkpoint_its_versions_and_its_folder(h: Harness, tmp_path: Path) -> None:
    model_id = await h.model()
    for seq in (1, 2):
        await h.result(h.submit(save(model_id, seq, overwrite=True)))
    await h.control.library.delete_checkpoint(model_id, "weights/a")
    assert await h.control.library.list_checkpoints(model_id) == []
    assert list((tmp_path / "data").rglob("checkpoint.json")) == []
    with pytest.raises(NotFound, match=f"no checkpoint 'tinker://{model_id}/weights/a'"):
        await h.control.library.delete_checkpoint(model_id, "weights/a")
    await h.result(h.submit(save(model_id, 3)))
    (row, *_) = await h.control._registry.read(lambda c: records.versions(c, model_id, "weights", "a"))
    assert row.version == 3


async def test_expired_checkpoints_vanish_at_once_and_are_swept_later(h: Harness, tmp_path: Path) -> None:
    model_id = await h.model()
    path = await h.result(h.submit(save(model_id, 1, ttl_seconds=3600)))
    await h.result(h.submit(save(model_id, 2, "kept", ttl_seconds=3600)))
    await h.control.library.set_checkpoint_ttl(model_id, "weights/kept", None)
    h.clock.advance(3600)
    with pytest.raises(NotFound, match="has expired"):
        await h.control.library.weights_info(path)
    assert [c.checkpoint_id for c in await h.control.library.list_checkpoints(model_id)] == ["weights/kept"]
    await h.control.sweep()
    assert len(list((tmp_path / "data").rglob("checkpoint.json"))) == 1
    with pytest.raises(InvalidInput, match="ttl_seconds 5 is outside"):
        await h.control.library.set_checkpoint_ttl(model_id, "weights/kept", 5)


async def test_publishing_is_idempotent(h: Harness) -> None:
    model_id = await h.model()
    await h.result(h.submit(save(model_id, 1)))
    for public in (True, True, False, False):
        await h.control.library.set_published(model_id, "weights/a", public)
        assert [c.public for c in await h.control.library.list_checkpoints(model_id)] == [public]
    for call in (
        h.control.library.set_published(model_id, "weights/x", True),
        h.control.library.list_checkpoints("sess-x:train:0"),
    ):
        with pytest.raises(NotFound):
            await call


async def test_lists_are_newest_first_and_paged_with_totals(h: Harness) -> None:
    session_id = await h.session()
    models = []
    for n in range(3):
        h.clock.advance(1)
        models.append(await h.model(session_id, n))
        await h.result(h.submit(save(models[-1], 1, f"n{n}")))
    runs, total = await h.control.library.list_training_runs(2, 0)
    assert ([run.training_run_id for run in runs], total) == ([models[2], models[1]], 3)
    runs, total = await h.control.library.list_training_runs(2, 2)
    assert ([run.training_run_id for run in runs], total) == ([models[0]], 3)
    checkpoints, total = await h.control.library.list_user_checkpoints(2, 1)
    assert ([c.checkpoint_id for c in checkpoints], total) == (["weights/n1", "weights/n0"], 3)
    assert await h.control.library.list_sessions(10, 0) == ([session_id], 1)
    assert (await h.control.library.get_session(session_id)).training_run_ids == models
    for limit, offset in ((-1, 0), (10, -1), (1001, 0)):
        with pytest.raises(InvalidInput):
            await h.control.library.list_training_runs(limit, offset)


async def test_after_a_restart_runs_and_checkpoints_are_there_and_the_old_session_is_over(
    open_control: OpenControl,
) -> None:
    async with open_control() as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        loss = await train(h, model_id, 1)
        path = await h.result(h.submit(save(model_id, 3)))
        await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=4, sampling_session_seq_id=0)))
        receipt = h.submit(forward_backward(model_id, 5))
        h.clock.advance(7)
        await h.result(h.submit(forward_backward(model_id, 6)))
        last = h.clock.now
    async with open_control() as h:
        run = await h.control.library.get_training_run(model_id)
        assert run.last_checkpoint is not None
        assert run.last_checkpoint.tinker_path == path
        assert run.last_request_time.timestamp() == last
        assert [c.tinker_path for c in await h.control.library.list_checkpoints(model_id)] == [path]
        with pytest.raises(SessionEnded, match="restarted"):
            h.control.heartbeat(session_id)
        with pytest.raises(NotFound):
            h.control.heartbeat("sess-unknown")
        await h.control.finish_session(session_id, "success", None)
        with pytest.raises(FutureExpired):
            await h.control.wait_future(receipt.request_id, 0)
        assert isinstance(await h.error(h.submit(forward_backward(model_id, 7))), ModelEnded)
        assert "ended with its session" in str(await h.error(h.sample(draw(f"{session_id}:sample:0"))))
        assert h.control.get_sampler(f"{session_id}:sample:0").base_model == "tinsmith/fake"
        new_session = await h.session()
        resumed = await from_checkpoint(h, new_session, 0, path, optimizer=True)
        assert await train(h, resumed, 1) == pytest.approx(0.8 * loss)
        sampler_id = await h.control.create_sampling_session(new_session, 0, None, path)
        await h.result(h.sample(draw(sampler_id)))


async def test_what_an_interrupted_save_left_is_swept_at_the_next_start(
    open_control: OpenControl, tmp_path: Path
) -> None:
    root = tmp_path / "data" / "checkpoints"
    async with open_control() as h:
        model_id = await h.model()
        await h.result(h.submit(save(model_id, 1)))
    run = root / model_id.replace(":", "~")
    (run / "weights" / "a" / "v2").mkdir()
    (run / "weights" / "b" / ".v1.partial").mkdir(parents=True)
    (root / "someone~elses" / "weights" / "a" / "v1").mkdir(parents=True)
    async with open_control():
        assert sorted(p.relative_to(root).as_posix() for p in root.glob("*/*/*/*")) == [
            f"{run.name}/weights/a/v1",
            "someone~elses/weights/a/v1",
        ]
        assert not (run / "weights" / "b").exists()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_full_disk_turns_readiness_off_until_a_write_succeeds(h: Harness, tmp_path: Path) -> None:
    model_id = await h.model()
    control = h.control

    async def limit(pages: int) -> None:
        await control._registry.write(lambda c: c.exec_driver_sql(f"PRAGMA max_page_count={pages}"))

    await limit(1)
    metadata = {"k": "x" * 100_000}
    error = await h.error(h.submit(save(model_id, 1, user_metadata=metadata)))
    assert isinstance(error, StorageError)
    assert "full" in str(error)
    assert not control.is_ready
    assert "full" in str(control.readiness_reason)
    assert await control.library.list_checkpoints(model_id) == []
    assert list((tmp_path / "data").rglob("checkpoint.json")) == []
    await control.sweep()
    await control._registry.flush()
    assert control.is_ready
    await limit(1_000_000)
    await h.result(h.submit(save(model_id, 2, user_metadata=metadata)))


async def test_a_load_reaches_the_engine_only_when_the_checkpoint_fits(h: Harness) -> None:
    model_id = await h.model()
    path = (await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=1, name="s")))).path
    assert path is not None
    error = await h.error(h.submit(LoadState(model_id=model_id, seq_id=2, path=path, optimizer=True)))
    assert "has no optimizer state" in str(error)
    assert h.asked(LoadAdapter) == []
    await h.result(h.submit(LoadState(model_id=model_id, seq_id=3, path=path, optimizer=False)))
    assert len(h.asked(LoadAdapter)) == 1
