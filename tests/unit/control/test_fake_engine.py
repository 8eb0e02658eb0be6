"""The fake engine keeps the promises of `types.operations`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from tinsmith.runtime.fake import FakeEngine
from tinsmith.types import AdamParams, Datum, ModelInput
from tinsmith.types.errors import CheckpointDamaged, EngineDied, InvalidInput, StorageError, UserError
from tinsmith.types.operations import (
    CancelSample,
    CreateAdapter,
    LoadAdapter,
    LoadSnapshot,
    LoraSpec,
    OptimStep,
    PublishSnapshot,
    Sample,
    SaveAdapter,
    TrainItem,
)

SPEC = LoraSpec(rank=4, seed=7)
DATUM = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]})


def with_engine(test: Callable[[FakeEngine], Awaitable[None]]) -> None:
    async def run() -> None:
        engine = FakeEngine()
        await engine.start()
        try:
            await test(engine)
        finally:
            await engine.close()

    asyncio.run(run())


def train(model_id: str) -> TrainItem:
    return TrainItem(model_id=model_id, data=(DATUM,), loss_fn="cross_entropy")


def draw(snapshot_id: str | None, **kwargs: object) -> Sample:
    values = {"prompt": np.asarray([5, 6]), "num_samples": 2, "seed": 3, "max_tokens": 4, **kwargs}
    return Sample(snapshot_id=snapshot_id, **values)  # type: ignore[arg-type]


def test_every_optimizer_step_lowers_the_loss_by_the_same_factor() -> None:
    async def body(engine: FakeEngine) -> None:
        await engine.submit(CreateAdapter(model_id="a", lora=SPEC)).answer
        losses = []
        for _ in range(3):
            losses.append((await engine.submit(train("a")).answer).loss_sum)
            metrics = await engine.submit(OptimStep(model_id="a", params=AdamParams())).answer
            assert metrics["step_applied"] == 1
        assert losses[1] == pytest.approx(0.8 * losses[0])
        assert losses[2] == pytest.approx(0.64 * losses[0])
        metrics = await engine.submit(OptimStep(model_id="a", params=AdamParams())).answer
        assert metrics["step_applied"] == 0

    with_engine(body)


def test_a_snapshot_does_not_move_with_training() -> None:
    async def body(engine: FakeEngine) -> None:
        await engine.submit(CreateAdapter(model_id="a", lora=SPEC)).answer
        await engine.submit(PublishSnapshot(model_id="a", snapshot_id="s")).answer
        before = await engine.submit(draw("s", prompt_logprobs=True)).answer
        await engine.submit(train("a")).answer
        await engine.submit(OptimStep(model_id="a", params=AdamParams())).answer
        after = await engine.submit(draw("s", prompt_logprobs=True)).answer
        assert [s.tokens for s in before.sequences] == [s.tokens for s in after.sequences]
        assert before.prompt_logprobs == after.prompt_logprobs
        assert before.prompt_logprobs[0] is None
        assert before.sequences[0].tokens != before.sequences[1].tokens

    with_engine(body)


def test_a_saved_folder_restores_weights_and_refuses_a_changed_file(tmp_path: Path) -> None:
    folder = str(tmp_path / "run" / "v1")

    async def body(engine: FakeEngine) -> None:
        await engine.submit(CreateAdapter(model_id="a", lora=SPEC)).answer
        await engine.submit(train("a")).answer
        await engine.submit(OptimStep(model_id="a", params=AdamParams())).answer
        save = SaveAdapter(model_id="a", folder=folder, optimizer=False, record={"name": "x"})
        saved = await engine.submit(save).answer
        assert saved.step == 1
        assert await engine.submit(LoadSnapshot(snapshot_id="s", folder=folder)).answer == saved.digest
        assert await engine.submit(LoadAdapter(model_id="b", folder=folder, optimizer=False)).answer == SPEC
        with pytest.raises(InvalidInput, match="no optimizer state"):
            await engine.submit(LoadAdapter(model_id="b", folder=folder, optimizer=True)).answer
        with pytest.raises(StorageError, match="exists already"):
            await engine.submit(save).answer
        with (Path(folder) / "adapter_model.safetensors").open("ab") as file:
            file.write(b"x")
        with pytest.raises(CheckpointDamaged, match=r"adapter_model\.safetensors"):
            await engine.submit(LoadSnapshot(snapshot_id="t", folder=folder)).answer

    with_engine(body)


def test_scripted_faults_strike_once_and_death_fails_what_is_open() -> None:
    async def body(engine: FakeEngine) -> None:
        await engine.submit(CreateAdapter(model_id="a", lora=SPEC)).answer
        engine.fail_items("a", InvalidInput("bad"))
        first, second = engine.submit_all([train("a"), train("a")])
        with pytest.raises(InvalidInput, match="bad"):
            await first.answer
        assert (await second.answer).loss_sum > 0
        engine.pause()
        waiting, cancelled = engine.submit(draw(None)), engine.submit(draw(None))
        await engine.submit(CancelSample(ticket=cancelled.ticket)).answer
        with pytest.raises(UserError, match="cancelled"):
            await cancelled.answer
        engine.die("killed")
        with pytest.raises(EngineDied, match="killed"):
            await waiting.answer
        with pytest.raises(EngineDied, match="killed"):
            engine.submit(draw(None))

    with_engine(body)


def test_a_stop_token_ends_a_sequence_and_is_its_last_token() -> None:
    async def body(engine: FakeEngine) -> None:
        free = await engine.submit(draw(None, num_samples=1)).answer
        stop = free.sequences[0].tokens[1]
        cut = await engine.submit(draw(None, num_samples=1, stop_token_ids=(stop,))).answer
        assert cut.sequences[0].tokens == free.sequences[0].tokens[:2]
        assert (free.sequences[0].stop_reason, cut.sequences[0].stop_reason) == ("length", "stop")

    with_engine(body)
