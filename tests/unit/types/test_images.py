"""What a picture becomes in a sequence."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tinsmith.types import EncodedTextChunk, ImageChunk, ModelInput
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.images import ImageRule, place_tokens

RULE = ImageRule(cell_size=28, min_pixels=3136, max_pixels=12845056)
SMALL = ImageRule(cell_size=8, min_pixels=128, max_pixels=2560)


def picture(width: int, height: int, shade: int = 0, **fields: object) -> ImageChunk:
    buffer = io.BytesIO()
    Image.new("L", (width, height), shade).save(buffer, format="png")
    return ImageChunk.model_validate({"data": buffer.getvalue(), "format": "png", **fields})


@pytest.mark.parametrize("rule", [RULE, SMALL])
def test_pictures_are_scaled_as_the_models_own_processor_scales_them(rule: ImageRule) -> None:
    rng = np.random.default_rng(0)
    sizes = [*np.exp(rng.uniform(0, 9, (4000, 2))).astype(int).tolist(), [42, 14], [1, 200], [70, 98]]
    compared = 0
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            continue
        tall, wide = smart_resize(height, width, rule.cell_size, rule.min_pixels, rule.max_pixels)
        assert rule.cells(width=width, height=height) == (tall // rule.cell_size, wide // rule.cell_size)
        compared += 1
    assert compared > 2000


def test_a_picture_longer_than_the_processor_takes_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"prompt\.chunks\[0\]: a picture of 1 x 201 pixels"):
        place_tokens(ModelInput(chunks=[picture(1, 201)]), SMALL, "prompt")


def test_rows_of_pictures_are_negative_and_name_the_bytes() -> None:
    text = EncodedTextChunk(tokens=[5, 6])

    def ids(*chunks: object) -> list[int]:
        return place_tokens(ModelInput(chunks=list(chunks)), SMALL, "x").ids_N.tolist()

    one, again, other = (ids(text, picture(24, 16, shade), text) for shade in (0, 0, 1))
    assert one == again
    assert one[:2] == one[-2:] == [5, 6]
    assert len(one) == 2 + 6 + 2
    assert all(number < 0 for number in one[2:8])
    assert not set(one[2:8]) & set(other[2:8])
    assert len(set(one[2:8])) == 6


def test_places_of_pictures_are_those_of_their_rows() -> None:
    chunks = [picture(24, 16), EncodedTextChunk(tokens=[1, 2, 3]), picture(16, 24)]
    placed = place_tokens(ModelInput(chunks=chunks), SMALL, "x")
    assert [(i.chunk_index, i.start, i.end, i.rows, i.columns) for i in placed.images] == [
        (0, 0, 6, 2, 3),
        (2, 9, 15, 3, 2),
    ]
    assert placed.text_ids().tolist() == [0] * 6 + [1, 2, 3] + [0] * 6


@pytest.mark.parametrize("field", ["expected_tokens", "tokens"])
def test_a_wrong_count_is_refused_with_both_numbers(field: str) -> None:
    with pytest.raises(InvalidInput, match=r"prompt\.chunks\[0\]\.expected_tokens is 5, .* as 6 tokens \(2 x 3\)"):
        place_tokens(ModelInput(chunks=[picture(24, 16, **{field: 5})]), SMALL, "prompt")
    assert len(place_tokens(ModelInput(chunks=[picture(24, 16, **{field: 6})]), SMALL, "prompt")) == 6


def test_bytes_that_are_no_picture_and_models_without_eyes_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"prompt\.chunks\[0\]\.data is no png file"):
        place_tokens(ModelInput(chunks=[ImageChunk(data=b"hello", format="png")]), SMALL, "prompt")
    with pytest.raises(Unsupported, match=r"prompt\.chunks\[0\] is of type 'image'"):
        place_tokens(ModelInput(chunks=[picture(24, 16)]), None, "prompt")
