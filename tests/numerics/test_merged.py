"""Full weights with an adapter merged into them, loaded by transformers: the logits of base and adapter together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.numerics.driver import Driver, item, plain_model, random_datum
from tests.numerics.families import FAMILIES, save_tiny
from tests.numerics.test_forward import reference_logprobs
from tinsmith.engine import merged_export
from tinsmith.engine.checkpoint_io import load_checkpoint
from tinsmith.engine.lora import LoraLayout
from tinsmith.engine.merged_export import Merge, export_merged
from tinsmith.types.errors import InvalidInput, StorageError, Unsupported
from tinsmith.types.operations import MergeAdapter, SaveAdapter

TIED = {"tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, untied": ("llama3", {}),
    "dense, tied": ("qwen3", TIED),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", TIED),
    "experts one by one": ("qwen3_moe", {}),
    "experts one by one, tied": ("qwen3_moe", TIED),
    "experts with shared ones": ("qwen2_moe", {}),
    "experts fused": ("gpt_oss", {}),
    "experts renamed": ("mixtral", {}),
}


def tuned(base: Path, folder: Path, **flags: bool) -> Driver:
    """An engine with model `m`, trained and saved to `folder`."""
    driver = Driver(base)
    driver.create("m", rank=3, **flags)
    driver.randomize("m")
    driver(SaveAdapter(model_id="m", folder=str(folder), optimizer=False))
    return driver


def family(tmp_path: Path, name: str, config: dict[str, Any]) -> Path:
    known = FAMILIES.get(name)
    if known is None:
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        return save_tiny(tmp_path / "base", name, **experts, **config)
    return save_tiny(tmp_path / "base", known.model_type, **(known.config | config))


@pytest.mark.parametrize(("name", "config"), MODELS.values(), ids=MODELS)
def test_merged_weights_give_the_logits_of_base_and_adapter(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    base = family(tmp_path, name, config)
    driver = tuned(base, tmp_path / "adapter")
    driver(MergeAdapter(source=str(tmp_path / "adapter"), folder=str(tmp_path / "merged"), record={"name": "x"}))
    datum = random_datum(np.random.default_rng(0), 30)
    (output,) = driver.train(item("m", datum, forward_only=True))
    merged = reference_logprobs(plain_model(tmp_path / "merged"), datum)
    assert np.abs(output.logprobs[0].to_numpy() - merged).max() <= 1e-4
    assert np.abs(merged - reference_logprobs(plain_model(base), datum)).max() > 0.01
    assert names_in(tmp_path / "merged") - {"lm_head.weight"} == names_in(base) - {"lm_head.weight"}


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def test_a_tied_unembedding_stays_tied_unless_the_adapter_changes_it(qwen_folder: Path, tmp_path: Path) -> None:
    for flag in (False, True):
        driver = tuned(qwen_folder, tmp_path / f"adapter-{flag}", train_unembed=flag)
        driver(MergeAdapter(source=str(tmp_path / f"adapter-{flag}"), folder=str(tmp_path / f"merged-{flag}")))
        config = json.loads((tmp_path / f"merged-{flag}" / "config.json").read_text())
        assert config["tie_word_embeddings"] is not flag
        assert ("lm_head.weight" in names_in(tmp_path / f"merged-{flag}")) is flag
        datum = random_datum(np.random.default_rng(0), 20)
        (output,) = driver.train(item("m", datum, forward_only=True))
        merged = reference_logprobs(plain_model(tmp_path / f"merged-{flag}"), datum)
        assert np.abs(output.logprobs[0].to_numpy() - merged).max() <= 1e-4


def merge_of(base: Path, adapter: Path) -> Merge:
    stored = load_checkpoint(adapter, Driver(base).engine._base.sites, optimizer=False)
    return Merge(LoraLayout(Driver(base).engine._base.sites, stored.spec), stored.weights_P, "d")


def test_shards_are_bounded_and_hold_what_one_file_would(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(llama_folder, tmp_path / "adapter")
    merge = merge_of(llama_folder, tmp_path / "adapter")
    export_merged(str(llama_folder), merge, tmp_path / "one")
    largest: list[int] = []
    write = merged_export.save_file

    def noted(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        largest.append(sum(tensor.nbytes for tensor in tensors.values()))
        write(tensors, *args, **kwargs)

    monkeypatch.setattr(merged_export, "save_file", noted)
    saved = export_merged(str(llama_folder), merge, tmp_path / "many", shard_bytes=30_000)
    assert len(largest) > 3
    assert max(largest) <= 30_000
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / shard)[name], whole[name])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert saved.size_bytes == sum(path.stat().st_size for path in (tmp_path / "many").iterdir())
    plain_model(tmp_path / "many")


def test_weights_are_merged_in_float32_and_cast_once(llama_folder: Path, tmp_path: Path) -> None:
    tuned(llama_folder, tmp_path / "adapter")
    merge = merge_of(llama_folder, tmp_path / "adapter")
    export_merged(str(llama_folder), merge, tmp_path / "exact")
    export_merged(str(llama_folder), merge, tmp_path / "short", dtype="bfloat16")
    exact, short = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "short"))
    assert all(torch.equal(short[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert json.loads((tmp_path / "short" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(InvalidInput, match="dtype 'int8' is unknown; known are float32, bfloat16, float16"):
        export_merged(str(llama_folder), merge, tmp_path / "no", dtype="int8")


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(llama_folder: Path, tmp_path: Path) -> None:
    tuned(llama_folder, tmp_path / "adapter")
    merge = merge_of(llama_folder, tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((llama_folder / "config.json").read_text())
    weights = load_file(llama_folder / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="no weights in safetensors"):
        export_merged(str(base), merge, tmp_path / "merged")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, base / "model.safetensors")
    with pytest.raises(Unsupported, match=f"changes {gone}, which the base model's files do not hold"):
        export_merged(str(base), merge, tmp_path / "merged")
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(Unsupported, match="are quantized"):
        export_merged(str(base), merge, tmp_path / "merged")
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="exists"):
        export_merged(str(llama_folder), merge, tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "taken"]
