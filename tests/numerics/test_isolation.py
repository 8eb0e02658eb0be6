"""What one tenant does never reaches another's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.numerics.driver import Driver, item, random_datum, rl_datum, sample_operation
from tinsmith.engine import adapter as adapter_module
from tinsmith.engine import trainer as trainer_module
from tinsmith.types.errors import AdapterCorrupted, NotFound, ServerError, TinsmithError
from tinsmith.types.operations import CancelSample, OptimStep, PublishSnapshot, TrainItem
from tinsmith.types.params import AdamParams
from tinsmith.types.results import ForwardBackwardOutput

TENANTS = {
    "a": (4, "cross_entropy", {}),
    "b": (9, "ppo", {"train_mlp": False}),
    "c": (1, "dro", {"train_unembed": False}),
}


def test_adapters_trained_in_one_batch_equal_each_trained_alone(qwen_folder: Path) -> None:
    together = Driver(qwen_folder, max_micro_batch_tokens=100)
    for name in TENANTS:
        open_tenant(together, name)
    for step in range(4):
        together.train(*(training_item(name, step) for name in TENANTS))
        for name in TENANTS:
            together.step(name, learning_rate=3e-3)
    for name in TENANTS:
        alone = Driver(qwen_folder)
        open_tenant(alone, name)
        for step in range(4):
            alone.train(training_item(name, step))
            alone.step(name, learning_rate=3e-3)
        assert np.abs(together.weights(name) - alone.weights(name)).max() <= 1e-5


def test_optimizer_steps_of_one_leave_the_other_bitwise_unchanged(driver: Driver) -> None:
    rng = np.random.default_rng(0)
    driver.create("a")
    driver.create("b")
    driver.train(item("a", random_datum(rng, 20)), item("b", random_datum(rng, 20)))
    weights, grads = driver.weights("a"), driver.grads("a")
    driver.step("b", learning_rate=0.1, weight_decay=0.5)
    assert np.array_equal(driver.weights("a"), weights)
    assert np.array_equal(driver.grads("a"), grads)


def test_a_tenants_nan_stays_with_the_tenant(qwen_folder: Path) -> None:
    rng = np.random.default_rng(1)
    datum = random_datum(rng, 20)
    alone, beside = Driver(qwen_folder), Driver(qwen_folder)
    for driver in (alone, beside):
        driver.create("a")
    beside.create("b")
    beside.engine._adapters["b"].weights.flat_P.fill_(1e30)  # finite; all that comes of it is NaN
    alone.train(item("a", datum))
    beside.train(item("b", random_datum(rng, 30)), item("a", datum), item("b", random_datum(rng, 3)))
    assert np.abs(alone.grads("a") - beside.grads("a")).max() <= 1e-5 * np.abs(alone.grads("a")).max()
    before = beside.weights("b")
    with pytest.raises(AdapterCorrupted, match=r"'b' refuses further training.*nan"):
        beside.step("b")
    assert np.array_equal(beside.weights("b"), before, equal_nan=True)
    outcomes = beside.all([item("b", datum), item("a", datum)])
    assert isinstance(outcomes[0], AdapterCorrupted)
    assert not isinstance(outcomes[1], TinsmithError)
    assert beside.step("a")["step_applied"] == 1


@pytest.mark.parametrize("forward_only", [True, False])
def test_weights_that_a_step_overflowed_are_told_by_the_first_read(driver: Driver, forward_only: bool) -> None:
    datum = random_datum(np.random.default_rng(2), 20)
    driver.create("m")
    driver.create("other")
    driver.train(item("m", datum))
    driver.step("m", learning_rate=1e38)
    driver.train(item("other", datum))
    for _ in range(2):
        guilty, fine = driver.all([item("m", datum, forward_only=forward_only), item("other", datum)])
        assert isinstance(guilty, AdapterCorrupted)
        assert isinstance(fine, ForwardBackwardOutput)
    with pytest.raises(AdapterCorrupted, match="its weights are no longer finite after step 1"):
        driver.step("m")


def test_a_pass_that_fails_fails_only_the_guilty_and_loses_no_gradient(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    for name in ("a", "b"):
        driver.create(name)
        driver.train(item(name, random_datum(rng, 10)))
    good, bad = random_datum(rng, 15), random_datum(rng, 66)
    expected, kept = driver.grads("a"), driver.grads("b")
    driver.create("reference")
    driver.train(item("reference", good))
    fail_passes_with(66, monkeypatch)
    outcomes = driver.all([item("a", good), item("b", good, bad), item("ghost", good)])
    assert outcomes[0].metrics["tokens:sum"] == 15
    assert isinstance(outcomes[1], ServerError)
    assert "out of memory" in str(outcomes[1])
    assert isinstance(outcomes[2], NotFound)
    assert np.abs(driver.grads("a") - expected - driver.grads("reference")).max() <= 1e-5 * np.abs(expected).max()
    assert np.array_equal(driver.grads("b"), kept)


def test_a_long_request_that_fails_late_is_undone_whole_and_nothing_else_is(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It spans passes, begins after another of its adapter, and shares its last pass with another adapter."""
    rng = np.random.default_rng(12)
    driver = Driver(qwen_folder, max_micro_batch_tokens=90)
    early, long, late = random_datum(rng, 20), [random_datum(rng, 40) for _ in range(4)], random_datum(rng, 15)
    guilty, other = random_datum(rng, 66), [random_datum(rng, 30) for _ in range(9)]
    for name in ("a", "b", "reference-a", "reference-b"):
        driver.create(name)
    driver.train(item("reference-a", early, late))
    driver.train(item("reference-b", *other))
    fail_passes_with(66, monkeypatch)
    outcomes = driver.all([item("a", early), item("a", *long, guilty), item("a", late), item("b", *other)])
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "ForwardBackwardOutput",
        "ServerError",
        "ForwardBackwardOutput",
        "ForwardBackwardOutput",
    ]
    assert len(outcomes[3].loss_fn_outputs) == 9
    for name in ("a", "b"):
        expected = driver.grads(f"reference-{name}")
        assert np.abs(driver.grads(name) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert driver.step("a")["step_applied"] == 1


def test_a_small_request_is_answered_before_a_large_one_of_its_batch_ends(qwen_folder: Path) -> None:
    rng = np.random.default_rng(13)
    driver = Driver(qwen_folder, max_micro_batch_tokens=64)
    for name in ("large", "small"):
        driver.create(name)
    driver.engine.accept(0, item("large", *(random_datum(rng, 60) for _ in range(8))))
    driver.engine.accept(1, item("small", random_datum(rng, 10)))
    finished = [[ticket for ticket, _ in driver.engine.work()] for _ in range(12)]
    assert finished[0] == [1]
    assert finished[1:8].count([0]) == 0
    assert [0] in finished[8:]


def test_optimizer_steps_taken_together_equal_steps_taken_alone_bitwise(qwen_folder: Path) -> None:
    params = {
        "a": AdamParams(learning_rate=1e-2, weight_decay=0.1),
        "b": AdamParams(learning_rate=1e-2, weight_decay=0.1),
        "c": AdamParams(learning_rate=3e-3, beta1=0.8, grad_clip_norm=0.01),
    }
    together, alone = Driver(qwen_folder), Driver(qwen_folder)
    for driver in (together, alone):
        for name in TENANTS:
            open_tenant(driver, name)
    for step in range(3):
        for name in TENANTS:
            for driver in (together, alone):
                driver.train(training_item(name, step))
            alone(OptimStep(model_id=name, params=params[name]))
        together.all([OptimStep(model_id=name, params=params[name]) for name in TENANTS])
    for name in TENANTS:
        assert np.array_equal(together.weights(name), alone.weights(name))


def test_a_step_without_memory_fails_alone_and_keeps_its_gradient(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(15)
    for name in ("a", "b"):
        driver.create(name)
        driver.train(item(name, random_datum(rng, 20)))
    driver(PublishSnapshot(model_id="b", snapshot_id="frozen"))
    weights, grads = driver.weights("b"), driver.grads("b")
    adapter = driver.engine._adapters["b"]
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "_writable_weights", lambda: (_ for _ in ()).throw(MemoryError("no room")))
        first, second = driver.all([OptimStep(model_id=name, params=AdamParams()) for name in ("b", "a")])
    assert isinstance(first, ServerError)
    assert "no room" in str(first)
    assert second["step_applied"] == 1
    assert np.array_equal(driver.weights("b"), weights)
    assert np.array_equal(driver.grads("b"), grads)
    assert driver.step("b")["step_applied"] == 1


def test_a_step_that_stops_half_way_is_never_trained_on(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(16)
    for name in ("a", "b", "idle"):
        driver.create(name)
    for name in ("a", "b"):
        driver.train(item(name, random_datum(rng, 20)))

    def stop(steps: list[object]) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "adamw_steps", stop)
        outcomes = driver.all([OptimStep(model_id=name, params=AdamParams()) for name in ("a", "idle", "b")])
    assert [type(outcome) for outcome in outcomes] == [AdapterCorrupted, dict, AdapterCorrupted]
    assert "device lost" in str(outcomes[0])
    with pytest.raises(AdapterCorrupted, match="'a' refuses further training: its optimizer step failed"):
        driver.train(item("a", random_datum(rng, 5)))
    driver.train(item("idle", random_datum(rng, 5)))


def test_two_steps_of_one_adapter_in_a_row_are_two_steps(driver: Driver) -> None:
    rng = np.random.default_rng(14)
    driver.create("a")
    driver.train(item("a", random_datum(rng, 20)))
    steps = [OptimStep(model_id=name, params=AdamParams()) for name in ("a", "ghost", "a")]
    first, ghost, second = driver.all(steps)
    assert (first["step_applied"], second["step_applied"]) == (1, 0)
    assert isinstance(ghost, NotFound)


def fail_passes_with(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real_pack = trainer_module.pack

    def faulty_pack(pieces: list[object], device: torch.device) -> object:
        rows = real_pack(pieces, device)
        if length in rows.lengths:
            raise RuntimeError("out of memory")
        return rows

    monkeypatch.setattr(trainer_module, "pack", faulty_pack)


def test_a_bad_sample_fails_alone(driver: Driver) -> None:
    driver.create("broken")
    driver.engine._adapters["broken"].weights.flat_P.fill_(float("nan"))
    driver(PublishSnapshot(model_id="broken", snapshot_id="broken"))
    alone = driver.sample([5, 6, 7], seed=3, max_tokens=12)
    beside = driver.all(
        [
            sample_operation([9, 9], snapshot_id="broken", max_tokens=12),
            sample_operation([5, 6, 7], seed=3, max_tokens=12),
            sample_operation([9, 9], snapshot_id="nowhere"),
        ]
    )
    assert "not finite" in str(beside[0])
    assert beside[1].sequences[0].tokens == alone.sequences[0].tokens
    assert isinstance(beside[2], NotFound)
    # the cache blocks that held NaN are clean for the next borrower
    again = driver.sample([5, 6, 7], seed=3, max_tokens=12)
    assert again.sequences[0].tokens == alone.sequences[0].tokens


def test_a_snapshot_never_moves_and_sampling_it_disturbs_no_training(qwen_folder: Path) -> None:
    rng = np.random.default_rng(3)
    data = [random_datum(rng, 25) for _ in range(4)]
    sampled, quiet = Driver(qwen_folder), Driver(qwen_folder)
    for driver in (sampled, quiet):
        driver.create("m")
        driver.train(item("m", *data))
        driver.step("m", learning_rate=0.05)
    digest = sampled(PublishSnapshot(model_id="m", snapshot_id="s"))
    first = sampled.sample([3, 4], snapshot_id="s", seed=1, max_tokens=20, num_samples=3)
    for driver in (sampled, quiet):
        driver.train(item("m", *data))
        driver.step("m", learning_rate=0.05)
    second = sampled.sample([3, 4], snapshot_id="s", seed=1, max_tokens=20, num_samples=3)
    assert [s.tokens for s in first.sequences] == [s.tokens for s in second.sequences]
    assert [s.logprobs for s in first.sequences] == [s.logprobs for s in second.sequences]
    assert sampled(PublishSnapshot(model_id="m", snapshot_id="t")) != digest
    assert np.array_equal(sampled.weights("m"), quiet.weights("m"))


def test_training_and_sampling_take_turns(driver: Driver) -> None:
    """A long training batch does not hold up samples, nor the other way round."""
    rng = np.random.default_rng(4)
    driver.create("m")
    engine = driver.engine
    long_batch = item("m", *(random_datum(rng, 200) for _ in range(400)))
    engine.accept(0, long_batch)
    for ticket in range(1, 21):
        engine.accept(ticket, sample_operation([1, 2, 3], max_tokens=3, seed=ticket))
    finished = [ticket for _ in range(5000) for ticket, _ in engine.work()]
    assert finished.index(0) > finished.index(1)
    endless = [sample_operation([1, 2, 3], max_tokens=200, stop_token_ids=(), seed=s) for s in range(50)]
    for ticket, operation in enumerate(endless):
        engine.accept(ticket, operation)
    engine.accept(99, item("m", random_datum(rng, 5)))
    engine.accept(98, OptimStep(model_id="m", params=AdamParams()))
    finished = [ticket for _ in range(5000) for ticket, _ in engine.work()]
    assert finished[:2] == [99, 98]
    assert sorted(finished[2:]) == list(range(50))


def test_a_cancelled_sample_frees_its_place(driver: Driver) -> None:
    free = driver.engine._sampler._cache.blocks.num_free
    engine = driver.engine
    engine.accept(0, sample_operation([1, 2, 3], max_tokens=200))
    engine.work()
    engine.accept(1, CancelSample(ticket=0))
    outcomes = dict(engine.work() + engine.work())
    assert "cancelled" in str(outcomes[0])
    assert outcomes[1] is None
    assert not engine.has_work
    assert driver.engine._sampler._cache.blocks.num_free == free


def open_tenant(driver: Driver, name: str) -> None:
    rank, _, flags = TENANTS[name]
    driver.create(name, rank=rank, seed=rank, **flags)


def training_item(name: str, step: int) -> TrainItem:
    rng = np.random.default_rng([step, *name.encode()])
    _, loss_fn, _ = TENANTS[name]
    make = random_datum if loss_fn == "cross_entropy" else rl_datum
    return item(name, *(make(rng, int(n)) for n in rng.integers(1, 40, 6)), loss_fn=loss_fn)
