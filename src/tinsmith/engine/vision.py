"""Pictures in front of the language model: decoded, scaled and cut as the family does it, seen by its frozen tower.

What the tower makes of a picture depends on its bytes alone: every picture goes through it by itself, and the newest
results are kept for whoever sends the same one again.
"""

# T packed token, N token of one sequence, P patch, L row of one picture, H hidden, V vocabulary

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tinsmith.types.datum import EncodedTextChunk, ImageChunk, ModelInput
from tinsmith.types.engine_options import ModelSource
from tinsmith.types.errors import InvalidInput
from tinsmith.types.images import ImageRule, PlacedImage, PlacedTokens, place_tokens

MODEL_TYPES = frozenset({"qwen2_5_vl"})
"""Whose pictures are read; their language model takes positions of time, row and column."""
_KEPT_BYTES = 128 * 2**20
_CHECK_TOKENS = (5, 4)
"""Text before and after the picture of the check."""


def reads_images(config: PretrainedConfig) -> bool:
    return config.model_type in MODEL_TYPES


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Rows `[first, end)` of a picture in a packed pass, from packed row `at` on."""

    image: PlacedImage
    at: int
    first: int
    end: int
    where: str
    """Names the picture's chunk in errors."""


class VisionTower:
    """The part of a model that looks at pictures."""

    def __init__(self, model: PreTrainedModel, source: ModelSource) -> None:
        """Raises `InvalidInput` if the model comes without the settings of its image processor."""
        self._model = model
        try:
            self._processor = Qwen2VLImageProcessorPil.from_pretrained(source.load_from)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"base model {source.name!r} reads images, but the settings of its image processor "
                f"(preprocessor_config.json) cannot be loaded from {source.location!r}: {error}"
            ) from error
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._kept_bytes = 0
        size = self._processor.size
        self.rule = ImageRule(
            cell_size=self._processor.patch_size * self._processor.merge_size,
            min_pixels=int(size["shortest_edge"]),
            max_pixels=int(size["longest_edge"]),
        )

    def check(self, image: PlacedImage, where: str) -> None:
        """Raises `InvalidInput` if the picture cannot be decoded."""
        if image.digest not in self._kept:
            decoded(image.chunk, where)

    def features(self, image: PlacedImage, where: str) -> Tensor:
        """One row `[L, H]` per cell of the picture, frozen. Raises `InvalidInput` if it cannot be decoded."""
        kept = self._kept.get(image.digest)
        if kept is not None:
            self._kept.move_to_end(image.digest)
            return kept
        pixels_PC, grid_13 = self.patches(image, where)
        with torch.inference_mode(mode=False), torch.no_grad():  # training may meet what sampling left here
            output = self._model.get_image_features(
                pixels_PC.to(self._model.device), grid_13.to(self._model.device), return_dict=True
            )
            rows_LH: Tensor = output.pooler_output[0].clone()
        self._keep(image.digest, rows_LH)
        return rows_LH

    def patches(self, image: PlacedImage, where: str) -> tuple[Tensor, Tensor]:
        """What the tower takes: patches `[P, C]` fp32, and `[1, 3]` time, rows and columns of patches."""
        batch = self._processor.preprocess([decoded(image.chunk, where)], return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    def put_rows(self, embeds_TH: Tensor, rows: Sequence[ImageRows]) -> None:
        for part in rows:
            features_LH = self.features(part.image, part.where)[part.first : part.end]
            embeds_TH[part.at : part.at + len(features_LH)] = features_LH.to(embeds_TH.dtype)

    def _keep(self, digest: bytes, rows_LH: Tensor) -> None:
        self._kept[digest] = rows_LH
        self._kept_bytes += rows_LH.nbytes
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes


def decoded(chunk: ImageChunk, where: str) -> Image.Image:
    """The pixels, as RGB. Raises `InvalidInput` for bytes that are no such picture, or not all of one."""
    try:
        with Image.open(io.BytesIO(chunk.data), formats=[chunk.format]) as picture:
            pixels = picture.convert("RGB")
    except UnidentifiedImageError as error:  # whose text is about our buffer
        raise InvalidInput(f"{where}.data cannot be decoded as a {chunk.format} file") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{where}.data cannot be decoded as a {chunk.format} file: {error}") from error
    if pixels.size != (chunk.width, chunk.height):
        raise InvalidInput(
            f"{where}.data decodes to {pixels.size[0]} x {pixels.size[1]} pixels, but its head says "
            f"{chunk.width} x {chunk.height}"
        )
    return pixels


def positions_of(num_tokens: int, images: Sequence[PlacedImage]) -> np.ndarray:
    """Time, row and column `[3, N]` of every token (Wang et al., arXiv 2409.12191, section 2.1).

    Text counts on alike in all three. A picture's cells lie in a plane of equal time that begins where the text before
    ended; the text after it begins beyond the picture's longer side.
    """
    positions_3N = np.empty((3, num_tokens), np.int64)
    at = position = 0
    for image in images:
        position = _count_on(positions_3N[:, at : image.start], position)
        cells_L = np.arange(image.length)
        planes = (np.zeros_like(cells_L), cells_L // image.columns, cells_L % image.columns)
        positions_3N[:, image.start : image.end] = np.stack(planes) + position
        at, position = image.end, position + max(image.rows, image.columns)
    _count_on(positions_3N[:, at:], position)
    return positions_3N


def _count_on(positions_3N: np.ndarray, position: int) -> int:
    end = position + positions_3N.shape[1]
    positions_3N[:] = np.arange(position, end)
    return end


# ---- the check at load ----


def check_sequence(config: PretrainedConfig, rule: ImageRule) -> PlacedTokens:
    """Text, a picture of several rows and columns, and text."""
    before, after = _CHECK_TOKENS
    reserved = {config.image_token_id, config.video_token_id}
    ids = [i for i in range(config.get_text_config().vocab_size) if i not in reserved][: before + after]
    side = rule.cell_size
    pixels = np.arange(2 * side * 3 * side * 3).reshape(2 * side, 3 * side, 3) % 251
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="png")
    chunks: list[Any] = [
        EncodedTextChunk(tokens=ids[:before]),
        ImageChunk(data=buffer.getvalue(), format="png"),
        EncodedTextChunk(tokens=ids[before:]),
    ]
    return place_tokens(ModelInput(chunks=chunks), rule, "check")


@torch.inference_mode()
def own_logits(model: PreTrainedModel, tower: VisionTower, tokens: PlacedTokens) -> Tensor:
    """What the model's own code computes for such a sequence, fp32 `[N, V]`."""
    (image,) = tokens.images
    pixels_PC, grid_13 = tower.patches(image, "check")
    is_image_N = torch.zeros(len(tokens), dtype=torch.int64)
    is_image_N[image.start : image.end] = 1
    ids_N = torch.from_numpy(tokens.text_ids()).masked_fill(is_image_N == 1, model.config.image_token_id)
    inputs = {
        "input_ids": ids_N[None],
        "mm_token_type_ids": is_image_N[None],
        "pixel_values": pixels_PC,
        "image_grid_thw": grid_13,
    }
    output = model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False)
    logits_NV: Tensor = output.logits[0]
    return logits_NV.float()
