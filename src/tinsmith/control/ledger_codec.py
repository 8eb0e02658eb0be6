"""What the ledger holds, as bytes: a JSON tree with its arrays beside it. Stable over versions, and never code.

    magic "TL" | version | flags (1: the rest is zstd) | length of the tree (4 bytes, little-endian) | tree | arrays

A value that JSON does not have is an object with the key `!`, its kind. Records are written by the names of their
fields: one that a later version adds takes its default when an older entry is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orjson
import zstandard
from pydantic import BaseModel

from tinsmith.control import requests as ask
from tinsmith.control.elsewhere import Elsewhere
from tinsmith.control.futures import ExternalSaved, SamplerSaved
from tinsmith.types import custom_loss, datum, params
from tinsmith.types.errors import ServerError, StorageError, TinsmithError, UserError
from tinsmith.types.operations import LoraSpec
from tinsmith.types.rest import LoadWeightsResponse
from tinsmith.types.results import (
    ForwardBackwardOutput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TopkLogprobs,
)
from tinsmith.types.tensor import TensorData

VERSION = 1
_MAGIC = b"TL"
_COMPRESSED = 1
_COMPRESS_FROM_BYTES = 16 * 1024
_KIND = "!"
_MAX_EXPANDED_BYTES = 2**31
_INT64 = range(-(2**63), 2**63)

_records: dict[str, type[Any]] = {
    record.__name__: record
    for record in (
        ask.NewSession,
        ask.ForwardBackward,
        ask.ApplyOptimizer,
        ask.SaveState,
        ask.SaveForSampler,
        ask.SaveExternal,
        ask.LoadState,
        ask.UnloadModel,
        ask.Rejected,
        ask.Recipe,
        ask.Deferred,
        ask.DrawSamples,
        ask.RejectedSample,
        datum.Datum,
        datum.ModelInput,
        datum.ImageChunk,
        datum.ImageAssetPointerChunk,
        datum.DmelChunk,
        datum.PromptProvenanceSpan,
        datum.SampledProvenanceSpan,
        params.AdamParams,
        params.SamplingParams,
        custom_loss.CustomLoss,
        custom_loss.LossInput,
        custom_loss.LossCall,
        custom_loss.Ref,
        custom_loss.TorchConstant,
        LoraSpec,
        SamplerSaved,
        ExternalSaved,
        LoadWeightsResponse,
        ForwardBackwardOutput,
        SampleResponse,
        SampledSequence,
        TopkLogprobs,
        PromptAltTokens,
    )
}


def recorded(record: type[Any]) -> type[Any]:
    """Class decorator: values of this dataclass can be written."""
    _records[record.__name__] = record
    return record


def encode(value: Any) -> bytes:
    """Raises `TypeError` for a value of a type that is not known here."""
    arrays: list[bytes] = []
    tree = orjson.dumps(_Writer(arrays).tree(value))
    body = b"".join([struct.pack("<I", len(tree)), tree, *arrays])
    flags = 0
    if len(body) >= _COMPRESS_FROM_BYTES:
        body, flags = zstandard.ZstdCompressor(level=1).compress(body), _COMPRESSED
    return _MAGIC + bytes([VERSION, flags]) + body


def decode(data: bytes) -> Any:
    """Raises `StorageError` for bytes that are no entry, or of a later version."""
    if data[:2] != _MAGIC or len(data) < 8:
        raise StorageError(f"an entry of the ledger cannot be read: it begins with {data[:4]!r}")
    if data[2] > VERSION:
        raise StorageError(f"an entry of the ledger has version {data[2]}; this version of Tinsmith reads {VERSION}")
    body = data[4:]
    try:
        if data[3] & _COMPRESSED:
            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=_MAX_EXPANDED_BYTES)
        (length,) = struct.unpack_from("<I", body)
        tree = orjson.loads(body[4 : 4 + length])
        return _Reader(memoryview(body)[4 + length :]).value(tree)
    except (ValueError, KeyError, TypeError, struct.error, zstandard.ZstdError) as error:
        raise StorageError(f"an entry of the ledger cannot be read: {error!r}") from error


class _Writer:
    def __init__(self, arrays: list[bytes]) -> None:
        self._arrays = arrays
        self._offset = 0

    def tree(self, value: Any) -> Any:
        match value:
            case None | bool() | str():
                return value
            case int():
                return value if value in _INT64 else {_KIND: "int", "v": str(value)}
            case float():
                return value if math.isfinite(value) else {_KIND: "float", "v": repr(value)}
            case list():
                return [self.tree(item) for item in value]
            case tuple():
                return {_KIND: "tuple", "v": [self.tree(item) for item in value]}
            case bytes():
                return {_KIND: "bytes", "b": self._keep(value)}
            case np.ndarray():
                return self._array(value)
            case TensorData():
                return self._tensor(value)
            case datum.EncodedTextChunk():
                return {_KIND: "text", "t": self._array(np.asarray(value.tokens, dtype=np.int64))}
            case TinsmithError():
                kind = "user" if isinstance(value, UserError) else "server"
                return {_KIND: "error", "n": type(value).__name__, "c": kind, "m": str(value)}
            case slice():
                return {_KIND: "slice", "v": [self.tree(v) for v in (value.start, value.stop, value.step)]}
            case _ if value is ...:
                return {_KIND: "ellipsis"}
            case Elsewhere():
                return self._elsewhere(value)
            case Mapping():
                return {_KIND: "map", "v": [[self.tree(k), self.tree(v)] for k, v in value.items()]}
            case np.generic():
                return self.tree(value.item())
            case _:
                return self._record(value)

    def _elsewhere(self, value: Elsewhere) -> Any:
        """If it cannot be fetched, its error is written in its place."""
        try:
            return self.tree(value.load())
        except StorageError as error:
            return self.tree(error)

    def _record(self, value: Any) -> dict[str, Any]:
        name = type(value).__name__
        if _records.get(name) is not type(value):
            raise TypeError(f"the ledger cannot hold a {type(value)!r}")
        return {_KIND: name, **{field: self.tree(getattr(value, field)) for field in _field_names(type(value))}}

    def _array(self, array: np.ndarray) -> dict[str, Any]:
        contiguous = np.ascontiguousarray(array)
        return {_KIND: "array", "d": array.dtype.str, "s": list(array.shape), "b": self._keep(contiguous.tobytes())}

    def _tensor(self, tensor: TensorData) -> dict[str, Any]:
        indices = tensor.csr_indices
        tree: dict[str, Any] = {_KIND: "tensor", "v": self._array(tensor.flat), "d": tensor.dtype, "s": tensor.shape}
        if indices is not None:
            tree["i"] = [self._array(part) for part in indices]
        return tree

    def _keep(self, data: bytes) -> list[int]:
        start = self._offset
        self._arrays.append(data)
        self._offset += len(data)
        return [start, len(data)]


class _Reader:
    def __init__(self, arrays: memoryview) -> None:
        self._arrays = arrays

    def value(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.value(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        match tree[_KIND]:
            case "int":
                return int(tree["v"])
            case "float":
                return float(tree["v"])
            case "tuple":
                return tuple(self.value(item) for item in tree["v"])
            case "bytes":
                return self._bytes(tree["b"])
            case "array":
                return self._array(tree)
            case "tensor":
                indices = [self._array(part) for part in tree.get("i", [])]
                return TensorData(self._array(tree["v"]), tree["d"], tree["s"], *indices)
            case "text":
                return datum.EncodedTextChunk.model_construct(tokens=self._array(tree["t"]).tolist())
            case "error":
                return _error(tree)
            case "slice":
                return slice(*(self.value(part) for part in tree["v"]))
            case "ellipsis":
                return ...
            case "map":
                return {self.value(k): self.value(v) for k, v in tree["v"]}
            case name:
                return self._record(_records[name], tree)

    def _record(self, record: type[Any], tree: dict[str, Any]) -> Any:
        fields = {name: self.value(part) for name, part in tree.items() if name != _KIND}
        return record.model_construct(**fields) if issubclass(record, BaseModel) else record(**fields)

    def _array(self, tree: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(self._bytes(tree["b"]), dtype=np.dtype(tree["d"])).reshape(tree["s"])

    def _bytes(self, place: list[int]) -> bytes:
        start, length = place
        if start + length > len(self._arrays):
            raise ValueError(f"{start + length} bytes of arrays are needed, {len(self._arrays)} are there")
        return bytes(self._arrays[start : start + length])


def _field_names(record: type[Any]) -> list[str]:
    if issubclass(record, BaseModel):
        return list(record.model_fields)
    return [field.name for field in dataclasses.fields(record) if field.init]


def _error(tree: dict[str, Any]) -> TinsmithError:
    """Of the class it had, or the nearest above it that words alone make; of its family if this version does not know
    it."""
    known = {error.__name__: error for error in _family(TinsmithError)}
    family = UserError if tree["c"] == "user" else ServerError
    for ancestor in known.get(tree["n"], family).__mro__:
        if issubclass(ancestor, TinsmithError):
            with contextlib.suppress(TypeError):
                return ancestor(tree["m"])
    return family(tree["m"])


def _family(root: type[TinsmithError]) -> Iterator[type[TinsmithError]]:
    yield root
    for child in root.__subclasses__():
        yield from _family(child)
