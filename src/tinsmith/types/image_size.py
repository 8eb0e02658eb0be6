"""Width and height of a picture, read from the head of its file."""

from __future__ import annotations

import struct
from typing import Literal

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of frames; the three between them are tables and extensions (ITU-T T.81, table B.1)."""
_JPEG_BARE = frozenset({0x01, 0xD8, *range(0xD0, 0xD8)})
"""Markers without a length."""


def image_size(data: bytes, kind: Literal["png", "jpeg"]) -> tuple[int, int] | None:
    """Width and height in pixels; `None` if the head is not that of such a file."""
    return _png_size(data) if kind == "png" else _jpeg_size(data)


def _png_size(data: bytes) -> tuple[int, int] | None:
    """PNG specification, 11.2.2: IHDR is the first chunk."""
    if len(data) < 24 or not data.startswith(_PNG) or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """The first frame header says it."""
    if not data.startswith(b"\xff\xd8"):
        return None
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
        elif marker in _JPEG_BARE:
            position += 2
        elif marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return width, height
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None
