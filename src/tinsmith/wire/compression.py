"""zstd bodies, with a cap on what a small body may expand to."""

from __future__ import annotations

import zstandard

from tinsmith.wire.tinker_proto import WireError


def compress(body: bytes, *, level: int = 3) -> bytes:
    """One zstd frame whose header states the content size."""
    return zstandard.ZstdCompressor(level=level).compress(body)


def decompress(body: bytes, *, max_bytes: int) -> bytes:
    """Raises `WireError` if `body` is not zstd or would expand beyond `max_bytes`."""
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(body)
        content = reader.read(max_bytes + 1)
    except zstandard.ZstdError as error:
        raise WireError(f"the body is not valid zstd: {error}") from error
    if len(content) > max_bytes:
        raise WireError(f"the zstd body expands beyond the limit of {max_bytes} bytes")
    return content
