"""Exports of merged weights: made once, awaited by whoever asks, removed if they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.control.harness import Harness
from tinsmith.control.exports import MergeOrder
from tinsmith.control.requests import SaveState
from tinsmith.types.errors import AlreadyExists, InvalidInput, NotFound, StorageError, Unsupported
from tinsmith.types.operations import MergeAdapter

pytestmark = pytest.mark.anyio


async def saved(h: Harness) -> str:
    model_id = await h.model()
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=1, name="a")))
    return model_id


async def test_an_export_is_an_external_checkpoint_of_the_run_and_made_once(h: Harness) -> None:
    run_id, library = await saved(h), h.control.library
    order = MergeOrder(run_id=run_id, checkpoint_id="weights/~latest", ttl_seconds=3600)
    made = await library.export_merged(order)
    assert made is not None
    assert made.tinker_path == f"tinker://{run_id}/external_weights/a-merged"
    assert made.expires_at is not None
    assert (await library.export_merged(order)) == made
    assert len(h.asked(MergeAdapter)) == 1
    row, files = await library.checkpoint_files(run_id, "external_weights/a-merged")
    assert row.digest == (await library.find_checkpoint(f"tinker://{run_id}/weights/a")).digest
    assert row.size_bytes == sum(file.size for file in files)
    events = [entry.event for entry in await library.audit_log("checkpoints", None)]
    assert events == ["checkpoint_create", "checkpoint_export"]


async def test_a_name_is_not_given_to_two_exports(h: Harness) -> None:
    run_id, library = await saved(h), h.control.library
    await library.export_merged(MergeOrder(run_id=run_id, checkpoint_id="weights/a", name="x"))
    with pytest.raises(AlreadyExists, match="is something else; delete it, or take another name"):
        await library.export_merged(MergeOrder(run_id=run_id, checkpoint_id="weights/a", name="x", dtype="float16"))
    await library.delete_checkpoint(run_id, "external_weights/x")
    assert await library.export_merged(MergeOrder(run_id=run_id, checkpoint_id="weights/a", name="x", dtype="float16"))
    with pytest.raises(InvalidInput, match="is an export"):
        await library.export_merged(MergeOrder(run_id=run_id, checkpoint_id="external_weights/x"))


async def test_whoever_asks_early_is_told_to_ask_again(h: Harness) -> None:
    run_id = await saved(h)
    exports = h.control.library._exports
    order = MergeOrder(run_id=run_id, checkpoint_id="weights/a")
    h.engine.pause()
    assert await exports.merged(order, owner=None, hold_s=0.01) is None
    with pytest.raises(AlreadyExists, match="being made of something else"):
        await exports.merged(MergeOrder(run_id=run_id, checkpoint_id="weights/a", dtype="float16"), owner=None)
    h.engine.resume()
    assert (await exports.merged(order, owner=None)) is not None
    assert len(h.asked(MergeAdapter)) == 1


async def test_an_export_that_fails_says_why_and_can_be_asked_again(h: Harness, tmp_path: Path) -> None:
    run_id, library = await saved(h), h.control.library
    order = MergeOrder(run_id=run_id, checkpoint_id="weights/a")
    for error in (StorageError("No space left"), Unsupported("quantized")):
        h.engine.fail_next(MergeAdapter, error)
        with pytest.raises(type(error), match=str(error)):
            await library.export_merged(order)
    assert not list((tmp_path / "data" / "checkpoints").glob("*/external_weights/*/*"))
    assert await library.export_merged(order)
    with pytest.raises(NotFound):
        await library.export_merged(MergeOrder(run_id=run_id, checkpoint_id="weights/b"))


async def test_an_export_that_nobody_came_back_for_is_forgotten_when_it_is_deleted(h: Harness) -> None:
    run_id = await saved(h)
    exports, library = h.control.library._exports, h.control.library
    order = MergeOrder(run_id=run_id, checkpoint_id="weights/a")
    h.engine.pause()
    assert await exports.merged(order, owner=None, hold_s=0.01) is None
    h.engine.resume()
    ((_, _, task),) = exports._running.values()
    await task
    made = await library.export_merged(order)
    assert made is not None
    await library.delete_checkpoint(run_id, "external_weights/a-merged")
    other = MergeOrder(run_id=run_id, checkpoint_id="weights/a", dtype="float16")
    assert await library.export_merged(other) is not None
    await library.delete_checkpoint(run_id, "external_weights/a-merged")
    assert await library.export_merged(order) is not None
    assert await library.find_checkpoint(made.tinker_path)
    assert len(h.asked(MergeAdapter)) == 3


async def test_an_export_that_failed_unseen_does_not_keep_its_name(h: Harness) -> None:
    run_id = await saved(h)
    exports, library = h.control.library._exports, h.control.library
    h.engine.pause()
    h.engine.fail_next(MergeAdapter, StorageError("No space left"))
    assert await exports.merged(MergeOrder(run_id=run_id, checkpoint_id="weights/a"), owner=None, hold_s=0.01) is None
    h.engine.resume()
    await h.settle()
    order = MergeOrder(run_id=run_id, checkpoint_id="weights/a", dtype="float16")
    assert await library.export_merged(order) is not None
