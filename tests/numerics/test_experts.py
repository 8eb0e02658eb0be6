"""Adapters on routed experts: many tenants in one pass, sampling, checkpoints, and what is left out."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.numerics.driver import VOCAB, Driver, item, random_datum, sample_operation
from tests.numerics.families import FAMILIES, save_tiny
from tests.numerics.test_forward import reference_logprobs
from tests.numerics.test_peft import load_peft
from tinsmith.engine.experts import grouped_product, product_per_expert
from tinsmith.types import Datum, ModelInput
from tinsmith.types.errors import InvalidInput
from tinsmith.types.operations import LoadAdapter, PublishSnapshot, SaveAdapter

RANKS = {"a": 3, "b": 5, "c": 3}


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "qwen2_moe"])
def mixture_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = FAMILIES[request.param]
    return save_tiny(tmp_path_factory.mktemp(request.param), family.model_type, **family.config)


def test_adapters_in_one_pass_get_what_each_gets_alone(mixture_folder: Path) -> None:
    rng = np.random.default_rng(0)
    data = {name: [random_datum(rng, int(n)) for n in (9, 30, 1)] for name in RANKS}
    together = tuned(mixture_folder)
    outputs = together.train(*(item(name, *data[name], forward_only=name == "c") for name in RANKS))
    for name, output in zip(RANKS, outputs, strict=True):
        alone = tuned(mixture_folder)
        (expected,) = alone.train(item(name, *data[name], forward_only=name == "c"))
        for ours, theirs in zip(output.logprobs, expected.logprobs, strict=True):
            assert np.abs(ours.to_numpy() - theirs.to_numpy()).max() <= 2e-5
        gradients, reference = together.grads(name), alone.grads(name)
        assert np.linalg.norm(gradients - reference) <= 1e-5 * np.linalg.norm(reference)
        assert (np.linalg.norm(reference) > 0) == (name != "c")


def test_samples_have_the_log_probs_that_training_computes(mixture_folder: Path) -> None:
    rng = np.random.default_rng(1)
    driver = tuned(mixture_folder)
    prompts = {name: rng.integers(3, VOCAB, int(n)).tolist() for name, n in zip(RANKS, (5, 40, 17), strict=True)}
    for name in RANKS:
        driver(PublishSnapshot(model_id=name, snapshot_id=name))
    samples = driver.all(
        [sample_operation(prompt, snapshot_id=name, num_samples=2, max_tokens=20) for name, prompt in prompts.items()]
    )
    for name, sample in zip(RANKS, samples, strict=True):
        for sequence in sample.sequences:
            tokens = [*prompts[name], *sequence.tokens]
            datum = Datum(
                ModelInput.from_ints(tokens[:-1]),
                {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)},
            )
            (output,) = driver.train(item(name, datum, forward_only=True))
            trained = output.logprobs[0].to_numpy()[len(prompts[name]) - 1 :]
            assert np.abs(trained - np.asarray(sequence.logprobs)).max() <= 1e-4


@pytest.mark.parametrize("flags", [{"train_attn": False, "train_unembed": False}, {"train_attn": False}])
def test_an_adapter_on_the_mlps_alone_is_loaded_by_peft(
    mixture_folder: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    rng = np.random.default_rng(2)
    data = [random_datum(rng, 20) for _ in range(3)]
    driver = Driver(mixture_folder)
    driver.create("m", rank=2, **flags)
    losses = []
    for _ in range(10):
        (step,) = driver.train(item("m", *data))
        losses.append(step.loss_sum)
        driver.step("m", learning_rate=0.003)
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "saved"), optimizer=False))
    peft = load_peft(mixture_folder, tmp_path / "saved")
    (output,) = driver.train(item("m", *data, forward_only=True))
    for datum, logprobs in zip(data, output.logprobs, strict=True):
        assert np.abs(logprobs.to_numpy() - reference_logprobs(peft, datum)).max() <= 1e-4
    assert output.loss_sum < 0.9 * losses[0]


def test_training_goes_on_bitwise_from_a_checkpoint(mixture_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    data = [random_datum(rng, 20) for _ in range(3)]
    straight = tuned(mixture_folder)
    for step in range(4):
        if step == 2:
            straight(SaveAdapter(model_id="a", folder=str(tmp_path / "middle"), optimizer=True))
        straight.train(item("a", *data))
        straight.step("a", learning_rate=0.01)
    resumed = Driver(mixture_folder)
    resumed(LoadAdapter(model_id="again", folder=str(tmp_path / "middle"), optimizer=True))
    for _ in range(2):
        resumed.train(item("again", *data))
        resumed.step("again", learning_rate=0.01)
    assert np.array_equal(resumed.weights("again"), straight.weights("a"))


def test_recomputed_layers_give_the_same_gradients(mixture_folder: Path) -> None:
    rng = np.random.default_rng(4)
    data = [random_datum(rng, 25) for _ in range(2)]
    gradients = []
    for setting in ("off", "on"):
        driver = tuned(mixture_folder, gradient_checkpointing=setting)
        driver.train(item("a", *data), item("b", *data))
        gradients.append((driver.grads("a"), driver.grads("b")))
    for kept, recomputed in zip(*gradients, strict=True):
        assert np.linalg.norm(kept - recomputed) <= 1e-6 * np.linalg.norm(kept)


def test_routers_have_no_adapter_and_experts_one_pair_each(mixture_folder: Path) -> None:
    driver = tuned(mixture_folder)
    layout = driver.engine._adapters["a"].layout
    assert not any(site.name.endswith((".gate", ".router", "shared_expert_gate")) for site in layout.sites)
    stacks = [matrix for name, matrix in layout.named_views(torch.zeros(layout.num_parameters)) if ".experts." in name]
    assert len(stacks) == 2 * 2 * 2
    assert all(matrix.shape[0] == 4 and 3 in matrix.shape for matrix in stacks)


def test_experts_that_are_kept_otherwise_stay_frozen_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path, "jetmoe", num_local_experts=4, num_experts_per_tok=2)
    with caplog.at_level(logging.WARNING, "tinsmith.engine"):
        driver = Driver(folder)
    assert "the MLPs of JetMoeForCausalLM stay frozen" in caplog.text
    with pytest.raises(InvalidInput, match=r"train_mlp is true, but .* has no MLP layers .* set train_mlp to false"):
        driver.create("m")
    with pytest.raises(InvalidInput, match="train_mlp"):
        driver.create("m", train_attn=False, train_unembed=False)
    driver.create("m", train_mlp=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_grouped_product_equals_one_product_per_expert(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_SI = torch.randn(40, 32, generator=generator).to(dtype)
    weight_EOI = torch.randn(5, 48, 32, generator=generator).to(dtype)
    bounds = [0, 7, 7, 30, 31, 40]
    for weight in (weight_EOI.transpose(1, 2), weight_EOI.transpose(1, 2).contiguous()):
        one, many = grouped_product(x_SI, weight, bounds), product_per_expert(x_SI, weight, bounds)
        assert (one.float() - many.float()).abs().max() <= 1e-2 * many.float().abs().max()


def tuned(folder: Path, **options: object) -> Driver:
    """An engine with adapters as after some training."""
    driver = Driver(folder, **options)
    for seed, (name, rank) in enumerate(RANKS.items()):
        driver.create(name, rank=rank)
        driver.randomize(name, seed=seed, scale=0.1)
    return driver
