"""What the HTTP side of a server can be told."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ServerSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    poll_hold_s: float = Field(default=25.0, gt=0, le=40)
    """How long `retrieve_future` holds a request whose result is not there. The official SDK gives up after 45 s."""
    loopback_hosts_only: bool = False
    """Answer only requests whose `Host` and `Origin` name this machine; for a server on a port without keys."""
    max_body_bytes: int = Field(default=256 * 2**20, ge=1024)
    """Of a request as it arrives; a larger one is answered 413."""
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
    max_concurrent_samples: int = Field(default=2000, ge=1)
    """Samples in flight per sampling client that the official SDK is asked to keep to."""
