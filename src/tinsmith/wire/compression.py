"""zstd bodies, with a cap on what a small body may expand to."""

from __future__ import annotations

import zstandard

from tinsmith.wire.tinker_proto import WireError


def compress(body: bytes, *, level: int = 3) -> bytes:
    """One zstd frame whose header states the content size."""
    return zstandard.ZstdCompressor(level=level).compress(body)


_SLICE_BYTES = 1024
"""Of input at a time; even the most expansive zstd makes no more than some tens of megabytes of that."""


def decompress(body: bytes, *, max_bytes: int) -> bytes:
    """Raises `WireError` if `body` is not exactly one whole zstd frame, or expands beyond `max_bytes`."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    parts: list[bytes] = []
    num_bytes = 0
    try:
        for start in range(0, len(body), _SLICE_BYTES):
            if frame.eof:
                break
            parts.append(frame.decompress(body[start : start + _SLICE_BYTES]))
            num_bytes += len(parts[-1])
            if num_bytes > max_bytes:
                raise WireError(f"the zstd body expands beyond the limit of {max_bytes} bytes")
    except zstandard.ZstdError as error:
        raise WireError(f"the body is not valid zstd: {error}") from error
    if not frame.eof:
        raise WireError(f"the zstd body of {len(body)} bytes ends too early")
    if frame.unused_data or start + _SLICE_BYTES < len(body):
        raise WireError("the zstd body goes on after its end")
    return b"".join(parts)
