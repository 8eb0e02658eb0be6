"""Saved and loaded training goes on as if it had never stopped; a damaged or half-written folder is never used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.numerics.driver import Driver, item, random_datum
from tests.numerics.families import FAMILIES, save_tiny
from tinsmith.engine import checkpoint_io
from tinsmith.types.errors import AdapterCorrupted, CheckpointDamaged, InvalidInput, NotFound, StorageError
from tinsmith.types.operations import LoadAdapter, LoadSnapshot, LoraSpec, PublishSnapshot, SaveAdapter


def test_resumed_training_equals_never_stopped_bitwise(qwen_folder: Path, tmp_path: Path) -> None:
    straight = Driver(qwen_folder)
    straight.create("m", rank=3)
    train(straight, "m", range(6))
    for stop in range(1, 6):
        first = Driver(qwen_folder)
        first.create("m", rank=3)
        train(first, "m", range(stop))
        first(SaveAdapter(model_id="m", folder=str(tmp_path / f"at-{stop}"), optimizer=True))
        second = Driver(qwen_folder)
        spec = second(LoadAdapter(model_id="again", folder=str(tmp_path / f"at-{stop}"), optimizer=True))
        assert spec == LoraSpec(rank=3, seed=1)
        train(second, "again", range(stop, 6))
        assert np.array_equal(second.weights("again"), straight.weights("m"))


def test_loading_without_optimizer_starts_its_moments_at_zero(driver: Driver, tmp_path: Path) -> None:
    driver.create("m")
    train(driver, "m", range(3))
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "c"), optimizer=True))
    driver(LoadAdapter(model_id="fresh", folder=str(tmp_path / "c"), optimizer=False))
    assert np.array_equal(driver.weights("fresh"), driver.weights("m"))
    assert float(driver.engine._adapters["fresh"].optimizer.exp_avg_P.abs().max()) == 0
    assert driver.engine._adapters["fresh"].step == 3


def test_a_saved_snapshot_samples_like_the_live_one(driver: Driver, tmp_path: Path) -> None:
    driver.create("m")
    train(driver, "m", range(3))
    saved = driver(SaveAdapter(model_id="m", folder=str(tmp_path / "c"), optimizer=False))
    live = driver(PublishSnapshot(model_id="m", snapshot_id="live"))
    assert driver(LoadSnapshot(snapshot_id="stored", folder=str(tmp_path / "c"))) == live == saved.digest
    tokens = [
        driver.sample([1, 2], snapshot_id=snapshot, seed=4, max_tokens=20).sequences[0].tokens
        for snapshot in ("live", "stored")
    ]
    assert tokens[0] == tokens[1]


def test_the_record_names_shape_step_digest_and_files(driver: Driver, tmp_path: Path) -> None:
    driver.create("m", rank=3)
    train(driver, "m", range(2))
    saved = driver(SaveAdapter(model_id="m", folder=str(tmp_path / "c"), optimizer=True, record={"name": "c"}))
    record = json.loads((tmp_path / "c" / "checkpoint.json").read_text())
    assert (record["name"], record["step"], record["digest"]) == ("c", 2, saved.digest)
    assert record["lora"]["rank"] == 3
    assert set(record["files"]) == {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"}
    assert saved.size_bytes == sum(f.stat().st_size for f in (tmp_path / "c").iterdir())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_refused_by_name(driver: Driver, tmp_path: Path, name: str, damage: str) -> None:
    driver.create("m")
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "c"), optimizer=True))
    path = tmp_path / "c" / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=name):
        driver(LoadAdapter(model_id="x", folder=str(tmp_path / "c"), optimizer=True))


def test_what_cannot_be_loaded_is_said(driver: Driver, llama_folder: Path, tmp_path: Path) -> None:
    driver.create("m")
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "sampler"), optimizer=False))
    with pytest.raises(NotFound, match="nowhere"):
        driver(LoadAdapter(model_id="x", folder=str(tmp_path / "nowhere"), optimizer=False))
    with pytest.raises(InvalidInput, match="no optimizer state"):
        driver(LoadAdapter(model_id="x", folder=str(tmp_path / "sampler"), optimizer=True))
    with pytest.raises(InvalidInput, match="does not fit this base model"):
        Driver(llama_folder)(LoadAdapter(model_id="x", folder=str(tmp_path / "sampler"), optimizer=False))


def test_a_checkpoint_of_a_deeper_model_is_refused(driver: Driver, tmp_path: Path) -> None:
    """All that the shallower one looks for is there."""
    qwen3 = FAMILIES["qwen3"]
    deeper = Driver(save_tiny(tmp_path / "base", qwen3.model_type, **{**qwen3.config, "num_hidden_layers": 3}))
    deeper.create("m")
    deeper(SaveAdapter(model_id="m", folder=str(tmp_path / "deep"), optimizer=True))
    with pytest.raises(InvalidInput, match=r"does not fit this base model.* no place for .*layers\.2\."):
        driver(LoadAdapter(model_id="x", folder=str(tmp_path / "deep"), optimizer=False))


@pytest.mark.parametrize("failing_call", range(1, 8))
def test_a_full_disk_leaves_nothing_behind_and_harms_nobody(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    driver.create("m")
    calls = 0
    real_fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(28, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(checkpoint_io.os, "fsync", full)
    save = SaveAdapter(model_id="m", folder=str(tmp_path / "c"), optimizer=True)
    if failing_call <= 5:  # four files and their folder; the sixth flush comes after the rename
        with pytest.raises(StorageError, match="No space left"):
            driver(save)
        assert list(tmp_path.iterdir()) == []
        train(driver, "m", range(1))
        driver(save)
    elif failing_call == 7:
        driver(save)
    assert failing_call == 6 or driver(LoadAdapter(model_id="again", folder=str(tmp_path / "c"), optimizer=True))


def test_an_existing_folder_is_never_overwritten(driver: Driver, tmp_path: Path) -> None:
    driver.create("m")
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "c"), optimizer=True))
    before = (tmp_path / "c" / "checkpoint.json").read_bytes()
    with pytest.raises(StorageError, match="exists"):
        driver(SaveAdapter(model_id="m", folder=str(tmp_path / "c"), optimizer=True))
    assert (tmp_path / "c" / "checkpoint.json").read_bytes() == before


def test_the_seed_alone_fixes_the_initial_weights(driver: Driver) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        driver.create(name, seed=seed)
    assert np.array_equal(driver.weights("a"), driver.weights("b"))
    assert not np.array_equal(driver.weights("a"), driver.weights("c"))
    matrices = dict(driver.engine._adapters["a"].layout.named_views(driver.engine._adapters["a"].weights.flat_P))
    assert all(float(m.abs().max()) == 0 for name, m in matrices.items() if name.endswith("lora_B"))
    assert all(float(m.std()) > 0.05 for name, m in matrices.items() if name.endswith("lora_A"))


def train(driver: Driver, model_id: str, steps: range) -> None:
    for step in steps:
        rng = np.random.default_rng(step)
        driver.train(item(model_id, *(random_datum(rng, 12) for _ in range(3))))
        driver.step(model_id, learning_rate=0.01, weight_decay=0.01)


def test_a_snapshot_with_pending_gradients_goes_on_bitwise(qwen_folder: Path, tmp_path: Path) -> None:
    straight, first, second = Driver(qwen_folder), Driver(qwen_folder), Driver(qwen_folder)
    for driver in (straight, first):
        driver.create("m", rank=3)
        train(driver, "m", range(2))
        driver.train(item("m", random_datum(np.random.default_rng(90), 12)))
    folder = str(tmp_path / "c")
    saved = first(SaveAdapter(model_id="m", folder=folder, optimizer=True, gradients=True))
    train(first, "m", range(2, 3))  # what comes after is not in it
    assert saved.step == 2
    second(LoadAdapter(model_id="m", folder=folder, optimizer=True, gradients=True))
    for driver in (straight, second):
        train(driver, "m", range(3, 5))
    assert np.array_equal(second.weights("m"), straight.weights("m"))
    first(SaveAdapter(model_id="m", folder=str(tmp_path / "d"), optimizer=True))
    with pytest.raises(InvalidInput, match="no gradients"):
        second(LoadAdapter(model_id="m", folder=str(tmp_path / "d"), optimizer=True, gradients=True))


def test_a_corrupted_model_still_refuses_training_after_a_restart_until_a_good_checkpoint_is_loaded(
    qwen_folder: Path, tmp_path: Path
) -> None:
    first, second = Driver(qwen_folder), Driver(qwen_folder)
    first.create("m", rank=3)
    train(first, "m", range(2))
    good, snapshot = str(tmp_path / "good"), str(tmp_path / "snapshot")
    first(SaveAdapter(model_id="m", folder=good, optimizer=True))
    first.train(item("m", random_datum(np.random.default_rng(0), 12)))
    first.engine._adapters["m"].grads_P[0] = float("nan")
    with pytest.raises(AdapterCorrupted, match="gradient norm of step 3 was nan"):
        first.step("m", learning_rate=0.01)
    first(SaveAdapter(model_id="m", folder=snapshot, optimizer=True, gradients=True))
    second(LoadAdapter(model_id="m", folder=snapshot, optimizer=True, gradients=True))
    for driver in (first, second):
        with pytest.raises(AdapterCorrupted, match="refuses further training: the gradient norm of step 3 was nan"):
            driver.step("m", learning_rate=0.01)
        driver(LoadAdapter(model_id="m", folder=good, optimizer=True))
        train(driver, "m", range(2, 4))
    assert np.array_equal(first.weights("m"), second.weights("m"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_record_is_refused_by_name(driver: Driver, tmp_path: Path, damage: str) -> None:
    driver.create("m")
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "c"), optimizer=True))
    path = tmp_path / "c" / "checkpoint.json"
    data = bytearray(path.read_bytes())
    at = data.index(b'"sha256": "') + 12
    data[at] = ord("f") if data[at] != ord("f") else ord("e")
    path.write_bytes({"truncated": data[: len(data) // 2], "flipped": data, "emptied": b""}[damage])
    with pytest.raises(
        CheckpointDamaged, match="checkpoint.json" if damage != "flipped" else "does not match its hash"
    ):
        driver(LoadAdapter(model_id="x", folder=str(tmp_path / "c"), optimizer=True))
