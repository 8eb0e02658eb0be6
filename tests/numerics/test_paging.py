"""An adapter that leaves the device and comes back is the same to the last bit; others go on meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.numerics.driver import Driver, item, random_datum
from tinsmith.engine import engine as engine_module
from tinsmith.types import AdamParams
from tinsmith.types.errors import NotFound
from tinsmith.types.operations import (
    DropAdapter,
    LoadAdapter,
    LoraSpec,
    OptimStep,
    ParkAdapter,
    PublishSnapshot,
    SaveAdapter,
    UnparkAdapter,
)

WHOLE = {"optimizer": True, "gradients": True}


def train(driver: Driver, model_id: str, steps: range) -> None:
    for step in steps:
        driver.train(item(model_id, random_datum(np.random.default_rng(step), 12)))
        driver.step(model_id, learning_rate=0.01, weight_decay=0.01)


def leave_half_way(driver: Driver) -> None:
    """Two steps, and gradients that no step has taken yet."""
    driver.create("m", rank=3)
    train(driver, "m", range(2))
    driver.train(item("m", random_datum(np.random.default_rng(90), 12)))


def test_an_adapter_parked_between_two_steps_goes_on_bitwise(qwen_folder: Path, tmp_path: Path) -> None:
    straight, paged = Driver(qwen_folder), Driver(qwen_folder)
    for driver in (straight, paged):
        leave_half_way(driver)
    paged(PublishSnapshot(model_id="m", snapshot_id="s"))
    paged(ParkAdapter(model_id="m"))
    with pytest.raises(NotFound, match="not loaded"):
        paged.train(item("m", random_datum(np.random.default_rng(1), 12)))
    saved = paged(SaveAdapter(model_id="m", folder=str(tmp_path / "p"), optimizer=True, gradients=True, is_idle=True))
    assert saved.step == 2
    paged(UnparkAdapter(model_id="m"))
    for driver in (straight, paged):
        train(driver, "m", range(3, 5))
    assert np.array_equal(paged.weights("m"), straight.weights("m"))
    paged(DropAdapter(model_id="m"))
    paged(LoadAdapter(model_id="m", folder=str(tmp_path / "p"), optimizer=True, gradients=True))
    train(paged, "m", range(3, 5))
    assert np.array_equal(paged.weights("m"), straight.weights("m"))


def test_a_parked_adapter_counts_and_can_be_dropped(driver: Driver) -> None:
    driver.create("m")
    driver(ParkAdapter(model_id="m"))
    driver(ParkAdapter(model_id="m"))
    assert driver.engine.status().num_adapters == 1
    driver(DropAdapter(model_id="m"))
    with pytest.raises(NotFound, match="not loaded"):
        driver(UnparkAdapter(model_id="m"))


@pytest.mark.parametrize("moves", ["in", "out"])
def test_while_files_are_read_or_written_others_train_and_its_own_requests_wait(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: str
) -> None:
    """The disk answers only once the other model's step is answered."""
    leave_half_way(driver)
    driver.create("other")
    folder = str(tmp_path / "p")
    driver(SaveAdapter(model_id="m", folder=folder, optimizer=True, gradients=True))
    is_slow = threading.Event()

    def slowly(name: str) -> None:
        real = getattr(engine_module, name)

        def work(*arguments: Any, **options: Any) -> Any:
            assert is_slow.wait(30)
            return real(*arguments, **options)

        monkeypatch.setattr(engine_module, name, work)

    slowly("load_checkpoint" if moves == "in" else "save_checkpoint")
    move = (
        LoadAdapter(model_id="m", folder=folder, optimizer=True, gradients=True)
        if moves == "in"
        else SaveAdapter(model_id="m", folder=folder + "2", optimizer=True, gradients=True, is_idle=True)
    )
    step = AdamParams(learning_rate=0.01)
    data = random_datum(np.random.default_rng(5), 12)
    steps = [OptimStep(model_id=model_id, params=step) for model_id in ("m", "m", "other")]
    queued = [move, steps[0], item("m", data), item("other", data), item("m", data), *steps[1:]]
    for ticket, operation in enumerate(queued):
        driver.engine.accept(ticket, operation)
    order: list[int] = []
    while len(order) < 7:
        order += [ticket for ticket, _ in driver.engine.work()]
        if set(order) == {3, 6}:
            is_slow.set()
    assert order == [3, 6, 0, 1, 2, 4, 5]


def test_what_an_adapter_takes_is_known_before_it_is_made(driver: Driver) -> None:
    for spec in (LoraSpec(rank=3, seed=1), LoraSpec(rank=8, seed=1, train_mlp=False), LoraSpec(rank=2, seed=1)):
        num_parameters = driver.engine._base.layout(spec).num_parameters
        assert driver.engine.card.adapter_bytes(spec) == 16 * num_parameters
        assert driver.engine.card.snapshot_bytes(spec) == 4 * num_parameters


def test_a_page_waits_for_one_pass_of_others_and_not_for_their_queue(qwen_folder: Path, tmp_path: Path) -> None:
    driver = Driver(qwen_folder, deterministic=True)  # every request a pass of its own
    leave_half_way(driver)
    driver.create("other")
    folder = str(tmp_path / "p")
    page_out = SaveAdapter(model_id="m", folder=folder, optimizer=True, gradients=True, is_idle=True)
    data = random_datum(np.random.default_rng(5), 12)
    for page in (page_out, DropAdapter(model_id="m"), LoadAdapter(model_id="m", folder=folder, **WHOLE)):
        for ticket in range(20):
            driver.engine.accept(ticket, item("other", data))
        driver.engine.accept(20, page)
        answered = [ticket for ticket, _ in driver.engine.work()]
        for _ in range(15_000):  # of two milliseconds
            if all(job.done.done() for job in driver.engine._aside._jobs.values()):
                break
            driver.engine._aside.wait()
        answered += [ticket for ticket, _ in driver.engine.work()]
        assert 20 in answered
        assert len(answered) <= 3
        while driver.engine.has_work:
            driver.engine.work()
    train(driver, "m", range(2, 3))


def test_a_page_waits_for_what_was_asked_of_its_own_adapter_before(driver: Driver) -> None:
    driver.create("m")
    data = random_datum(np.random.default_rng(5), 12)
    outcomes = driver.all([item("m", data), item("m", data), DropAdapter(model_id="m"), item("m", data)])
    assert [isinstance(outcome, NotFound) for outcome in outcomes] == [False, False, False, True]
