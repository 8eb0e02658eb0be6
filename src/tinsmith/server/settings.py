"""What the HTTP side of a server can be told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field

from tinsmith.types.errors import InvalidInput

Dialect: TypeAlias = Literal["tinker", "tinkerbell", "openai", "anthropic"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)


def parse_dialects(names: Sequence[str] | None) -> frozenset[Dialect]:
    """All if none is named. Raises `InvalidInput` for a name that is none of `DIALECTS`."""
    for name in names or ():
        if name not in DIALECTS:
            raise InvalidInput(f"dialect {name!r} is unknown; known are {', '.join(DIALECTS)}")
    return frozenset(dialect for dialect in DIALECTS if not names or dialect in names)


class TinkerbellSettings(BaseModel):
    """The Tinkerbell dialect. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    auto_create: bool = True
    """Make an adapter when a request names one that does not exist."""
    auto_rank: int = Field(default=16, ge=1)
    auto_alpha: float = Field(default=32.0, gt=0)
    max_adapters_per_key: int = Field(default=32, ge=1)
    idle_s: float = Field(default=120.0, ge=0)
    """Unused for this long, an adapter makes room for a new one when its key has as many as it may."""
    session_timeout_s: float = Field(default=86_400.0, gt=0)
    """A key that is silent for this long loses its adapters."""
    forward_timeout_s: float = Field(default=60.0, gt=0)
    """How long a synchronous request waits; then it is answered 504, and its future goes on."""
    forward_backward_timeout_s: float = Field(default=120.0, gt=0)
    optim_step_timeout_s: float = Field(default=60.0, gt=0)
    sample_timeout_s: float = Field(default=60.0, gt=0)
    lora_timeout_s: float = Field(default=30.0, gt=0)
    """Of `add_lora` and `remove_lora`."""


class ServerSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    poll_hold_s: float = Field(default=25.0, gt=0, le=40)
    """How long `retrieve_future` holds a request whose result is not there. The official SDK gives up after 45 s."""
    accounts: bool = True
    """Ask for keys once there is one; without accounts whoever reaches the server owns everything on it."""
    keys_required: bool = False
    """Ask for keys even while there is none; for a server that other machines can reach."""
    loopback_hosts_only: bool = False
    """While there are no keys, answer only requests whose `Host` and `Origin` name this machine."""
    max_body_bytes: int = Field(default=256 * 2**20, ge=1024)
    """Of a request as it arrives; a larger one is answered 413."""
    max_upload_bytes: int = Field(default=16 * 2**30, ge=1024)
    """Of an adapter's archive that is imported; it goes to disk as it arrives."""
    max_expanded_bytes: int = Field(default=2**30, ge=1024)
    """Of a zstd body once expanded."""
    metadata_only_bytes: int = Field(default=1_000_000, ge=0)
    """A larger result is announced by its size first, to clients that ask for that."""
    offload_bytes: int = Field(default=16_384, ge=0)
    """Bodies and results larger than this are decoded and encoded in a worker thread."""
    codec_threads: int = Field(default=2, ge=1)
    max_chunk_datums: int = Field(default=1024, ge=1)
    """Datums per training request that the official SDK is asked to keep to."""
    max_chunk_bytes: int = Field(default=5_000_000, ge=1)
    dialects: frozenset[Dialect] = frozenset(DIALECTS)
    """What the server speaks beside Tinker, which it always does."""
    tinkerbell: TinkerbellSettings = TinkerbellSettings()
    link_ttl_s: float = Field(default=3600.0, gt=0)
    """How long a link to a checkpoint's files or a trace works."""
    sample_poller: bool = False
    """Ask official SDKs to wait for all samples of a client in one poll (`retrieve_futures`) instead of one each."""
    max_concurrent_samples: int = Field(default=2000, ge=1)
    """Samples in flight per sampling client that the official SDK is asked to keep to."""
    record_folder: Path | None = None
    """Where every sample of the chat dialects is recorded, token for token; `None` records nothing."""
