"""What a picture becomes in a sequence: how many rows, arranged how, and which numbers stand for them.

A model that reads pictures scales each to a whole number of cells and reads one row per cell, from left to right and
top to bottom. In an array of token ids such rows hold negative numbers made from the picture's bytes, so that equal
arrays mean equal inputs.
"""

# N token position

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from tinsmith.types.datum import EncodedTextChunk, ImageChunk, ModelInput
from tinsmith.types.errors import InvalidInput, Unsupported

_MAX_ASPECT = 200
"""The family's own image processor refuses longer ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRule:
    """How a base model of the Qwen-VL family scales pictures (Wang et al., arXiv 2409.12191, section 2.1)."""

    cell_size: int
    """Pixels on each side of a cell: patch size times merge size."""
    min_pixels: int
    max_pixels: int
    """Pictures are scaled to lie between these."""

    def cells(self, *, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of cells. Raises `InvalidInput` for a picture longer than the model's processor takes."""
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise InvalidInput(
                f"a picture of {width} x {height} pixels is more than {_MAX_ASPECT} times as long as wide"
            )
        size = self.cell_size
        rows, columns = round(height / size), round(width / size)
        if rows * columns * size**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / shrink / size)) for side in (height, width))
        elif rows * columns * size**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / size) for side in (height, width))
        return rows, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedImage:
    """A picture and the positions it takes in its sequence."""

    chunk: ImageChunk
    chunk_index: int
    """In its `ModelInput`."""
    digest: bytes
    """Of its bytes."""
    start: int
    rows: int
    columns: int

    @property
    def length(self) -> int:
        return self.rows * self.columns

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTokens:
    """A `ModelInput` as one row of numbers."""

    ids_N: np.ndarray
    """int64: token ids, and below zero what stands for the rows of pictures."""
    images: tuple[PlacedImage, ...] = ()
    """In order."""

    def __len__(self) -> int:
        return len(self.ids_N)

    def text_ids(self) -> np.ndarray:
        """The same with 0 in the rows of pictures."""
        ids_N = self.ids_N.copy() if self.images else self.ids_N
        for image in self.images:
            ids_N[image.start : image.end] = 0
        return ids_N


def place_tokens(model_input: ModelInput, rule: ImageRule | None, where: str) -> PlacedTokens:
    """Raises `Unsupported` for a chunk that is neither text nor, given a rule, a picture; `InvalidInput` for a picture
    whose size cannot be read or contradicts its `expected_tokens`, and for text that is no token ids.
    """
    parts: list[np.ndarray] = []
    images: list[PlacedImage] = []
    at = 0
    for index, chunk in enumerate(model_input.chunks):
        if isinstance(chunk, EncodedTextChunk):
            parts.append(_token_ids(chunk, f"{where}.chunks[{index}]"))
        elif isinstance(chunk, ImageChunk) and rule is not None:
            rows, columns = cells_of(chunk, rule, f"{where}.chunks[{index}]")
            digest = hashlib.blake2b(chunk.data, digest_size=32).digest()
            parts.append(_stand_ins(digest, rows * columns))
            images.append(
                PlacedImage(chunk=chunk, chunk_index=index, digest=digest, start=at, rows=rows, columns=columns)
            )
        else:
            raise Unsupported(f"{where}.chunks[{index}] is of type {chunk.type!r}, which the base model does not read")
        at += len(parts[-1])
    ids_N = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return PlacedTokens(ids_N=ids_N, images=tuple(images))


def cells_of(chunk: ImageChunk, rule: ImageRule, where: str) -> tuple[int, int]:
    """Rows and columns that the picture expands to. Raises `InvalidInput` as `place_tokens`."""
    if chunk.width is None or chunk.height is None:
        raise InvalidInput(f"{where}.data is no {chunk.format} file: its size cannot be read")
    if not (chunk.width and chunk.height):
        raise InvalidInput(f"{where}.data is a picture of {chunk.width} x {chunk.height} pixels, which is empty")
    try:
        rows, columns = rule.cells(width=chunk.width, height=chunk.height)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from error
    expected = chunk.tokens if chunk.expected_tokens is None else chunk.expected_tokens
    if expected not in (None, rows * columns):
        raise InvalidInput(
            f"{where}.expected_tokens is {expected}, but the base model reads a picture of {chunk.width} x "
            f"{chunk.height} pixels as {rows * columns} tokens ({rows} x {columns})"
        )
    return rows, columns


def _token_ids(chunk: EncodedTextChunk, where: str) -> np.ndarray:
    try:
        return np.asarray(chunk.tokens, dtype=np.int64)
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidInput(f"{where} holds something that is no token id: {error}") from error


def _stand_ins(digest: bytes, count: int) -> np.ndarray:
    """63 bits of hash per row, so that even a short picture is told from another by many."""
    words = np.frombuffer(hashlib.shake_128(digest).digest(8 * count), "<u8")
    return -1 - (words >> np.uint64(1)).astype(np.int64)
