"""`ModelInput` and `Datum`: what a training example is made of."""

# N token positions of one datum

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from tinsmith.types.image_size import image_size
from tinsmith.types.tensor import TensorData, TensorDtype


class StrictModel(BaseModel):
    """A request-side model: unknown fields are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EncodedTextChunk(StrictModel):
    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        return len(self.tokens)


class ImageChunk(StrictModel):
    """An encoded picture. Give `bytes`; in JSON it travels as base64."""

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    """What the sender believes the picture expands to; advisory."""
    width: int | None = Field(default=None, exclude=True)
    """In pixels, like `height`: taken from the picture's own head where that can be read. Neither travels."""
    height: int | None = Field(default=None, exclude=True)
    tokens: int | None = Field(default=None, exclude=True)
    """An older name of `expected_tokens`."""
    type: Literal["image"] = "image"

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("format") not in ("png", "jpeg"):
            return value
        data = cls._from_base64(value.get("data"))
        found = image_size(data, value["format"]) if isinstance(data, bytes) else None
        if found is None:
            return value
        for name, true in zip(("width", "height"), found, strict=True):
            if value.get(name) not in (None, true):
                raise ValueError(f"{name} is {value[name]!r}, but the picture's own {name} is {true}")
        return value | {"width": found[0], "height": found[1]}

    @model_validator(mode="after")
    def _one_count(self) -> ImageChunk:
        if None not in (self.tokens, self.expected_tokens) and self.tokens != self.expected_tokens:
            raise ValueError(f"tokens is {self.tokens!r}, but expected_tokens is {self.expected_tokens!r}")
        return self

    @field_validator("data", mode="before")
    @classmethod
    def _from_base64(cls, value: Any) -> Any:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else value

    @field_serializer("data")
    def _to_base64(self, value: bytes) -> str:
        return base64.b64encode(value).decode()

    @property
    def length(self) -> int:
        count = self.tokens if self.expected_tokens is None else self.expected_tokens
        if count is None:
            raise ValueError("the length of an ImageChunk is known only if expected_tokens is set")
        return count


class ImageAssetPointerChunk(StrictModel):
    format: Literal["png", "jpeg"]
    location: str
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    @property
    def length(self) -> int:
        if self.expected_tokens is None:
            raise ValueError("the length of an ImageAssetPointerChunk is known only if expected_tokens is set")
        return self.expected_tokens


class DmelChunk(StrictModel):
    """Audio features in a serialized container."""

    dmel: bytes
    type: Literal["dmel"] = "dmel"

    @field_validator("dmel", mode="before")
    @classmethod
    def _from_base64(cls, value: Any) -> Any:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else value

    @field_serializer("dmel")
    def _to_base64(self, value: bytes) -> str:
        return base64.b64encode(value).decode()

    @property
    def length(self) -> int:
        """The first dimension that the container's head names. Raises `ValueError` if the head cannot be read."""
        return container_rows(self.dmel)


ModelInputChunk: TypeAlias = Annotated[
    EncodedTextChunk | ImageAssetPointerChunk | ImageChunk | DmelChunk, Field(discriminator="type")
]


