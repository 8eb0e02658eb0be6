"""A run whose gradients are not finite, over a restart of the server, with a real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.control.harness import Harness, ManualClock, forward_backward, optim
from tinsmith.control.requests import LoadState, SaveState
from tinsmith.control.service import Control
from tinsmith.server.assemble import open_control
from tinsmith.types import Datum, LoraConfig, ModelInput
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import AdapterCorrupted

pytestmark = pytest.mark.anyio

BLOWN_UP = Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8], "weights": [3e38, 3e38, 3e38]})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def control_in(folder: Path) -> Control:
    options = EngineOptions(dtype="float32", device="cpu", threads=1)
    return open_control([ModelSource.parse("tinsmith/tiny")], options, folder, home="thread", ledger=True)


def harness(control: Control) -> Harness:
    return Harness(control, None, ManualClock())  # type: ignore[arg-type]


async def test_a_corrupted_run_is_marked_and_refuses_training_until_a_good_checkpoint_is_loaded(
    tmp_path: Path,
) -> None:
    control = control_in(tmp_path)
    await control.start()
    try:
        h = harness(control)
        session_id = await h.session()
        model_id = await h.model(session_id, base_model="tinsmith/tiny", lora_config=LoraConfig(rank=2, seed=1))
        await h.result(h.submit(forward_backward(model_id, 1)))
        await h.result(h.submit(optim(model_id, 2)))
        good = await h.result(h.submit(SaveState(model_id=model_id, seq_id=3, name="good")))
        await h.outcome(h.submit(forward_backward(model_id, 4, data=(BLOWN_UP,))))
        assert isinstance(await h.error(h.submit(optim(model_id, 5))), AdapterCorrupted)
    finally:
        await control.close()

    control = control_in(tmp_path)
    await control.start()
    try:
        h, library = harness(control), control.library
        assert (await library.get_training_run(model_id)).corrupted
        assert (await library.get_session(session_id)).corrupted_training_run_ids == [model_id]
        assert control.model_info(model_id).corrupted
        error = await h.error(h.submit(forward_backward(model_id, 6)))
        assert isinstance(error, AdapterCorrupted)
        assert f"model {model_id!r} refuses further training: the gradient norm of step 2 was" in str(error)
        await h.result(h.submit(LoadState(model_id=model_id, seq_id=7, path=good, optimizer=True)))
        await h.result(h.submit(forward_backward(model_id, 8)))
        assert (await h.result(h.submit(optim(model_id, 9))))["step_applied"] == 1
        assert not (await library.get_training_run(model_id)).corrupted
        assert not control.model_info(model_id).corrupted
    finally:
        await control.close()
