"""What can still be read of a damaged training request: enough to fail its future instead of the POST.

A rejected POST burns a sequence number that later requests wait for, and of a call in several chunks it stops the
official SDK for good; so a request is refused over HTTP only when it does not even say whose it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import zstandard

HEAD_BYTES = 65_536
MOST_IDS = 1024
"""Sequence ids handed out for a sample request that is refused anyway."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def ids_in_json(payload: Mapping[str, Any]) -> tuple[str, int] | None:
    """`(model_id, seq_id)` if both are there and well formed."""
    model_id, seq_id = payload.get("model_id"), payload.get("seq_id")
    if _is_id(model_id) and type(seq_id) is int and 0 < seq_id < 2**63:
        return model_id, seq_id
    return None


def _is_id(value: Any) -> TypeGuard[str]:
    """Half a character of Unicode can be read as JSON, and neither stored nor looked up."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def ids_in_protobuf(body: bytes) -> tuple[str, int] | None:
    """Fields 1 and 2 of a `ForwardBackwardRequest`, read up to where the damage begins."""
    model_id, seq_id, position = b"", 0, 0
    try:
        while position < len(body) and not (model_id and seq_id):
            tag, position = _varint(body, position)
            kind, number = tag & 7, tag >> 3
            if kind == _VARINT:
                value, position = _varint(body, position)
                seq_id = value if number == 2 else seq_id
            elif kind == _BYTES:
                size, position = _varint(body, position)
                if number == 1 and position + size <= len(body):
                    model_id = body[position : position + size]
                position += size
            elif kind in (_FIXED32, _FIXED64):
                position += 4 if kind == _FIXED32 else 8
            else:
                return None
        if model_id and 0 < seq_id < 2**31:
            return model_id.decode(), seq_id
    except (IndexError, UnicodeDecodeError):
        return None
    return None


def _varint(body: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError


def head_of(body: bytes, content_encoding: str) -> bytes:
    """The first bytes of a body, expanded as far as that goes."""
    if content_encoding.strip().lower() != "zstd":
        return body[:HEAD_BYTES]
    try:
        return zstandard.ZstdDecompressor().stream_reader(body).read(HEAD_BYTES)
    except zstandard.ZstdError:
        return b""


def ids_in_sample(payload: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """`(sampling_session_id, seq_id, num_samples)`; the last is 1 if it makes no sense."""
    session_id, seq_id, num_samples = (payload.get(k) for k in ("sampling_session_id", "seq_id", "num_samples"))
    if _is_id(session_id) and type(seq_id) is int and 0 <= seq_id < 2**63:
        return session_id, seq_id, num_samples if type(num_samples) is int and 0 < num_samples <= MOST_IDS else 1
    return None
