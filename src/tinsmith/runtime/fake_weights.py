"""What the fake engine has in place of an adapter's weights, and the checkpoints that it writes and reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tinsmith.types.errors import CheckpointDamaged, StorageError
from tinsmith.types.operations import LoraSpec, SavedCheckpoint

STEP_FACTOR = 0.8
"""Log-probabilities shrink towards 0 by this factor with every optimizer step."""


@dataclass(frozen=True, slots=True)
class FakeWeights:
    """What a real adapter's weights would be a function of here."""

    lora: LoraSpec
    step: int = 0
    num_effects: int = 0
    """Optimizer steps that had gradients and a learning rate."""
    corrupted: bool = False

    @property
    def factor(self) -> float:
        return STEP_FACTOR**self.num_effects

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([asdict(self.lora), self.num_effects]).encode()).hexdigest()


def write_folder(folder: Path, weights: FakeWeights, *, optimizer: bool, record: Any) -> SavedCheckpoint:
    """Raises `StorageError` if the folder exists or cannot be written."""
    partial = folder.with_name(f".{folder.name}.partial")
    if folder.exists():
        raise StorageError(f"{folder} exists already")
    rank = weights.lora.rank
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        arrays = {"lora_A": np.full((rank, 4), weights.lora.seed % 97, dtype=np.float32)}
        arrays["lora_B"] = np.full((4, rank), weights.num_effects, dtype=np.float32)
        save_file(arrays, partial / "adapter_model.safetensors")
        if optimizer:
            save_file({"step": np.asarray([weights.step])}, partial / "optimizer.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": weights.lora.alpha}
        (partial / "adapter_config.json").write_text(json.dumps(config))
        state = {
            **record,
            "lora": asdict(weights.lora),
            "step": weights.step,
            "num_effects": weights.num_effects,
            "digest": weights.digest,
            "files": {path.name: _file_hash(path) for path in sorted(partial.iterdir())},
        }
        (partial / "checkpoint.json").write_text(json.dumps(state, indent=1, default=str))
        size = sum(path.stat().st_size for path in partial.iterdir())
        os.rename(partial, folder)
    except OSError as error:
        raise StorageError(f"cannot write checkpoint {folder}: {error}") from error
    return SavedCheckpoint(size_bytes=size, digest=weights.digest, step=weights.step)


def read_folder(folder: Path) -> FakeWeights:
    try:
        state = json.loads((folder / "checkpoint.json").read_text())
        for name, recorded in state["files"].items():
            if _file_hash(folder / name) != recorded:
                raise CheckpointDamaged(f"{folder / name} does not match its recorded hash")
        load_file(folder / "adapter_model.safetensors")
    except OSError as error:
        raise StorageError(f"cannot read checkpoint {folder}: {error}") from error
    except (ValueError, KeyError) as error:
        raise CheckpointDamaged(f"{folder / 'checkpoint.json'} is not readable: {error!r}") from error
    return FakeWeights(LoraSpec(**state["lora"]), state["step"], state["num_effects"])


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
