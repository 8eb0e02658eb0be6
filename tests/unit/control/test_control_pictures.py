"""Pictures before an engine sees them: what is refused, where, and what they weigh."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import replace

import pytest
from PIL import Image

from tinsmith.control.admission import num_train_tokens
from tinsmith.control.pictures import MAX_PIXELS
from tinsmith.control.requests import DrawSamples, ForwardBackward
from tinsmith.control.validation import check_training, sampling_operation
from tinsmith.runtime.fake import FAKE_CARD
from tinsmith.types import Datum, EncodedTextChunk, ImageAssetPointerChunk, ImageChunk, ModelInput, SamplingParams
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.images import ImageRule

CARD = replace(
    FAKE_CARD,
    vocab_size=100,
    max_context=32,
    images=ImageRule(cell_size=8, min_pixels=128, max_pixels=2560),
)


def encoded(kind: str = "png", width: int = 24, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format=kind)
    return buffer.getvalue()


def png_head(width: int, height: int) -> bytes:
    """A PNG whose head promises so many pixels, and nothing behind it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def datum(*chunks: object, rows: int = 8) -> Datum:
    inputs = {"target_tokens": [1] * rows, "weights": [1.0] * rows}
    return Datum(ModelInput.model_construct(chunks=list(chunks)), inputs)


TEXT = EncodedTextChunk(tokens=[1, 2])


def check(*chunks: object, rows: int = 8) -> None:
    check_training([datum(*chunks, rows=rows)], "cross_entropy", {}, CARD)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_good_pictures_pass_with_one_row_of_inputs_per_expanded_token(kind: str) -> None:
    check(TEXT, ImageChunk(data=encoded(kind), format=kind))
    check(TEXT, ImageChunk(data=encoded(kind), format=kind, expected_tokens=6))
    with pytest.raises(InvalidInput, match="has 3 rows, but model_input has 8 tokens"):
        check(TEXT, ImageChunk(data=encoded(kind), format=kind), rows=3)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (ImageChunk(data=b"hello", format="png"), "data cannot be read as a png file"),
        (ImageChunk(data=b"", format="jpeg"), "data cannot be read as a jpeg file"),
        (ImageChunk(data=encoded("jpeg"), format="png"), "data cannot be read as a png file"),
        (ImageChunk(data=encoded("gif"), format="png"), "data cannot be read as a png file"),
        (ImageChunk(data=encoded("png"), format="jpeg"), "data cannot be read as a jpeg file"),
        (ImageChunk(data=png_head(50_000, 50_000), format="png"), f"at most {MAX_PIXELS} pixels are taken"),
        (ImageChunk(data=png_head(0, 4), format="png"), "data cannot be read as a png file"),
        (ImageChunk(data=encoded(width=402, height=2), format="png"), "a picture of 402 x 2 pixels is more than 200"),
        (
            ImageChunk(data=encoded(), format="png", expected_tokens=7),
            "expected_tokens is 7, but the base model reads a picture of 24 x 16 pixels as 6 tokens (2 x 3)",
        ),
    ],
)
def test_a_picture_that_cannot_be_read_is_named_by_its_place(chunk: ImageChunk, message: str) -> None:
    pattern = re.escape("data[0].model_input.chunks[1]") + ".*" + re.escape(message)
    with pytest.raises(InvalidInput, match=pattern):
        check(TEXT, chunk)


def test_pictures_count_towards_the_context() -> None:
    big = ImageChunk(data=encoded(width=80, height=32), format="png")
    with pytest.raises(InvalidInput, match=r"has 42 tokens; base model .* takes at most 32"):
        check(TEXT, big, rows=42)


def test_pictures_elsewhere_and_negative_ids_are_refused() -> None:
    pointer = ImageAssetPointerChunk(format="png", location="https://example.org/a.png")
    with pytest.raises(Unsupported, match="reads text and images whose bytes are in the request"):
        check(TEXT, pointer)
    with pytest.raises(InvalidInput, match="token -5 at position 7 is outside the vocabulary"):
        check(ImageChunk(data=encoded(), format="png"), EncodedTextChunk(tokens=[3, -5]))


def test_a_request_weighs_its_expanded_tokens_and_what_will_be_refused_nothing() -> None:
    picture, broken = ImageChunk(data=encoded(), format="png"), ImageChunk(data=b"x", format="png")

    def weight(*chunks: object) -> int:
        request = ForwardBackward(
            model_id="m", seq_id=1, data=(datum(*chunks),), loss_fn="cross_entropy", loss_fn_config={}
        )
        return num_train_tokens(request, CARD)

    assert weight(TEXT, picture, TEXT) == 10
    assert weight(TEXT, broken) == 2
    assert (
        num_train_tokens(
            ForwardBackward(model_id="m", seq_id=1, data=(datum(TEXT, picture),), loss_fn="x", loss_fn_config={}),
            FAKE_CARD,
        )
        == 2
    )


def test_a_prompt_with_a_picture_reaches_the_engine_as_rows_and_places() -> None:
    picture = ImageChunk(data=encoded(), format="png")
    prompt = ModelInput(chunks=[TEXT, picture, TEXT])
    request = DrawSamples(
        sampling_session_id="s", seq_id=0, prompt=prompt, num_samples=1, params=SamplingParams(temperature=1.0)
    )
    asked = sampling_operation(request, CARD, None, int)
    assert asked.prompt[[0, 1, 8, 9]].tolist() == [1, 2, 1, 2]
    assert (asked.prompt[2:8] < 0).all()
    assert [(i.start, i.end, i.chunk) for i in asked.images] == [(2, 8, picture)]
    assert asked.max_tokens == CARD.max_context - 10
