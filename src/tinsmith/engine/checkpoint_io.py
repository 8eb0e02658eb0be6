"""Checkpoint folders: PEFT's layout, optimizer state beside it, and a record with the hash of every file.

    adapter_model.safetensors   adapter_config.json   [optimizer.safetensors]   [gradients.safetensors]
    checkpoint.json

A folder appears under its name complete or not at all: everything is written to a temporary sibling, flushed to disk,
then renamed. `checkpoint.json` names every other file with size and SHA-256; loading verifies them first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tinsmith.engine.adapter import Adapter
from tinsmith.engine.lora import LoraLayout, LoraSite, LoraWeights
from tinsmith.engine.optimizer import AdamState
from tinsmith.engine.peft_layout import peft_config, peft_tensors, peft_views
from tinsmith.types.errors import CheckpointDamaged, InvalidInput, NotFound, StorageError
from tinsmith.types.operations import LoraSpec, SavedCheckpoint

FORMAT = 1
WEIGHTS, CONFIG, OPTIMIZER, GRADIENTS, RECORD = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "gradients.safetensors",
    "checkpoint.json",
)


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A checkpoint read back and verified."""

    spec: LoraSpec
    weights_P: Tensor
    optimizer: AdamState | None
    step: int
    gradients: StoredGradients | None = None


@dataclass(frozen=True, slots=True)
class StoredGradients:
    """What lies between two optimizer steps."""

    grads_P: Tensor
    num_pending: int
    corrupted: str | None


def save_checkpoint(
    adapter: Adapter,
    folder: Path,
    *,
    optimizer: bool,
    gradients: bool = False,
    base_model: str,
    other_modules: Sequence[str],
    record: Mapping[str, Any],
) -> SavedCheckpoint:
    """`other_modules` are the base model's module paths beside its adapter sites.

    Raises `StorageError` if the disk refuses or `folder` exists; nothing is left behind then."""
    digest = adapter.weights.digest()
    files = {WEIGHTS: _weights_file(adapter.weights), CONFIG: peft_config(adapter.layout, base_model, other_modules)}
    if optimizer:
        files[OPTIMIZER] = _optimizer_file(adapter)
    if gradients:
        files[GRADIENTS] = _gradients_file(adapter)
        record = {**record, "corrupted": adapter.corrupted}
    described = {
        "format": FORMAT,
        **record,
        "base_model": base_model,
        "lora": asdict(adapter.spec),
        "step": adapter.step,
        "digest": digest,
        "files": _hashed(files),
    }
    files[RECORD] = json.dumps(described, indent=2, sort_keys=True).encode()
    write_folder(folder, files)
    return SavedCheckpoint(size_bytes=sum(map(len, files.values())), digest=digest, step=adapter.step)


def save_weights(
    weights: LoraWeights,
    folder: Path,
    *,
    base_model: str,
    other_modules: Sequence[str],
    digest: str,
    record: Mapping[str, Any] | None = None,
) -> SavedCheckpoint:
    """Frozen weights alone, as `load_checkpoint` reads them. Raises `StorageError`; nothing is left behind then."""
    layout = weights.layout
    files = {WEIGHTS: _weights_file(weights), CONFIG: peft_config(layout, base_model, other_modules)}
    described = {
        "format": FORMAT,
        **(record or {}),
        "base_model": base_model,
        "lora": asdict(layout.spec),
        "step": 0,
        "digest": digest,
        "files": _hashed(files),
    }
    files[RECORD] = json.dumps(described, indent=2, sort_keys=True).encode()
    write_folder(folder, files)
    return SavedCheckpoint(size_bytes=sum(map(len, files.values())), digest=digest, step=0)


