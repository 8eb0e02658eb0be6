"""What is kept of a run, how much may be stored, and what is noted of every removal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control.conftest import OpenControl
from tests.unit.control.harness import Harness, draw, forward_backward, optim
from tinsmith.control import records
from tinsmith.control.copies import CopyOrder
from tinsmith.control.errors import DiskBudgetExceeded
from tinsmith.control.identities import Quota
from tinsmith.control.requests import NewSession, SaveForSampler, SaveState
from tinsmith.types.errors import InvalidInput, NotFound

pytestmark = pytest.mark.anyio


async def save(h: Harness, model_id: str, seq_id: int, name: str, **fields: Any) -> str:
    h.clock.advance(1)
    path: str = await h.result(h.submit(SaveState(model_id=model_id, seq_id=seq_id, name=name, **fields)))
    return path


async def names(h: Harness, run_id: str) -> list[str]:
    await h.control.sweep()
    return [one.checkpoint_id for one in await h.control.library.list_checkpoints(run_id)]


async def events(h: Harness) -> list[tuple[str, str | None, str | None]]:
    """Name, checkpoint and reason of what was noted, reads and saves aside."""
    entries = await h.control.library.audit_log("all", None)
    told = [(e.event, e.details.get("tinker_path"), e.details.get("reason")) for e in entries]
    return [(event, path and path.rpartition("/")[2], reason) for event, path, reason in told if reason]


async def test_a_run_keeps_its_newest_of_each_kind_and_what_is_held(open_control: OpenControl) -> None:
    async with open_control(keep_checkpoints=2) as h:
        model_id = await h.model()
        for seq in range(1, 8):
            metadata = {"tinsmith.pin": "true"} if seq == 2 else None
            await save(h, model_id, seq, f"s{seq}", user_metadata=metadata)
            if seq == 3:
                await h.control.library.set_published(model_id, "weights/s3", True)
        for seq in (8, 9, 10):
            h.clock.advance(1)
            await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=seq, name=f"p{seq}")))
        assert await names(h, model_id) == [
            "sampler_weights/p10",
            "sampler_weights/p9",
            "weights/s7",
            "weights/s6",
            "weights/s3",
            "weights/s2",
        ]
        await h.control.library.set_published(model_id, "weights/s3", False)
        await h.control.library.set_pinned(model_id, "weights/s2", False)
        await save(h, model_id, 11, "s11")
        assert await names(h, model_id) == [
            "weights/s11",
            "sampler_weights/p10",
            "sampler_weights/p9",
            "weights/s7",
        ]
        reason = "its run keeps the newest 2"
        retired = [path for event, path, why in await events(h) if event == "checkpoint_retire" and why == reason]
        assert sorted(retired) == ["p8", "s1", "s2", "s3", "s4", "s5", "s6"]


async def test_a_run_says_itself_how_many_it_keeps(open_control: OpenControl, tmp_path: Path) -> None:
    async with open_control() as h:
        careful = await h.model(user_metadata={"tinsmith.keep": "1"})
        lavish = await h.model()
        for model_id in (careful, lavish):
            for seq in (1, 2, 3):
                await save(h, model_id, seq, f"s{seq}")
        assert await names(h, careful) == ["weights/s3"]
        assert len(await names(h, lavish)) == 3
        folders = tmp_path / "data" / "checkpoints" / careful.replace(":", "~") / "weights"
        assert [folder.name for folder in folders.iterdir() if any(folder.iterdir())] == ["s3"]


async def test_a_setting_that_changed_counts_for_older_runs(open_control: OpenControl) -> None:
    async with open_control() as h:
        model_id = await h.model()
        for seq in (1, 2, 3):
            await save(h, model_id, seq, f"s{seq}")
        assert len(await names(h, model_id)) == 3
    async with open_control(keep_checkpoints=1) as h:
        assert await names(h, model_id) == ["weights/s3"]


async def test_what_a_live_sampler_samples_stays_until_it_ends(open_control: OpenControl) -> None:
    async with open_control(keep_checkpoints=1) as h:
        model_id, reader = await h.model(), await h.session()
        path = await save(h, model_id, 1, "s1")
        await h.control.create_sampling_session(reader, 0, None, path)
        await save(h, model_id, 2, "s2")
        assert await names(h, model_id) == ["weights/s2", "weights/s1"]
        await h.control.finish_session(reader, "success", None)
        assert await names(h, model_id) == ["weights/s2"]


@pytest.mark.parametrize("rule", ["keep", "ttl"])
async def test_a_rule_removes_a_name_without_its_pinned_and_published_versions(
    open_control: OpenControl, rule: str
) -> None:
    async with open_control(keep_checkpoints=1 if rule == "keep" else None, superseded_versions_kept=9) as h:
        model_id = await h.model()
        ttl = 3600 if rule == "ttl" else None
        for seq in range(1, 5):
            await save(h, model_id, seq, "a", overwrite=True, ttl_seconds=ttl if seq == 4 else None)
        await h.control.library.set_pinned(model_id, "weights/a~1", True)
        await h.control.library.set_published(model_id, "weights/a~2", True)
        await save(h, model_id, 5, "b")
        h.clock.advance(3600)
        assert await names(h, model_id) == ["weights/b"]
        for version in (1, 2):
            row = await h.control.library.find_checkpoint(f"tinker://{model_id}/weights/a~{version}")
            assert (await h.control.library.checkpoint_files(model_id, f"weights/a~{row.version}"))[1]
        for version in (3, 4):
            with pytest.raises(NotFound):
                await h.control.library.find_checkpoint(f"tinker://{model_id}/weights/a~{version}")
        await h.control.library.delete_checkpoint(model_id, "weights/a~1")


@pytest.mark.parametrize("rule", ["keep", "superseded"])
async def test_an_older_version_that_a_live_sampler_samples_stays_until_it_ends(
    open_control: OpenControl, rule: str
) -> None:
    async with open_control(keep_checkpoints=1 if rule == "keep" else None, max_loaded_checkpoints=1) as h:
        model_id, reader = await h.model(), await h.session()
        path = await save(h, model_id, 1, "a")
        sampler_id = await h.control.create_sampling_session(reader, 0, None, path)
        last = 4 if rule == "superseded" else 2
        for seq in range(2, last + 1):
            await save(h, model_id, seq, "a", overwrite=True)
        other = await save(h, model_id, last + 1, "b")
        await h.control.sweep()
        await h.control.create_sampling_session(reader, 1, None, other)  # and the first has to be loaded again
        await h.result(h.sample(draw(sampler_id)))
        await h.control.finish_session(reader, "success", None)
        await save(h, model_id, last + 2, "a", overwrite=True)
        await save(h, model_id, last + 3, "c")
        await h.control.sweep()
        with pytest.raises(NotFound):
            await h.control.library.find_checkpoint(f"{path}~1")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tinsmith.keep": "0"}, "must be a whole number of at least 1, not '0'"),
        ({"tinsmith.keep": "many"}, "not 'many'"),
        ({"tinsmith.kept": "1"}, r"user_metadata\['tinsmith.kept'\] means nothing here; a run has 'tinsmith.keep'"),
        ({"tinsmith.pin": "true"}, r"user_metadata\['tinsmith.pin'\] means nothing here"),
    ],
)
async def test_words_of_ours_that_mean_nothing_are_refused(h: Harness, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        raise await h.error(await h.create(await h.session(), user_metadata=metadata))


async def test_notes_of_our_own_client_are_kept_as_they_are(h: Harness) -> None:
    notes = {"tinsmith.run": "r", "tinsmith.step": "3", "tinsmith.parent": "p", "tinsmith.metric.loss": "0.5"}
    model_id = await h.model(user_metadata={**notes, "tinsmith.recovered_from": "x"})
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=1, name="a", user_metadata=notes)))


async def test_a_pin_that_is_no_pin_is_refused(h: Harness) -> None:
    model_id = await h.model()
    request = SaveState(model_id=model_id, seq_id=1, name="a", user_metadata={"tinsmith.pin": "yes"})
    with pytest.raises(InvalidInput, match="must be 'true' or 'false', not 'yes'"):
        raise await h.error(h.submit(request))


async def test_a_full_budget_refuses_saves_until_something_is_deleted(
    open_control: OpenControl, tmp_path: Path
) -> None:
    async with open_control() as h:
        model_id = await h.model()
        size = (await h.control.library.find_checkpoint(await save(h, model_id, 1, "s1"))).size_bytes
    async with open_control(checkpoint_bytes_max=int(2.5 * size)) as h:
        model_id = await h.model()
        second = await save(h, model_id, 1, "s2")
        error = await h.error(h.submit(SaveState(model_id=model_id, seq_id=2, name="s3")))
        assert isinstance(error, DiskBudgetExceeded)
        assert "this server may store" in str(error)
        assert "keep fewer per run (tinsmith.keep)" in str(error)
        with pytest.raises(DiskBudgetExceeded):
            await h.control.library.copy_weights(CopyOrder(source_path=second), None)
        assert (await h.control.library.list_user_checkpoints(10, 0))[1] == 2
        folders = list((tmp_path / "data" / "checkpoints").glob("*/*/*/v*"))
        assert len(folders) == 2
        await h.control.library.delete_checkpoint(model_id, "weights/s2")
        await save(h, model_id, 3, "s3")


async def test_superseded_and_expired_versions_make_room_oldest_first(open_control: OpenControl) -> None:
    async with open_control(superseded_versions_kept=9) as h:
        model_id = await h.model()
        size = (await h.control.library.find_checkpoint(await save(h, model_id, 1, "a"))).size_bytes
        await save(h, model_id, 2, "a", overwrite=True)
        await save(h, model_id, 3, "b", ttl_seconds=3600)
    async with open_control(superseded_versions_kept=9, checkpoint_bytes_max=int(3.5 * size)) as h:
        model_id = await h.model()
        await save(h, model_id, 1, "c")  # pushes out a~1
        h.clock.advance(3600)
        await save(h, model_id, 2, "d")  # b has expired
        assert isinstance(await h.error(h.submit(SaveState(model_id=model_id, seq_id=3, name="e"))), DiskBudgetExceeded)
        evicted = [(path, why) for event, path, why in await events(h) if event == "checkpoint_evict"]
        assert evicted == [("a", "this server needed its room"), ("b", "this server needed its room")]


async def test_a_quota_of_a_user_counts_that_users_checkpoints_only(open_control: OpenControl) -> None:
    async with open_control() as h:
        model_id = await h.model()
        size = (await h.control.library.find_checkpoint(await save(h, model_id, 1, "s1"))).size_bytes
        quotas = {"local": Quota(disk_bytes=int(1.5 * size))}
        h.control.accounts.quota_of_user = lambda user_id: quotas[user_id]  # type: ignore[method-assign]
        error = await h.error(h.submit(SaveState(model_id=model_id, seq_id=2, name="s2")))
        assert "user 'local' may store" in str(error)
        quotas["local"] = Quota()
        await save(h, model_id, 3, "s2")


async def test_sessions_that_are_ended_for_silence_are_noted(h: Harness, caplog: pytest.LogCaptureFixture) -> None:
    model_id = await h.model()
    await h.result(h.submit(forward_backward(model_id, 1)))
    await h.result(h.submit(optim(model_id, 2)))
    path = await save(h, model_id, 3, "s", ttl_seconds=3600)
    h.clock.advance(3600)
    with caplog.at_level(logging.INFO, logger="tinsmith.control"):
        await h.control.sweep()
    noted = await events(h)
    assert ("session_expire", None, "no heartbeat for 600 s") in noted
    assert ("checkpoint_expire", "s", "its time to live is over") in noted
    assert f"checkpoint {path} was removed: its time to live is over" in caplog.text
    assert f"session {model_id.partition(':')[0]} was ended: no heartbeat for 600 s" in caplog.text


async def test_an_unnamed_sampler_that_nobody_uses_expires(open_control: OpenControl) -> None:
    async with open_control(sampler_ttl_s=300) as h:
        model_id = await h.model(await h.control.create_session(NewSession(owner="anna")))
        samplers = []
        for n in (0, 1):
            save_it = SaveForSampler(model_id=model_id, seq_id=n + 1, sampling_session_seq_id=n)
            samplers.append((await h.result(h.submit(save_it))).sampling_session_id)
        h.clock.advance(200)
        await h.result(h.sample(draw(samplers[1])))
        h.clock.advance(200)
        await h.control.sweep()
        message = f"sampler '{samplers[0]}' was not used for 300 s; save weights under a name"
        assert message in str(await h.error(h.sample(draw(samplers[0]))))
        await h.result(h.sample(draw(samplers[1], seq_id=1)))
        assert await events(h) == [("sampler_expire", None, "was not used for 300 s")]
        assert await h.control.library.audit_log("all", None, owner="anna")
        row = await h.control._registry.read(lambda c: records.sampler(c, samplers[1]))
        assert row is not None
        assert row.owner == "anna"
