"""Whether a picture can be read at all, told from the head of its file before an engine sees it."""

from __future__ import annotations

import io

from tinsmith.types.datum import ImageChunk
from tinsmith.types.errors import InvalidInput

MAX_PIXELS = 2**26
"""Of one picture: more would take 200 MB and up once decoded."""


def check_picture(chunk: ImageChunk, where: str) -> None:
    """Raises `InvalidInput`. Reads the head only; pixels are decoded by the engine."""
    from PIL import Image, UnidentifiedImageError

    if (chunk.width or 0) * (chunk.height or 0) > MAX_PIXELS:  # before Pillow looks at the rest
        raise InvalidInput(
            f"{where}.data is a picture of {chunk.width} x {chunk.height} pixels; at most {MAX_PIXELS} pixels are taken"
        )
    try:
        with Image.open(io.BytesIO(chunk.data), formats=[chunk.format]) as picture:
            size = picture.size
    except UnidentifiedImageError as error:  # whose text is about our buffer
        raise InvalidInput(f"{where}.data cannot be read as a {chunk.format} file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInput(f"{where}.data cannot be read as a {chunk.format} file: {error}") from error
    if size != (chunk.width, chunk.height):
        raise InvalidInput(
            f"{where}.data has two sizes: {size[0]} x {size[1]} pixels and, in its first header, "
            f"{chunk.width} x {chunk.height}"
        )
