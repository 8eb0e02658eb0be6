"""Adapters that PEFT made, imported: the same log-probabilities as in PEFT; what cannot be the same is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.numerics.driver import Driver, item, plain_model, random_datum
from tests.numerics.families import FAMILIES, save_tiny
from tests.numerics.test_forward import reference_logprobs
from tests.numerics.test_peft import load_peft
from tinsmith.types.errors import InvalidInput, TinsmithError, Unsupported
from tinsmith.types.operations import ImportAdapter, ImportedAdapter, LoadAdapter, LoadSnapshot, SaveAdapter

OUTSIDE: dict[str, dict[str, Any]] = {
    "query and value": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 16},
    "all linear": {"target_modules": "all-linear", "r": 8, "lora_alpha": 8},
    "rank-stabilized": {"target_modules": "all-linear", "r": 5, "lora_alpha": 20, "use_rslora": True},
    "ranks and scales by module": {
        "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
        "r": 2,
        "lora_alpha": 7,
        "rank_pattern": {"o_proj": 6, "layers.1.mlp.up_proj": 4},
        "alpha_pattern": {"down_proj": 1.5},
    },
    "with the unembedding": {"target_modules": ["k_proj", "lm_head"], "r": 2, "lora_alpha": 32},
}


def outside_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """As PEFT saves it after training: B is not zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied unembeddings and patterns beside rsLoRA
        model = get_peft_model(plain_model(base), LoraConfig(task_type="CAUSAL_LM", **config))
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        model.save_pretrained(folder)
    return folder


def import_into(driver: Driver, source: Path, folder: Path) -> ImportedAdapter:
    imported: ImportedAdapter = driver(ImportAdapter(source=str(source), folder=str(folder), record={"name": "x"}))
    return imported


@pytest.mark.parametrize("config", OUTSIDE.values(), ids=OUTSIDE)
def test_an_imported_adapter_gives_the_log_probs_of_peft_and_trains_on(
    any_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    source = outside_adapter(any_folder, tmp_path / "outside", **config)
    driver, rng = Driver(any_folder), np.random.default_rng(0)
    data = [random_datum(rng, 30) for _ in range(3)]
    imported = import_into(driver, source, tmp_path / "ours")
    assert driver(LoadAdapter(model_id="m", folder=str(tmp_path / "ours"), optimizer=False)) == imported.lora
    peft, base = load_peft(any_folder, source), plain_model(any_folder)
    (output,) = driver.train(item("m", *data, forward_only=True))
    for datum, logprobs in zip(data, output.logprobs, strict=True):
        expected = reference_logprobs(peft, datum)
        assert np.abs(logprobs.to_numpy() - expected).max() <= 1e-4
        assert np.abs(expected - reference_logprobs(base, datum)).max() > 0.01
    losses = []
    for _ in range(5):
        (step,) = driver.train(item("m", *data))
        losses.append(step.loss_sum)
        driver.step("m", learning_rate=0.01)
    assert losses[-1] < losses[0]
    assert driver(LoadSnapshot(snapshot_id="s", folder=str(tmp_path / "ours"))) == imported.saved.digest


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("down_proj",), ("gate_up_proj",)])
def test_an_adapter_on_experts_gives_the_log_probs_of_peft(
    tmp_path: Path, family: str, parameters: tuple[str, ...]
) -> None:
    base = save_tiny(tmp_path / "base", FAMILIES[family].model_type, **FAMILIES[family].config)
    targets = [f"mlp.experts.{name}" for name in parameters]
    config = {"target_modules": ["q_proj"], "target_parameters": targets, "r": 2, "lora_alpha": 5}
    source = outside_adapter(base, tmp_path / "outside", **config)
    driver, datum = Driver(base), random_datum(np.random.default_rng(1), 25)
    import_into(driver, source, tmp_path / "ours")
    driver(LoadAdapter(model_id="m", folder=str(tmp_path / "ours"), optimizer=False))
    (output,) = driver.train(item("m", datum, forward_only=True))
    assert np.abs(output.logprobs[0].to_numpy() - reference_logprobs(load_peft(base, source), datum)).max() <= 1e-4


def test_our_own_exports_come_back_bitwise(driver: Driver, tmp_path: Path) -> None:
    driver.create("m", rank=3)
    driver.randomize("m")
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "saved"), optimizer=False))
    imported = import_into(driver, tmp_path / "saved", tmp_path / "ours")
    driver(LoadAdapter(model_id="again", folder=str(tmp_path / "ours"), optimizer=False))
    assert np.array_equal(driver.weights("again"), driver.weights("m"))
    assert (imported.lora.rank, imported.lora.alpha) == (3, 32.0)
    record = json.loads((tmp_path / "ours" / "checkpoint.json").read_text())
    assert (record["name"], record["digest"]) == ("x", imported.saved.digest)


