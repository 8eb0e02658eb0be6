"""Which checkpoint an address means, wherever one is taken."""

from __future__ import annotations

import pytest

from tests.unit.control.harness import Harness, forward_backward, optim
from tinsmith.control.copies import CopyOrder
from tinsmith.control.requests import CreateModelFromCheckpoint, LoadState, SaveForSampler, SaveState
from tinsmith.types.errors import InvalidInput, NotFound

pytestmark = pytest.mark.anyio


async def three_steps(h: Harness, **metadata: dict[str, str]) -> str:
    """A run that saves after each of three steps, as s1, s2, s3; its losses fall."""
    model_id = await h.model()
    for step in (1, 2, 3):
        h.clock.advance(1)
        await h.result(h.submit(forward_backward(model_id, 3 * step - 2)))
        await h.result(h.submit(optim(model_id, 3 * step - 1)))
        await h.result(
            h.submit(
                SaveState(
                    model_id=model_id,
                    seq_id=3 * step,
                    name=f"s{step}",
                    user_metadata=metadata.get(f"s{step}"),
                )
            )
        )
    return model_id


async def name_at(h: Harness, run_id: str, address: str) -> tuple[str, int | None]:
    found = await h.control.library.get_checkpoint(run_id, f"weights/{address}")
    return found.tinker_path.rpartition("/")[2], found.step


async def test_latest_best_and_versions_are_found(h: Harness) -> None:
    model_id = await three_steps(h, s1={"score": "0.9", "note": "first"}, s2={"score": "0.1"})
    assert await name_at(h, model_id, "~latest") == ("s3", 3)
    assert await name_at(h, model_id, "~best(loss)") == ("s3", 3)
    assert await name_at(h, model_id, "~best(loss:sum,max)") == ("s1", 1)
    assert await name_at(h, model_id, "~best(score)") == ("s1", 1)
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=10, name="s1", overwrite=True)))
    assert await name_at(h, model_id, "s1") == ("s1", 3)
    assert await name_at(h, model_id, "s1~1") == ("s1~1", 1)
    assert await name_at(h, model_id, "s1~2") == ("s1", 3)


async def test_a_checkpoint_says_version_step_metrics_digest_and_parent(h: Harness) -> None:
    model_id = await three_steps(h)
    listed = await h.control.library.list_checkpoints(model_id)
    assert [(one.version, one.step) for one in listed] == [(1, 3), (1, 2), (1, 1)]
    assert [one.parent for one in listed] == [
        f"tinker://{model_id}/weights/s2~1",
        f"tinker://{model_id}/weights/s1~1",
        None,
    ]
    losses = [(one.metrics or {})["loss:sum"] for one in listed]
    assert losses == sorted(losses)
    assert len({one.digest for one in listed}) == 3


async def test_what_is_not_there_is_refused_with_what_is(h: Harness) -> None:
    model_id = await three_steps(h)
    for address, message in {
        "s4": "newest first: 's3', 's2', 's1'",
        "s1~2": "of 's1' there is version 1",
        "s9~1": "there is no 's9'",
        "~best(accuracy)": "none of the run's 3 weights has a metric 'accuracy'; they have grad_norm:mean",
    }.items():
        with pytest.raises(NotFound, match=message):
            await h.control.library.get_checkpoint(model_id, f"weights/{address}")
    with pytest.raises(NotFound, match="the run has no sampler_weights"):
        await h.control.library.find_checkpoint(f"tinker://{model_id}/sampler_weights/~latest")


async def test_loading_sampling_copying_and_describing_take_addresses(h: Harness) -> None:
    model_id = await three_steps(h)
    first, best = f"tinker://{model_id}/weights/s1~1", f"tinker://{model_id}/weights/~best(loss)"
    session_id = await h.session()
    request = CreateModelFromCheckpoint(session_id=session_id, model_seq_id=0, path=best, optimizer=True)
    receipt = await h.control.create_model_from_checkpoint(request)
    assert (await h.result(receipt)).path == f"tinker://{model_id}/weights/s3"
    loaded = await h.result(h.submit(LoadState(model_id=receipt.model_id or "", seq_id=1, path=first, optimizer=True)))
    assert loaded.path == first
    saved = h.submit(SaveForSampler(model_id=receipt.model_id or "", seq_id=2, name="p"))
    digest = (await h.control.library.find_checkpoint((await h.result(saved)).path)).digest
    assert digest == (await h.control.library.find_checkpoint(first)).digest
    sampler = await h.control.create_sampling_session(session_id, 0, None, best)
    assert h.control.get_sampler(sampler).model_path == f"tinker://{model_id}/weights/s3"
    copied = await h.control.library.find_checkpoint(
        await h.control.library.copy_weights(CopyOrder(source_path=first), None)
    )
    assert (copied.digest, copied.step) == (digest, 1)
    assert (await h.control.library.weights_info(f"tinker://{model_id}/weights/~latest")).lora_rank == 4


async def test_a_sampler_of_latest_stays_with_what_that_was(h: Harness) -> None:
    model_id = await three_steps(h)
    sampler = await h.control.create_sampling_session(
        await h.session(), 0, None, f"tinker://{model_id}/weights/~latest"
    )
    digest = h.control.sampler_digest(sampler)
    await h.result(h.submit(forward_backward(model_id, 10)))
    await h.result(h.submit(optim(model_id, 11)))
    h.clock.advance(1)
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=12, name="s4")))
    assert h.control.sampler_digest(sampler) == digest
    assert await name_at(h, model_id, "~latest") == ("s4", 4)


async def test_one_version_can_be_deleted_and_what_moves_cannot(h: Harness) -> None:
    model_id = await three_steps(h)
    await h.result(h.submit(SaveState(model_id=model_id, seq_id=10, name="s1", overwrite=True)))
    with pytest.raises(InvalidInput, match="just now; delete that by its name or version"):
        await h.control.library.delete_checkpoint(model_id, "weights/~latest")
    await h.control.library.delete_checkpoint(model_id, "weights/s1~1")
    assert await name_at(h, model_id, "s1") == ("s1", 3)
    with pytest.raises(NotFound, match="of 's1' there is version 2"):
        await h.control.library.get_checkpoint(model_id, "weights/s1~1")


async def test_expired_checkpoints_are_no_candidates(h: Harness) -> None:
    model_id = await three_steps(h)
    await h.control.library.set_checkpoint_ttl(model_id, "weights/~latest", 3600)
    h.clock.advance(3601)
    assert await name_at(h, model_id, "~latest") == ("s2", 2)
    assert await name_at(h, model_id, "~best(loss)") == ("s2", 2)
