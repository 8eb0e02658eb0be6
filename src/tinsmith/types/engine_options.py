"""Which base model an engine loads, and how it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from tinsmith.types.errors import InvalidInput

DtypeChoice: TypeAlias = Literal["auto", "float32", "bfloat16"]
DeviceChoice: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
CheckpointingChoice: TypeAlias = Literal["auto", "on", "off"]


class ModelSource(BaseModel):
    """A base model: the name users call it by, and where its files are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    location: str = Field(min_length=1)
    """A folder, or a Hugging Face hub id."""

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """`ID`, `FOLDER` or `NAME=FOLDER`; `tinsmith/tiny` is the model that ships.

        Raises `InvalidInput` if a part is empty, or if something that looks like a folder is none.
        """
        name, equals, location = text.partition("=")
        if not name or (equals and not location):
            raise InvalidInput(f"base model {text!r} is not of the form ID, FOLDER or NAME=FOLDER")
        if equals:
            return cls(name=name, location=_folder(location))
        if text == TINY:
            return cls(name=TINY, location=TINY)
        if Path(text).expanduser().is_dir() or text.startswith((".", "/", "~")) or os.sep * 2 in text:
            return cls(name=text.rstrip("/"), location=_folder(text))
        return cls(name=text, location=text)

    @property
    def folder(self) -> Path | None:
        """The local folder, or `None` for a hub id."""
        if self.location == TINY:
            from tinsmith.models import tiny_folder

            return tiny_folder()
        path = Path(self.location)
        return path if path.is_absolute() else None

    @property
    def load_from(self) -> str:
        """What `transformers` takes to load the model or its tokenizer."""
        return str(self.folder or self.location)


TINY = "tinsmith/tiny"


def _folder(text: str) -> str:
    path = Path(text).expanduser().resolve()
    if not (path / "config.json").is_file():
        raise InvalidInput(f"base model folder {text!r} has no config.json")
    return str(path)


LEAST_ADAPTER_BYTES = 2**16


def parse_size(name: str, text: str) -> int:
    """Bytes from `8GiB`, `512MiB`, `64kB` or a plain number. Raises `InvalidInput` naming `name`."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise InvalidInput(f"{name} is {text!r}; expected a size as 512MiB or 8GiB") from error
    if size < LEAST_ADAPTER_BYTES:
        raise InvalidInput(f"{name} is {text!r}, {size} bytes; the least is {LEAST_ADAPTER_BYTES}")
    return size


class EngineOptions(BaseModel):
    """How an engine runs. Every limit is per engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: DtypeChoice = "auto"
    """Of base weights and activations; `auto` measures what is fast here. Adapters and optimizer are always float32."""
    device: DeviceChoice = "auto"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads for matrix products; `None` takes all cores."""
    max_rank: int = Field(default=256, ge=1)
    max_micro_batch_tokens: int = Field(default=2048, ge=1)
    """Tokens in one forward and backward pass; a longer sequence goes alone."""
    gradient_checkpointing: CheckpointingChoice = "auto"
    """Compute activations twice instead of keeping them; `auto`: for passes that would fill much of the memory."""
    max_prefill_tokens: int = Field(default=4096, ge=1)
    """Prompt tokens in one pass of the sampler; a longer prompt goes alone."""
    max_decode_batch: int = Field(default=256, ge=1)
    """Sequences that advance together in one decode step."""
    kv_cache_bytes: int = Field(default=512 * 2**20, ge=2**20)
    """Keys and values of running sequences and of prompts seen before; small models take less."""
    adapter_memory_bytes: int | None = Field(default=None, ge=LEAST_ADAPTER_BYTES)
    """Of adapters in use and frozen copies of their weights; others are put aside. `None`: a share of what is free."""
    host_adapter_bytes: int | None = Field(default=None, ge=0)
    """Of adapters put aside in the host's memory, where the device has a memory of its own; beyond it they go to disk.
    `None`: a share of what is free."""
    deterministic: bool = False
    """Bitwise the same numbers whatever else the engine does: no two requests ever share a pass, prompts are not kept,
    nothing is compiled, and dtype `auto` is float32. Slower wherever several requests wait."""
    seed: int = 0
    """Only for what no request seeds."""
