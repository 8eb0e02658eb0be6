"""Every architecture against its own transformers code, PEFT and `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.numerics.driver import VOCAB, Driver, item, plain_model, random_datum, sample_operation
from tests.numerics.families import FAMILIES, save_tiny
from tests.numerics.test_forward import reference_logprobs
from tests.numerics.test_peft import load_peft, reference_loss, relative, trainable
from tinsmith.engine.checkpoint_io import save_checkpoint
from tinsmith.engine.peft_layout import peft_tensors
from tinsmith.types.errors import Unsupported
from tinsmith.types.operations import SaveAdapter

FolderOf = Callable[[str], Path]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            family = FAMILIES[name]
            folders[name] = save_tiny(tmp_path_factory.mktemp(name), family.model_type, **family.config)
        return folders[name]

    return folder


@every_family
def test_log_probs_gradients_and_saved_adapter_equal_transformers_and_peft(
    family: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    folder = folder_of(family)
    data = [random_datum(rng, int(n)) for n in [3, 17, 17, 40, 1]]
    driver = Driver(folder)
    driver.create("m", rank=3)
    (fresh,) = driver.train(item("m", *data, forward_only=True))
    plain = plain_model(folder)
    for datum, logprobs in zip(data, fresh.logprobs, strict=True):
        assert np.abs(logprobs.to_numpy() - reference_logprobs(plain, datum)).max() <= 1e-4

    driver.randomize("m")
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "saved"), optimizer=False))
    peft = load_peft(folder, tmp_path / "saved")
    (tuned,) = driver.train(item("m", *data))
    for datum, logprobs in zip(data, tuned.logprobs, strict=True):
        assert np.abs(logprobs.to_numpy() - reference_logprobs(peft, datum)).max() <= 1e-4
    assert np.abs(tuned.logprobs[3].to_numpy() - fresh.logprobs[3].to_numpy()).max() > 0.01

    reference_loss(peft, data).backward()
    ours = dict(peft_tensors(driver.engine._adapters["m"].layout, torch.from_numpy(driver.grads("m"))))
    theirs = {name.replace(".default", ""): parameter for name, parameter in trainable(peft).items()}
    assert set(theirs) == set(ours)
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        assert relative(ours[name], parameter.grad) <= 1e-4, name


@every_family
def test_greedy_samples_equal_generate(family: str, folder_of: FolderOf) -> None:
    rng = np.random.default_rng(1)
    folder = folder_of(family)
    prompts = [rng.integers(3, VOCAB, int(n)).tolist() for n in [5, 20]]
    plain, driver = plain_model(folder), Driver(folder)
    samples = driver.all([sample_operation(prompt, temperature=0.0, max_tokens=24) for prompt in prompts])
    for prompt, sample in zip(prompts, samples, strict=True):
        expected = plain.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert sample.sequences[0].tokens == expected[0, len(prompt) :].tolist()


@every_family
def test_train_mlp_adapts_dense_layers_and_routed_experts(family: str, folder_of: FolderOf) -> None:
    sites = Driver(folder_of(family)).engine._base.sites
    assert sum(site.group == "mlp" for site in sites) == FAMILIES[family].mlp_sites


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("gpt2", {"intermediate_size": None, "num_key_value_heads": None}, "Conv1D"),
        ("falcon", {"num_key_value_heads": None}, "does not reproduce"),
        ("mamba", {"num_attention_heads": None}, "cannot be told"),
        (
            "qwen3_next",
            {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention"] * 2},
            "layers of kind linear_attention",
        ),
    ],
)
def test_an_architecture_that_we_would_compute_wrongly_is_refused_at_load(
    model_type: str, config: dict[str, object], reason: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, model_type, **config)
    with pytest.raises(Unsupported, match=reason):
        Driver(folder)


def test_with_longrope_a_sequence_depends_on_no_longer_one_in_its_pass(tmp_path: Path) -> None:
    """A sequence beyond the original length would take all of the pass to its other angles."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 40, **factors}
    folder = save_tiny(tmp_path, "phi3", original_max_position_embeddings=40, rope_parameters=rope)
    driver = Driver(folder)
    driver.create("m")
    rng = np.random.default_rng(0)
    data = [random_datum(rng, length) for length in (driver.engine.card.max_context, 12, 30)]
    (together,) = driver.train(item("m", *data, forward_only=True))
    for datum, logprobs in zip(data, together.logprobs, strict=True):
        assert np.abs(logprobs.to_numpy() - reference_logprobs(plain_model(folder), datum)).max() <= 1e-4


def test_target_modules_are_full_paths_where_a_last_part_would_match_more(folder_of: FolderOf, tmp_path: Path) -> None:
    driver = Driver(folder_of("qwen3"))
    driver.create("m", train_mlp=False, train_unembed=False)
    targets = {}
    for others in ("model.layers.0.mlp.up_proj", "vision.layers.0.q_proj"):
        save_checkpoint(
            driver.engine._adapters["m"],
            tmp_path / others,
            optimizer=False,
            base_model="test/model",
            other_modules=(others,),
            record={},
        )
        targets[others] = json.loads((tmp_path / others / "adapter_config.json").read_text())["target_modules"]
    assert targets["model.layers.0.mlp.up_proj"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert len(targets["vision.layers.0.q_proj"]) == 8
    assert targets["vision.layers.0.q_proj"][0] == "model.layers.0.self_attn.k_proj"