def _hashed(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    return {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}


def load_checkpoint(
    folder: Path, sites: tuple[LoraSite, ...], *, optimizer: bool, gradients: bool = False
) -> StoredAdapter:
    """Raises `NotFound`, `CheckpointDamaged`, or `InvalidInput` if it does not fit this base model or request."""
    record = _verified_record(folder)
    spec = LoraSpec(**record["lora"])
    layout = LoraLayout(sites, spec)
    if optimizer and OPTIMIZER not in record["files"]:
        raise InvalidInput(f"checkpoint {folder.name!r} holds no optimizer state; it was saved for sampling only")
    weights_P = torch.empty(layout.num_parameters, dtype=torch.float32)
    stored_weights = load_file(folder / WEIGHTS)
    views = dict(peft_views(layout, weights_P))
    if more := sorted(stored_weights.keys() - views.keys()):
        raise InvalidInput(f"checkpoint {folder.name!r} does not fit this base model, which has no place for {more[0]}")
    for name, view in views.items():
        _copy(stored_weights, name, view, folder)
    state = None
    if optimizer:
        stored = load_file(folder / OPTIMIZER)
        state = AdamState(torch.empty_like(weights_P), torch.empty_like(weights_P), int(stored["count"]))
        for kind, flat_P in (("exp_avg", state.exp_avg_P), ("exp_avg_sq", state.exp_avg_sq_P)):
            for name, view in layout.named_views(flat_P):
                _copy(stored, f"{kind}.{name}", view, folder)
    pending = _stored_gradients(folder, layout, record) if gradients else None
    return StoredAdapter(spec, weights_P, state, int(record["step"]), pending)


def _stored_gradients(folder: Path, layout: LoraLayout, record: Mapping[str, Any]) -> StoredGradients:
    if GRADIENTS not in record["files"]:
        raise InvalidInput(f"checkpoint {folder.name!r} holds no gradients; it is no snapshot of a live model")
    stored = load_file(folder / GRADIENTS)
    grads_P = torch.empty(layout.num_parameters, dtype=torch.float32)
    for name, view in layout.named_views(grads_P):
        _copy(stored, f"gradient.{name}", view, folder)
    return StoredGradients(grads_P, int(stored["num_pending"]), record.get("corrupted"))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files durably under `folder`, or none."""
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        if folder.exists():
            raise FileExistsError(f"{folder} exists")
        temporary.mkdir(parents=True)
        for name, data in files.items():
            _write_durably(temporary / name, data)
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"checkpoint {folder.name!r} could not be written: {error}") from error


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _weights_file(weights: LoraWeights) -> bytes:
    return save(dict(peft_tensors(weights.layout, weights.flat_P.cpu())), {"format": "pt"})


def _optimizer_file(adapter: Adapter) -> bytes:
    state = adapter.optimizer
    tensors = {"count": torch.tensor(state.count)}
    for kind, flat_P in (("exp_avg", state.exp_avg_P), ("exp_avg_sq", state.exp_avg_sq_P)):
        tensors |= {f"{kind}.{n}": m.contiguous() for n, m in adapter.layout.named_views(flat_P.cpu())}
    return save(tensors, {"format": "pt"})


def _gradients_file(adapter: Adapter) -> bytes:
    named = adapter.layout.named_views(adapter.grads_P.cpu())
    tensors = {f"gradient.{name}": matrix.contiguous() for name, matrix in named}
    return save(tensors | {"num_pending": torch.tensor(adapter.num_pending)}, {"format": "pt"})


def _verified_record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD).is_file():
        raise NotFound(f"there is no checkpoint {folder.name!r} (no {RECORD} in its folder)")
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        if record["format"] > FORMAT:
            raise InvalidInput(f"checkpoint {folder.name!r} has format {record['format']}; this version reads {FORMAT}")
        for name, entry in record["files"].items():
            _verify(folder, name, entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{RECORD} of checkpoint {folder.name!r} cannot be read: {error!r}") from error
    return record


def _verify(folder: Path, name: str, sha256: str) -> None:
    where = f"{name} of checkpoint {folder.name!r}"
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointDamaged(f"{where} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointDamaged(f"{where} is damaged: it does not match its hash")


def _copy(stored: Mapping[str, Tensor], name: str, view: Tensor, folder: Path) -> None:
    found = stored.get(name)
    if found is None or found.numel() != view.numel():
        shape = None if found is None else tuple(found.shape)
        raise InvalidInput(
            f"checkpoint {folder.name!r} does not fit this base model: {name} has shape {shape}, "
            f"not {tuple(view.shape)}"
        )
    view.copy_(found.view(view.shape))
