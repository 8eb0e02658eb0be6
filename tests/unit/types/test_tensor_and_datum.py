"""What users build by hand: arrays, inputs, datums."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from tinsmith.types import Datum, EncodedTextChunk, ImageChunk, ModelInput, ParsedCheckpointTinkerPath, TensorData
from tinsmith.types.checkpoint import check_checkpoint_name
from tinsmith.types.engine_options import ModelSource
from tinsmith.types.errors import InvalidInput
from tinsmith.types.operations import LoraSpec


def test_dtypes_are_narrowed_to_the_two_of_the_wire() -> None:
    assert TensorData.from_numpy(np.zeros(2, np.float64)).dtype == "float32"
    assert TensorData.from_numpy(np.zeros(2, np.int32)).dtype == "int64"
    assert TensorData.from_torch(torch.ones(2, dtype=torch.bfloat16)).to_numpy().tolist() == [1.0, 1.0]
    for wrong in (np.zeros(2, np.uint8), np.zeros(2, bool), np.array(["a"])):
        with pytest.raises(ValueError, match="cannot send an array of dtype"):
            TensorData.from_numpy(wrong)
    with pytest.raises(ValueError, match="'float64'"):
        TensorData([1.0], "float64", [1])  # type: ignore[arg-type]


def test_values_and_shape_must_agree() -> None:
    with pytest.raises(ValueError, match=r"3 values do not fill shape \[2, 2\]"):
        TensorData([1.0, 2.0, 3.0], "float32", [2, 2])
    tensor = TensorData(data=[1, 2, 3, 4], dtype="int64", shape=[2, 2])
    assert (tensor.data, tensor.shape, tensor.tolist()) == ([1, 2, 3, 4], [2, 2], [[1, 2], [3, 4]])
    assert tensor.to_torch().dtype == torch.int64
    assert TensorData([1, 2], "int64").shape is None


def test_lists_take_the_dtype_of_their_key_and_unknown_keys_are_refused() -> None:
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1, 0], "x": np.ones(2)})
    assert {key: t.dtype for key, t in datum.loss_fn_inputs.items()} == {
        "target_tokens": "int64",
        "weights": "float32",
        "x": "float32",
    }
    with pytest.raises(KeyError, match="'mystery'"):
        Datum(ModelInput.empty(), {"mystery": [1]})


PNG_3x2 = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x03\0\0\0\x02\x08\x02\0\0\0"
JPEG_3x2 = b"\xff\xd8\xff\xe0\0\x04\0\0\xff\xff\xc0\0\x0b\x08\0\x02\0\x03\x01\x01\x11\0"


@pytest.mark.parametrize(("data", "kind"), [(PNG_3x2, "png"), (JPEG_3x2, "jpeg")])
def test_row_8_a_pictures_size_is_read_from_its_head_and_does_not_travel(data: bytes, kind: Any) -> None:
    """The older constructor, with all three, works too."""
    picture = ImageChunk(data=data, format=kind)
    assert (picture.width, picture.height, picture.tokens) == (3, 2, None)
    older = ImageChunk(data=data, format=kind, height=2, width=3, tokens=16)
    assert older.length == 16
    assert set(older.model_dump()) == {"data", "format", "expected_tokens", "type"}
    assert ImageChunk.model_validate_json(picture.model_dump_json()) == picture
    with pytest.raises(ValueError, match="width is 4, but the picture's own width is 3"):
        ImageChunk(data=data, format=kind, width=4)
    with pytest.raises(ValueError, match="tokens is 3, but expected_tokens is 4"):
        ImageChunk(data=data, format=kind, tokens=3, expected_tokens=4)
    unread = ImageChunk(data=b"no picture", format=kind, width=7, height=8)
    assert (unread.width, unread.height) == (7, 8)
    for length in range(len(data)):
        ImageChunk(data=data[:length], format=kind)


def test_model_input_is_a_value() -> None:
    empty = ModelInput.empty()
    one = empty.append_int(5).append_int(6)
    assert (empty.length, one.to_ints(), len(one.chunks)) == (0, [5, 6], 1)
    with_picture = one.append(ImageChunk(data=b"x", format="png", expected_tokens=4))
    assert with_picture.append(EncodedTextChunk(tokens=[1])).length == 7
    with pytest.raises(ValueError, match="chunk 1 is 'image'"):
        with_picture.to_ints()
    with pytest.raises(ValueError, match="expected_tokens"):
        _ = one.append(ImageChunk(data=b"x", format="png")).length
    assert pickle.loads(pickle.dumps(with_picture)) == with_picture
    assert ModelInput.model_validate_json(with_picture.model_dump_json()) == with_picture


def test_a_datum_is_frozen_and_travels_between_processes() -> None:
    datum = Datum(ModelInput.from_ints([1]), {"weights": [1.0]})
    assert pickle.loads(pickle.dumps(datum)) == datum
    with pytest.raises(AttributeError):
        datum.model_input = ModelInput.empty()  # type: ignore[misc]


def test_checkpoint_paths() -> None:
    parsed = ParsedCheckpointTinkerPath.from_tinker_path("tinker://s:train:0/sampler_weights/step-3")
    assert (parsed.training_run_id, parsed.checkpoint_type, parsed.checkpoint_id) == (
        "s:train:0",
        "sampler",
        "sampler_weights/step-3",
    )
    for wrong in (
        "/tmp/x",
        "tinker://run/weights",
        "tinker://run/other/x",
        "tinker://run/weights/a/b",
        "tinker:///weights/x",
    ):
        with pytest.raises(ValueError, match="not a checkpoint path"):
            ParsedCheckpointTinkerPath.from_tinker_path(wrong)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "x" * 201, "a\n"])
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="checkpoint name"):
        check_checkpoint_name(name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"rank": 1, "alpha": 0}, "alpha must be above 0"),
        ({"rank": 1, "train_mlp": False, "train_attn": False, "train_unembed": False}, "all false"),
    ],
)
def test_impossible_adapters_cannot_be_described(spec: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LoraSpec(seed=0, **spec)  # type: ignore[arg-type]


def test_base_models_are_named_by_id_folder_or_both(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.json").write_text("{}")
    assert ModelSource.parse("Qwen/Qwen3-8B") == ModelSource(name="Qwen/Qwen3-8B", location="Qwen/Qwen3-8B")
    assert ModelSource.parse(f"mine={tmp_path}") == ModelSource(name="mine", location=str(tmp_path))
    assert ModelSource.parse(str(tmp_path)).folder == tmp_path
    assert ModelSource.parse("tinsmith/tiny").folder is not None
    for wrong in ("", "=x", "name=", f"name={tmp_path}/nowhere", "./nowhere"):
        with pytest.raises(InvalidInput, match="base model"):
            ModelSource.parse(wrong)
