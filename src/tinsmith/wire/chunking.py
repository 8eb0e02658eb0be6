"""How the datums of one call are spread over requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tinsmith.types.datum import Datum, DmelChunk, EncodedTextChunk, ImageAssetPointerChunk, ImageChunk

MAX_CHUNK_DATUMS = 1024
MAX_CHUNK_BYTES = 5_000_000

_BYTES_PER_TRAINING_TOKEN = 4


def chunk_datums(
    data: Sequence[Datum], *, max_datums: int = MAX_CHUNK_DATUMS, max_bytes: int = MAX_CHUNK_BYTES
) -> Iterator[list[Datum]]:
    """Consecutive runs of at most `max_datums` datums and `max_bytes` estimated bytes.

    A datum larger than `max_bytes` travels alone. No run is empty.
    """
    chunk: list[Datum] = []
    chunk_bytes = 0
    for datum in data:
        size = estimated_bytes(datum)
        if chunk and (len(chunk) >= max_datums or chunk_bytes + size > max_bytes):
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(datum)
        chunk_bytes += size
    if chunk:
        yield chunk


def estimated_bytes(datum: Datum) -> int:
    """Size of a datum in a protobuf body, without framing."""
    size = sum(tensor.nbytes for tensor in datum.loss_fn_inputs.values())
    for chunk in datum.model_input.chunks:
        match chunk:
            case EncodedTextChunk():
                size += _BYTES_PER_TRAINING_TOKEN * len(chunk.tokens)
            case ImageChunk():
                size += len(chunk.data)
            case DmelChunk():
                size += len(chunk.dmel)
            case ImageAssetPointerChunk():
                size += len(chunk.location)
    return size