class ModelInput(StrictModel):
    """A sequence of chunks that the model reads in order."""

    chunks: list[ModelInputChunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        return cls(chunks=[EncodedTextChunk(tokens=[int(token) for token in tokens])])

    @classmethod
    def empty(cls) -> ModelInput:
        return cls(chunks=[])

    def to_ints(self) -> list[int]:
        """All tokens. Raises `ValueError` if a chunk is not text."""
        tokens: list[int] = []
        for position, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise ValueError(f"chunk {position} is {chunk.type!r}; only text chunks have token ids")
            tokens.extend(chunk.tokens)
        return tokens

    def to_numpy(self) -> np.ndarray:
        """All tokens as int64 `[N]`. Raises `ValueError` if a chunk is not text."""
        return np.asarray(self.to_ints(), dtype=np.int64)

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token, in the last text chunk if there is one."""
        if self.chunks and isinstance(self.chunks[-1], EncodedTextChunk):
            last = EncodedTextChunk(tokens=[*self.chunks[-1].tokens, token])
            return ModelInput(chunks=[*self.chunks[:-1], last])
        return self.append(EncodedTextChunk(tokens=[token]))


def container_rows(container: bytes) -> int:
    """Rows of a serialized tensor: [254 if constant], a dtype byte 0..7, then LEB128 numbers: ndim and dimensions."""
    position = 1 if container[:1] == b"\xfe" else 0
    if position >= len(container) or container[position] > 7:
        raise ValueError("the length of a DmelChunk cannot be read: its data do not start like a tensor container")
    num_dimensions, position = _leb128(container, position + 1)
    if num_dimensions == 0:
        raise ValueError("the length of a DmelChunk cannot be read: its tensor has no dimensions")
    return _leb128(container, position)[0]


def _leb128(data: bytes, position: int) -> tuple[int, int]:
    """A number in base 128, least significant digits first, and where it ends."""
    number, shift = 0, 0
    for end in range(position, len(data)):
        number |= (data[end] & 0x7F) << shift
        if data[end] < 0x80:
            return number, end + 1
        shift += 7
    raise ValueError("the length of a DmelChunk cannot be read: its head is cut off")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProvenanceSpan:
    """`length` tokens from `offset` of the prompt of sampled sequence `sequence_id`."""

    sequence_id: str
    offset: int = 0
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledProvenanceSpan:
    """`length` tokens from `offset` of the sampled tokens of `sequence_id`."""

    sequence_id: str
    offset: int = 0
    length: int


ProvenanceSpan: TypeAlias = PromptProvenanceSpan | SampledProvenanceSpan
LossFnInputs: TypeAlias = dict[str, TensorData]

LIST_DTYPE: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}
"""The dtype a plain Python list gets, by the name of the loss input."""

_SPARSE_KEYS = ("target_tokens", "weights")


@dataclass(frozen=True, slots=True)
class Datum:
    """One training example: what the model reads, and what the loss needs beside it.

    Position i of `model_input` predicts token i+1 of the sequence, so every per-token loss input has N rows.
    Values of `loss_fn_inputs` may be `TensorData`, torch tensors, numpy arrays or, under the known keys, lists.
    """

    model_input: ModelInput
    loss_fn_inputs: LossFnInputs
    model_input_spans: Sequence[ProvenanceSpan] | None = None
    loss_fn_input_spans: Sequence[ProvenanceSpan] | None = None

    def __init__(
        self,
        model_input: ModelInput,
        loss_fn_inputs: Mapping[str, Any] | None = None,
        model_input_spans: Sequence[ProvenanceSpan] | None = None,
        loss_fn_input_spans: Sequence[ProvenanceSpan] | None = None,
    ) -> None:
        if (model_input_spans is None) != (loss_fn_input_spans is None):
            raise ValueError("a Datum has both lists of provenance spans, or neither")
        inputs = {key: as_tensor_data(key, value) for key, value in (loss_fn_inputs or {}).items()}
        object.__setattr__(self, "model_input", model_input)
        object.__setattr__(self, "loss_fn_inputs", inputs)
        object.__setattr__(self, "model_input_spans", model_input_spans)
        object.__setattr__(self, "loss_fn_input_spans", loss_fn_input_spans)

    def with_provenance(self, model_input: Sequence[ProvenanceSpan], loss_fn_inputs: Sequence[ProvenanceSpan]) -> Datum:
        """The same datum, saying which sampled sequences its inputs and its targets come from.

        Raises `ValueError` unless the spans of `model_input` cover it exactly, and those of `loss_fn_inputs` the rows
        of `target_tokens`.
        """
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is None:
            raise ValueError("with_provenance needs a datum with target_tokens")
        rows = len(targets.flat) if targets.shape is None else targets.shape[0]
        for name, spans, wanted in (
            ("model_input", model_input, self.model_input.length),
            ("loss_fn_inputs", loss_fn_inputs, rows),
        ):
            covered = sum(span.length for span in spans)
            if covered != wanted:
                raise ValueError(f"the spans of {name} cover {covered} tokens of {wanted}")
        return Datum(self.model_input, self.loss_fn_inputs, list(model_input), list(loss_fn_inputs))

    def model_dump(self) -> dict[str, Any]:
        return {
            "model_input": self.model_input.model_dump(exclude_none=True),
            "loss_fn_inputs": {key: tensor.model_dump() for key, tensor in self.loss_fn_inputs.items()},
        }


def as_tensor_data(key: str, value: Any) -> TensorData:
    """Turn what a user writes under `key` into a `TensorData`.

    Two-dimensional torch tensors under `target_tokens` and `weights` become CSR where that is smaller on the wire.
    Raises `KeyError` for a plain list under an unknown key: its dtype would be a guess.
    """
    if isinstance(value, TensorData):
        return value
    if isinstance(value, np.ndarray):
        return TensorData.from_numpy(value)
    if hasattr(value, "detach"):
        return _from_torch(key, value)
    if isinstance(value, dict) and "data" in value:
        return TensorData(**value)
    if key not in LIST_DTYPE:
        raise KeyError(
            f"loss input {key!r} is a {type(value).__name__}; lists are taken for {', '.join(LIST_DTYPE)} only. "
            "Give a numpy array, a torch tensor or a TensorData"
        )
    array = np.asarray(value)
    return TensorData(array, LIST_DTYPE[key], array.shape)


def _from_torch(key: str, tensor: Any) -> TensorData:
    if key in _SPARSE_KEYS and tensor.ndim == 2:
        rows, columns = tensor.shape
        if (rows + 1) + 2 * int((tensor != 0).sum()) < rows * columns:
            return TensorData.from_torch_sparse(tensor)
    return TensorData.from_torch(tensor)