def test_keys_of_other_layouts_are_read(driver: Driver, qwen_folder: Path, tmp_path: Path) -> None:
    source = outside_adapter(qwen_folder, tmp_path / "outside", **OUTSIDE["query and value"])
    expected = import_into(driver, source, tmp_path / "ours").saved.digest
    tensors = load_file(source / "adapter_model.safetensors")
    for number, rename in enumerate(
        [
            lambda key: key.replace(".weight", ".default.weight"),
            lambda key: key.removeprefix("base_model.model."),
        ]
    ):
        renamed = {rename(key): tensor.bfloat16().float() for key, tensor in tensors.items()}
        assert not set(renamed) & set(tensors)
        exact = {rename(key): tensor for key, tensor in tensors.items()}
        save_file(exact, source / "adapter_model.safetensors")
        assert import_into(driver, source, tmp_path / f"ours-{number}").saved.digest == expected


CONFIGS: dict[str, tuple[dict[str, Any], type[TinsmithError], str]] = {
    "dora": ({"use_dora": True}, Unsupported, "use_dora is True"),
    "biases": ({"bias": "all"}, Unsupported, "bias is 'all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, Unsupported, r"modules_to_save is \['lm_head'\]"),
    "changed base": ({"init_lora_weights": "pissa_niter_16"}, Unsupported, "changes the base weights"),
    "another type": ({"peft_type": "IA3"}, Unsupported, "peft_type is 'IA3'"),
    "no rank": ({"r": 0}, InvalidInput, "r must be a number above 0, not 0"),
    "other rank": ({"r": 4}, InvalidInput, "have rank 3; adapter_config.json says 4"),
    "bad pattern": ({"rank_pattern": {"(": 3}}, InvalidInput, "is no pattern"),
    "no alpha": ({"lora_alpha": None}, InvalidInput, "lora_alpha must be a number above 0, not None"),
}


@pytest.mark.parametrize(("change", "error", "message"), CONFIGS.values(), ids=CONFIGS)
def test_what_adapters_here_cannot_do_is_refused(
    driver: Driver,
    qwen_folder: Path,
    tmp_path: Path,
    change: dict[str, Any],
    error: type[TinsmithError],
    message: str,
) -> None:
    source = outside_adapter(qwen_folder, tmp_path / "outside", **OUTSIDE["query and value"])
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        import_into(driver, source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_matrices_that_have_no_place_or_do_not_fit_are_refused_by_name(
    driver: Driver, qwen_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    source = outside_adapter(qwen_folder, tmp_path / "outside", **OUTSIDE["query and value"])
    path = source / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    q_proj = "model.layers.0.self_attn.q_proj"
    cases: list[tuple[dict[str, torch.Tensor | None], type[TinsmithError], str]] = [
        ({key: None}, InvalidInput, f"lora_B of '{q_proj}' and not its other half"),
        ({key: tensors[key] * float("nan")}, InvalidInput, f"{key} .* not finite"),
        ({key: tensors[key][:, :-1].contiguous()}, InvalidInput, f"matrices of '{q_proj}' have shapes"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": tensors[key].clone()},
            Unsupported,
            "lora_embedding_A",
        ),
        (
            {
                k.replace("layers.0.self_attn.q_proj", "layers.9.mlp.experts.3.gate_proj"): v.clone()
                for k, v in tensors.items()
            },
            Unsupported,
            "layers.9.mlp.experts.3.gate_proj, where adapters of this base model cannot attach",
        ),
    ]
    copied = {"base_model.model.lm_head.base_layer.weight": plain_model(qwen_folder).lm_head.weight.data.clone()}
    save_file(tensors | copied, path)
    import_into(driver, source, tmp_path / "copied")
    cases.append(({name: tensor * 1.01 for name, tensor in copied.items()}, Unsupported, "'lm_head' that is not the"))
    for changes, error, message in cases:
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        save_file(changed, path)
        with pytest.raises(error, match=message):
            import_into(driver, source, tmp_path / "ours")
    save_file(tensors, path)
    with pytest.raises(InvalidInput, match="belongs to another one"):
        import_into(Driver(llama_folder), source, tmp_path / "ours")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidInput, match=r"adapter_model.safetensors cannot be read"):
        import_into(driver, source, tmp_path / "ours")
    path.rename(source / "adapter_model.bin")
    with pytest.raises(Unsupported, match="pickle"):
        import_into(driver, source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
