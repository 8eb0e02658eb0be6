"""What a model and a training step take of memory, and what happens when there is too little."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from tests.numerics.driver import Driver, item, random_datum
from tests.numerics.families import FAMILIES, save_tiny
from tinsmith.engine import base_model
from tinsmith.types.errors import InvalidInput


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "stablelm"])
def test_gradients_with_checkpointing_equal_those_without(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, FAMILIES[family].model_type, **FAMILIES[family].config)
    grads: dict[str, list[np.ndarray]] = {}
    calls: dict[str, int] = {}
    for choice in ("off", "on"):
        rng = np.random.default_rng(0)
        driver = Driver(folder, gradient_checkpointing=choice)
        for seed, model_id in enumerate(["a", "b"]):
            driver.create(model_id, rank=2 + seed, seed=seed)
            driver.randomize(model_id, seed=seed)
        attention = driver.engine._base._model.get_submodule("model.layers.0.self_attn")
        calls[choice] = _count_calls(
            attention,
            lambda driver=driver, rng=rng: driver.train(
                item("a", *(random_datum(rng, n) for n in (30, 4))), item("b", *(random_datum(rng, n) for n in (9, 17)))
            ),
        )
        grads[choice] = [driver.grads("a"), driver.grads("b")]
    for with_it, without in zip(grads["on"], grads["off"], strict=True):
        assert np.linalg.norm(with_it - without) <= 1e-6 * np.linalg.norm(without)
    assert calls == {"off": 1, "on": 2}


def test_auto_recomputes_only_passes_that_would_fill_memory(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "available_bytes", lambda device: 1024 * 2**20)
    driver = Driver(qwen_folder, kv_cache_bytes=512 * 2**20)
    kept = driver.engine._base._recomputation.most_tokens_kept
    assert kept is not None
    assert 20_000 < kept < 200_000
    driver.engine._base._recomputation.decide(kept)
    assert not driver.engine._base._recomputation.is_on
    driver.engine._base._recomputation.decide(kept + 1)
    assert driver.engine._base._recomputation.is_on


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "available_bytes", lambda device: 100 * 2**20)
    monkeypatch.setattr(base_model, "_load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(InvalidInput, match=r"needs about \d+ MiB on cpu in float32 .* only 100 MiB are free"):
        Driver(qwen_folder)


def test_the_engine_says_in_one_line_what_it_loaded_and_how(
    qwen_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="tinsmith"):
        Driver(qwen_folder, dtype="auto")
    (record,) = caplog.records
    assert record.name == "tinsmith.engine"
    said = record.getMessage()
    for part in ("test/model", "Qwen3ForCausalLM", "in float32 on cpu", "auto: 32 wide, too narrow", "threads", "free"):
        assert part in said


_STEP = """
import resource, sys
import numpy as np
import torch
from tests.numerics.driver import Driver, item
from pathlib import Path
from tinsmith.types import Datum, ModelInput

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def train(driver, num_sequences, length):
    vocab_size = driver.engine.card.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, (num_sequences, length + 1))
    data = [Datum(ModelInput.from_ints(t[:-1]), {"target_tokens": t[1:], "weights": np.ones(length)}) for t in tokens]
    driver.train(item("m", *data))

driver = Driver(Path(sys.argv[1]), max_micro_batch_tokens=4096)
driver.create("m", rank=2)
train(driver, 1, 16)
before = peak_mib()
train(driver, int(sys.argv[2]), int(sys.argv[3]))
print(peak_mib() - before)
"""


def test_peak_memory_of_a_step_does_not_grow_with_tokens_times_vocabulary(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen3", head_dim=16, hidden_size=64, vocab_size=150_000)
    assert _growth_mib(folder, num_sequences=2, length=512) < 150  # all logits at once would be 600 MiB


def test_peak_memory_of_a_step_does_not_grow_with_sequences_times_tokens(qwen_folder: Path) -> None:
    assert _growth_mib(qwen_folder, num_sequences=2048, length=2) < 150  # a full row for each would be 1 GiB


def _growth_mib(folder: Path, *, num_sequences: int, length: int) -> float:
    """How far one training step raises the process's peak, in a process of its own."""
    arguments = [str(folder), str(num_sequences), str(length)]
    ran = subprocess.run([sys.executable, "-c", _STEP, *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return float(ran.stdout)


def _count_calls(module: nn.Module, work: Callable[[], object]) -> int:
    calls: list[None] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(None))
    work()
    handle.remove()
    return len(calls)
