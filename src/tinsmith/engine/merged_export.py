"""Full weights: the base model with an adapter merged into it, as transformers loads them.

Weights are read from the base model's own files, one tensor at a time, merged in float32, cast and written in shards:
the most that is in memory is one shard and one tensor. Names stay those of the base model's files, so experts that lie
there one by one are merged one by one; what each name becomes in memory is transformers' own conversion mapping.
"""

# E expert, I in features, O out features, R rank

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.utils import cached_file

from tinsmith.engine.base_model import auto_class
from tinsmith.engine.checkpoint_io import FORMAT, RECORD, sync_file, sync_folder
from tinsmith.engine.lora import LoraLayout, LoraSite, MatrixPair
from tinsmith.types.errors import InvalidInput, StorageError, Unsupported
from tinsmith.types.operations import SavedCheckpoint

SHARD_BYTES = 2 * 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BESIDE = re.compile(
    r"(generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|preprocessor_config|processor_config"
    r"|video_preprocessor_config|chat_template)\.(json|jinja|model|txt)|merges\.txt|.*\.tiktoken|spiece\.model"
)
"""Files of a base model that belong to it however its weights change."""


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """An adapter, fp32 on the CPU."""

    layout: LoraLayout
    weights_P: Tensor
    digest: str

    def pairs(self) -> Iterator[tuple[LoraSite, MatrixPair]]:
        for site, pair in zip(self.layout.sites, self.layout.views(self.weights_P), strict=True):
            if pair is not None:
                yield site, pair


def export_merged(
    source: str,
    merge: Merge,
    folder: Path,
    *,
    dtype: str | None = None,
    record: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> SavedCheckpoint:
    """Write `folder`, whole or not at all. `dtype` is that of every weight; `None` leaves each as its file has it.

    `source` is the base model's folder or hub id. Raises `InvalidInput`, `Unsupported` if its weights lie in files in
    a way that cannot be merged here, `StorageError` if the disk refuses.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"dtype {dtype!r} is unknown; known are {', '.join(DTYPES)}")
    base = BaseFiles(source)
    merging = _Merging(base, merge, None if dtype is None else DTYPES[dtype])
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        if folder.exists():
            raise FileExistsError(f"{folder} exists")
        temporary.mkdir(parents=True)
        _write_shards(temporary, merging.tensors(), shard_bytes)
        merging.check_complete()
        _write_beside(temporary, base, merging, dtype)
        saved = _write_record(temporary, merge, record or {})
        temporary.rename(folder)
        sync_folder(folder.parent)
        return saved
    except (OSError, SafetensorError) as error:
        raise StorageError(f"merged weights {folder.name!r} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class BaseFiles:
    """The files of a base model, and what their tensors become in memory."""

    def __init__(self, source: str) -> None:
        self.folder = _folder_of(source)
        self.config = json.loads((self.folder / "config.json").read_bytes())
        if self.config.get("quantization_config"):
            raise Unsupported(f"the weights of {source!r} are quantized; an adapter cannot be merged into them exactly")
        self._auto_config = AutoConfig.from_pretrained(self.folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """Without any weights."""
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(self._auto_config).from_config(self._auto_config)
        return model

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @cached_property
    def tied(self) -> dict[str, str]:
        """Names of parameters that are others, in memory."""
        return dict(self.model.all_tied_weights_keys or {})

    def size_of(self, parameter: str) -> int:
        return self._parameters[parameter].numel()

    @cached_property
    def _transforms(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        transforms = get_model_conversion_mapping(self.model)
        return (
            [t for t in transforms if isinstance(t, WeightRenaming)],
            [t for t in transforms if isinstance(t, WeightConverter)],
        )

    def place(self, key: str) -> Place:
        """What a tensor of the files is in memory."""
        renamings, converters = self._transforms
        name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, self._parameters)
        if pattern is None:
            return Place(name)
        converter = next(c for c in converters if pattern in c.source_patterns)
        return Place(name, converter, converter.source_patterns.index(pattern), _number(key, pattern))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, one at a time, in the order of the files."""
        index = self.folder / _INDEX
        names = [_SINGLE]
        if index.exists():
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for name in names:
            with safe_open(self.folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    yield key, file.get_tensor(key)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a file belongs in memory: a parameter, or a part of one."""

    parameter: str
    converter: WeightConverter | None = None
    part: int = 0
    expert: int | None = None


@dataclass(eq=False)
class _Merging:
    base: BaseFiles
    merge: Merge
    dtype: torch.dtype | None
    _merged: dict[str, int] = field(default_factory=dict)
    """Elements by parameter."""

    @cached_property
    def _by_parameter(self) -> dict[str, tuple[LoraSite, MatrixPair]]:
        return {_parameter_of(site): (site, pair) for site, pair in self.merge.pairs()}

    @cached_property
    def untied(self) -> dict[str, str]:
        """Parameters that the adapter changes although they are others in the base model: by those others."""
        return {other: name for name, other in self.base.tied.items() if name in self._by_parameter}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and weights as they are to be written."""
        for key, tensor in self.base.tensors():
            place = self.base.place(key)
            if place.parameter in self.untied.values():
                continue  # a copy of what it is tied to, which is written below
            if (name := self.untied.get(place.parameter)) is not None:
                yield name, self._cast(self._add(tensor, Place(name), name), tensor.dtype)
            is_changed = place.parameter in self._by_parameter
            yield key, self._cast(self._add(tensor, place, key) if is_changed else tensor, tensor.dtype)

    def _cast(self, tensor: Tensor, own: torch.dtype) -> Tensor:
        return tensor.to(self.dtype or own).contiguous() if tensor.is_floating_point() else tensor

    def _add(self, tensor: Tensor, place: Place, key: str) -> Tensor:
        site, pair = self._by_parameter[place.parameter]
        self._merged[place.parameter] = self._merged.get(place.parameter, 0) + tensor.numel()
        merged = tensor.float()
        if merged is tensor:
            merged = tensor.clone()
        if site.num_experts is None:
            if place.converter is not None:
                raise _cannot_merge(key, place)
            return merged.add_(_delta(self.merge.layout, pair))
        if place.converter is not None:
            return merged.add_(self._delta_of_part(place, pair.of_expert(place.expert), key))
        is_transposed = self._is_transposed(site)
        for expert in range(site.num_experts):
            delta_OI = _delta(self.merge.layout, pair.of_expert(expert))
            merged[expert].add_(delta_OI.T if is_transposed else delta_OI)
        return merged

    def _delta_of_part(self, place: Place, pair: MatrixPair, key: str) -> Tensor:
        """Of one expert's matrix, that lies in a file of its own."""
        assert place.converter is not None
        operations = place.converter.operations
        is_stacked = place.expert is not None and isinstance(operations[0], MergeModulelist)
        is_joined = len(operations) == 2 and isinstance(operations[1], Concatenate) and operations[1].dim == 1
        if not is_stacked or operations[0].dim != 0 or not (len(operations) == 1 or is_joined):
            raise _cannot_merge(key, place)
        return _delta(self.merge.layout, pair).chunk(len(place.converter.source_patterns))[place.part]

    def _is_transposed(self, site: LoraSite) -> bool:
        module = self.base.model.get_submodule(site.name.rpartition(".")[0])
        return bool(getattr(module, "is_transposed", False))

    def check_complete(self) -> None:
        """Raises `Unsupported` if part of the adapter found no weights to be merged into."""
        for parameter in self._by_parameter:
            if self._merged.get(parameter, 0) != self.base.size_of(parameter):
                raise Unsupported(
                    f"the adapter changes {parameter}, which the base model's files do not hold as a whole; it cannot "
                    "be merged"
                )


def _folder_of(source: str) -> Path:
    """Where the files are on this machine. Raises `Unsupported` if there are no safetensors among them."""
    for name in (_INDEX, _SINGLE):
        try:
            found = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise Unsupported(f"the files of base model {source!r} cannot be found: {error}") from error
        if found is not None:
            return Path(found).parent
    raise Unsupported(f"base model {source!r} has no weights in safetensors files; merge needs them")


def _number(key: str, pattern: str) -> int | None:
    """What stands for the `*` of a pattern."""
    before, star, after = pattern.partition("*")
    if not star:
        return None
    found = re.search(f"{before}(\\d+){after}", key)
    return None if found is None else int(found[1])


def _parameter_of(site: LoraSite) -> str:
    return site.name if site.num_experts is not None else f"{site.name}.weight"


def _delta(layout: LoraLayout, pair: MatrixPair) -> Tensor:
    """`[O, I]`."""
    return (pair.b_RO.T @ pair.a_RI).mul_(layout.scale)


def _cannot_merge(key: str, place: Place) -> Unsupported:
    operations = [] if place.converter is None else [type(o).__name__ for o in place.converter.operations]
    return Unsupported(f"{key} becomes {place.parameter} by {', '.join(operations)}: merging into it is not supported")


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Shards of at most `shard_bytes`, but for a single larger tensor, and their index if there are several."""
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        path = folder / f"shard-{len(shards)}"
        save_file(batch, path, metadata={"format": "pt"})
        sync_file(path)
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and size + tensor.nbytes > shard_bytes:
            write()
            size = 0
        batch[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_beside(folder: Path, base: BaseFiles, merging: _Merging, dtype: str | None) -> None:
    config = dict(base.config)
    if merging.untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    _write_json(folder / "config.json", config)
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and _BESIDE.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
            sync_file(folder / path.name)


def _write_record(folder: Path, merge: Merge, record: Mapping[str, Any]) -> SavedCheckpoint:
    files = {path.name: _described(path) for path in sorted(folder.iterdir())}
    described = {
        "format": FORMAT,
        **record,
        "merged": True,
        "lora": asdict(merge.layout.spec),
        "digest": merge.digest,
        "files": files,
    }
    _write_json(folder / RECORD, described)
    sync_folder(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return SavedCheckpoint(size_bytes=size, digest=merge.digest, step=int(record.get("step", 0)))


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")
    sync_file(path)
