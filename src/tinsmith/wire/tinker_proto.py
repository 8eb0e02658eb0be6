"""Canonical types to and from the protobuf messages of `tinker.proto`.

Decoders raise `WireError` for bytes that are no such message. They check form only (lengths of byte arrays, known
enums); whether the values make sense to a model is for the server to say.
"""

# D datum, N position, K alternative

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from tinsmith.types.datum import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
    PromptProvenanceSpan,
    ProvenanceSpan,
    SampledProvenanceSpan,
)
from tinsmith.types.errors import InvalidInput
from tinsmith.types.results import (
    ForwardBackwardOutput,
    LossFnOutput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    StopReason,
    TopkLogprobs,
)
from tinsmith.types.tensor import TensorData, TensorDtype
from tinsmith.wire import tinker_pb2 as pb

CONTENT_TYPE = "application/x-protobuf"


class WireError(InvalidInput, ValueError):
    """Bytes that are not the message they claim to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """A `forward_backward` body, decoded."""

    model_id: str
    seq_id: int | None
    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str]
    forward_only: bool


# ---- requests ----


def encode_train_request(request: TrainRequest) -> bytes:
    numbers = {k: float(v) for k, v in request.loss_fn_config.items() if not isinstance(v, str)}
    message = pb.ForwardBackwardRequest(
        model_id=request.model_id,
        seq_id=request.seq_id or 0,
        loss_fn=request.loss_fn,
        loss_fn_config=numbers,
        forward_only=request.forward_only,
        loss_fn_config_v2={
            k: pb.LossConfigValue(text=v) if isinstance(v, str) else pb.LossConfigValue(number=float(v))
            for k, v in request.loss_fn_config.items()
        },
    )
    for datum in request.data:
        _fill_datum(message.data.add(), datum)
    return message.SerializeToString()


def decode_train_request(body: bytes) -> TrainRequest:
    message = _parse(pb.ForwardBackwardRequest, body)
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        kind = value.WhichOneof("value")
        if kind is None:
            raise WireError(f"loss_fn_config_v2[{key!r}] holds neither a number nor a text")
        config[key] = getattr(value, kind)
    return TrainRequest(
        model_id=message.model_id,
        seq_id=message.seq_id,
        data=tuple(_datum(d, i) for i, d in enumerate(message.data)),
        loss_fn=message.loss_fn,
        loss_fn_config=config,
        forward_only=message.forward_only,
    )


def _fill_datum(message: pb.Datum, datum: Datum) -> None:
    """Messages are filled where they stand: one built apart is copied into its parent."""
    for chunk in datum.model_input.chunks:
        _fill_chunk(message.model_input.add(), chunk)
    for key, tensor in datum.loss_fn_inputs.items():
        _fill_tensor(message.loss_fn_inputs[key], tensor)
    message.model_input_spans.extend([_span_message(span) for span in datum.model_input_spans or ()])
    message.loss_fn_input_spans.extend([_span_message(span) for span in datum.loss_fn_input_spans or ()])


def _fill_chunk(message: pb.Chunk, chunk: ModelInputChunk) -> None:
    match chunk:
        case EncodedTextChunk():
            message.encoded_text.tokens = _int32_bytes(chunk.tokens)
        case ImageChunk():
            message.image.data, message.image.format = chunk.data, chunk.format
            if chunk.expected_tokens is not None:
                message.image.expected_tokens = chunk.expected_tokens
        case DmelChunk():
            message.dmel.dmel = chunk.dmel
        case _:
            raise InvalidInput(f"a {chunk.type!r} chunk cannot be trained on; send the picture itself as an ImageChunk")


def _span_message(span: ProvenanceSpan) -> pb.ProvenanceSpan:
    sequence_id, offset, length = span.sequence_id, span.offset, span.length
    if isinstance(span, PromptProvenanceSpan):
        prompt = pb.PromptProvenanceSpan(sequence_id=sequence_id, offset=offset, length=length)
        return pb.ProvenanceSpan(prompt_tokens=prompt)
    sampled = pb.SampledProvenanceSpan(sequence_id=sequence_id, offset=offset, length=length)
    return pb.ProvenanceSpan(sampled_tokens=sampled)


def _datum(message: pb.Datum, index: int) -> Datum:
    where = f"data[{index}]"
    inputs = {key: tensor_data(t, f"{where}.loss_fn_inputs[{key!r}]") for key, t in message.loss_fn_inputs.items()}
    chunks = [_chunk(c, f"{where}.model_input[{i}]") for i, c in enumerate(message.model_input)]
    spans = [_span(s) for s in message.model_input_spans] or None
    input_spans = [_span(s) for s in message.loss_fn_input_spans] or None
    try:
        return Datum(ModelInput.model_construct(chunks=chunks), inputs, spans, input_spans)
    except ValueError as error:
        raise WireError(f"{where}: {error}") from error


def _chunk(message: pb.Chunk, where: str) -> ModelInputChunk:
    match message.WhichOneof("chunk"):
        case "encoded_text":
            tokens = _array(message.encoded_text.tokens, "<i4", f"{where}.tokens").tolist()
            return EncodedTextChunk.model_construct(tokens=tokens)
        case "image":
            image = message.image
            if image.format not in ("png", "jpeg"):
                raise WireError(f"{where}.format must be 'png' or 'jpeg', not {image.format!r}")
            if image.HasField("override_dimensions"):
                raise WireError(
                    f"{where}.override_dimensions is not supported; send the picture at the size it should be"
                )
            expected = image.expected_tokens if image.HasField("expected_tokens") else None
            return ImageChunk(data=image.data, format=image.format, expected_tokens=expected)  # type: ignore[arg-type]
        case "dmel":
            return DmelChunk(dmel=message.dmel.dmel)
        case _:
            raise WireError(f"{where} is of a kind this server does not know")


def _span(message: pb.ProvenanceSpan) -> ProvenanceSpan:
    match message.WhichOneof("span"):
        case "prompt_tokens":
            s = message.prompt_tokens
            return PromptProvenanceSpan(sequence_id=s.sequence_id, offset=s.offset, length=s.length)
        case "sampled_tokens":
            t = message.sampled_tokens
            return SampledProvenanceSpan(sequence_id=t.sequence_id, offset=t.offset, length=t.length)
        case _:
            raise WireError("a provenance span names neither prompt nor sampled tokens")


# ---- tensors ----

_TENSOR_DTYPE = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64}
_STORED_DTYPE: dict[int, str] = {
    pb.DTYPE_FLOAT32: "<f4",
    pb.DTYPE_INT64: "<i8",
    pb.DTYPE_INT32: "<i4",
    pb.DTYPE_BFLOAT16: "<u2",
}


def tensor_message(tensor: TensorData) -> pb.Tensor:
    message = pb.Tensor()
    _fill_tensor(message, tensor)
    return message


def _fill_tensor(message: pb.Tensor, tensor: TensorData) -> None:
    message.dtype = _TENSOR_DTYPE[tensor.dtype]
    shape = tensor.shape
    message.shape.extend([len(tensor.flat)] if shape is None else shape)
    indices = tensor.csr_indices
    if indices is None:
        message.dense = tensor.flat.tobytes()
        return
    sparse = message.sparse_csr
    sparse.values = tensor.flat.tobytes()
    sparse.crow_indices, sparse.col_indices = (i.astype("<i8").tobytes() for i in indices)


def tensor_data(message: pb.Tensor, where: str) -> TensorData:
    """Densified only when read; a tensor without shape is one-dimensional."""
    shape = list(message.shape) or None
    encoding = message.WhichOneof("encoding")
    if encoding is None:
        raise WireError(f"{where} has no values")
    try:
        if encoding == "dense":
            values = _stored_values(message.dense, message.dtype, where)
            return TensorData(values, "float32" if values.dtype.kind == "f" else "int64", shape)
        csr = message.sparse_csr
        values = _stored_values(csr.values, message.dtype, where)
        crow = _array(csr.crow_indices, "<i8", f"{where}.crow_indices")
        col = _array(csr.col_indices, "<i8", f"{where}.col_indices")
        return TensorData(values, "float32" if values.dtype.kind == "f" else "int64", shape, crow, col)
    except WireError:
        raise
    except ValueError as error:
        raise WireError(f"{where}: {error}") from error


def _stored_values(data: bytes, dtype: int, where: str) -> np.ndarray:
    """Values of a wire dtype, widened to float32 or int64."""
    if dtype not in _STORED_DTYPE:
        raise WireError(f"{where}: dtype {dtype!r} is not one of FLOAT32, INT64, INT32, BFLOAT16")
    stored = _array(data, _STORED_DTYPE[dtype], where)
    if dtype == pb.DTYPE_BFLOAT16:
        return (stored.astype("<u4") << 16).view("<f4")
    return stored.astype("<i8") if dtype == pb.DTYPE_INT32 else stored


# ---- results ----


def encode_forward_backward_output(output: ForwardBackwardOutput) -> bytes:
    message = pb.ForwardBackwardOutput(
        loss_fn_output_type=output.loss_fn_output_type,
        loss_fn_outputs=[_array_record(group) for group in _uniform_groups(output.loss_fn_outputs)],
        metrics=output.metrics,
    )
    return message.SerializeToString()


def decode_forward_backward_output(body: bytes) -> ForwardBackwardOutput:
    message = _parse(pb.ForwardBackwardOutput, body)
    return ForwardBackwardOutput(
        loss_fn_output_type=message.loss_fn_output_type.rpartition(":")[2],
        loss_fn_outputs=[datum for record in message.loss_fn_outputs for datum in _record_datums(record)],
        metrics=dict(message.metrics),
    )


def _uniform_groups(outputs: Sequence[LossFnOutput]) -> Iterable[Sequence[LossFnOutput]]:
    """Runs of consecutive datums whose fields share names, dtypes and trailing shapes."""
    start, kind = 0, None
    for index, output in enumerate(outputs):
        this = tuple(sorted((name, t.dtype, tuple((t.shape or [0])[1:])) for name, t in output.items()))
        if kind is not None and this != kind:
            yield outputs[start:index]
            start = index
        kind = this
    if outputs:
        yield outputs[start:]


def _array_record(group: Sequence[LossFnOutput]) -> pb.ArrayRecord:
    return pb.ArrayRecord(
        type_tag="ArrayRecord",
        fields={name: _batched_tensor([output[name] for output in group]) for name in group[0]},
        num_datums=len(group),
    )


def _batched_tensor(tensors: Sequence[TensorData]) -> pb.BatchedTensor:
    arrays = [t.to_numpy() for t in tensors]
    offsets = np.concatenate([[0], np.cumsum([a.nbytes for a in arrays])]).astype("<i8")
    return pb.BatchedTensor(
        data=b"".join(a.tobytes() for a in arrays),
        offsets=offsets.tobytes(),
        dtype=_TENSOR_DTYPE[tensors[0].dtype],
        trailing_shape=arrays[0].shape[1:],
    )


def _record_datums(record: pb.ArrayRecord) -> list[LossFnOutput]:
    columns = {name: _split_batched(batched, name) for name, batched in record.fields.items()}
    num_datums = record.num_datums or (len(next(iter(columns.values()))) if columns else 0)
    for name, column in columns.items():
        if len(column) != num_datums:
            raise WireError(f"result field {name!r} has {len(column)} datums, not {num_datums}")
    return [{name: column[d] for name, column in columns.items()} for d in range(num_datums)]


def _split_batched(batched: pb.BatchedTensor, name: str) -> list[TensorData]:
    """One array for all datums; theirs are views of it."""
    values = _stored_values(batched.data, batched.dtype, name)
    offsets = _array(batched.offsets, "<i8", f"{name}.offsets").tolist()
    trailing = list(batched.trailing_shape)
    row = math.prod(trailing) * np.dtype(_STORED_DTYPE[batched.dtype]).itemsize
    if any(offset % row if row else offset for offset in offsets):
        raise WireError(f"{name}.offsets: not all are whole numbers of rows of {row} bytes")
    if offsets and not (offsets[0] >= 0 and offsets[-1] <= len(batched.data) and offsets == sorted(offsets)):
        raise WireError(f"{name}.offsets do not rise from 0 to {len(batched.data)}")
    dtype: TensorDtype = "float32" if values.dtype.kind == "f" else "int64"
    width = math.prod(trailing)
    rows = [offset // row if row else 0 for offset in offsets]
    return [
        TensorData.of_flat(values[start * width : end * width], dtype, [end - start, *trailing])
        for start, end in pairwise(rows)
    ]


def encode_sample_response(response: SampleResponse) -> bytes:
    message = pb.SampleResponse(
        sequences=[_sequence_message(sequence) for sequence in response.sequences],
        prompt_logprobs=_float32_bytes(response.prompt_logprobs_np),
        topk_prompt_logprobs=_topk_message(response.topk_prompt_logprobs_np),
        prompt_cache_hit_tokens=response.prompt_cache_hit_tokens,
    )
    if response.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(tensor_message(response.target_prompt_logprobs))
    if (alt := response.prompt_alt_tokens) is not None:
        pair = pb.PromptAltTokens(tokens=tensor_message(alt.tokens), logprobs=tensor_message(alt.logprobs))
        message.prompt_alt_tokens.CopyFrom(pair)
    return message.SerializeToString()


def decode_sample_response(body: bytes, sequence_ids: Sequence[str]) -> SampleResponse:
    """`sequence_ids` come from the submit reply, one per sequence; raises `WireError` if their number differs."""
    message = _parse(pb.SampleResponse, body)
    if len(sequence_ids) != len(message.sequences):
        raise WireError(f"{len(message.sequences)} sequences came back for {len(sequence_ids)} sequence ids")
    response = SampleResponse(
        sequences=[_sequence(s, i) for s, i in zip(message.sequences, sequence_ids, strict=True)],
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
    )
    if message.prompt_logprobs:
        response.prompt_logprobs_np = _array(message.prompt_logprobs, "<f4", "prompt_logprobs")
    if message.HasField("topk_prompt_logprobs"):
        response.topk_prompt_logprobs_np = _topk(message.topk_prompt_logprobs)
    if message.HasField("target_prompt_logprobs"):
        response.target_prompt_logprobs = tensor_data(message.target_prompt_logprobs, "target_prompt_logprobs")
    if message.HasField("prompt_alt_tokens"):
        alt = message.prompt_alt_tokens
        response.prompt_alt_tokens = PromptAltTokens(
            tokens=tensor_data(alt.tokens, "prompt_alt_tokens.tokens"),
            logprobs=tensor_data(alt.logprobs, "prompt_alt_tokens.logprobs"),
        )
    return response


_STOP_REASON: dict[StopReason, int] = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}
_STOP_REASON_NAME: dict[int, StopReason] = {number: name for name, number in _STOP_REASON.items()}


def _sequence_message(sequence: SampledSequence) -> pb.SampledSequence:
    return pb.SampledSequence(
        stop_reason=_STOP_REASON[sequence.stop_reason],  # type: ignore[arg-type]
        tokens=_int32_bytes(sequence.tokens_np if sequence.tokens_np is not None else ()),
        logprobs=_float32_bytes(sequence.logprobs_np),
        topk_sampled_logprobs=_topk_message(sequence.topk_logprobs_np),
    )


def _sequence(message: pb.SampledSequence, sequence_id: str) -> SampledSequence:
    if message.stop_reason not in _STOP_REASON_NAME:
        raise WireError(f"unknown stop reason {message.stop_reason!r}")
    return SampledSequence(
        stop_reason=_STOP_REASON_NAME[message.stop_reason],
        sequence_id=sequence_id,
        tokens_np=_array(message.tokens, "<i4", "tokens"),
        logprobs_np=_array(message.logprobs, "<f4", "logprobs") if message.logprobs else None,
        topk_logprobs_np=_topk(message.topk_sampled_logprobs) if message.HasField("topk_sampled_logprobs") else None,
    )


def _topk_message(topk: TopkLogprobs | None) -> pb.TopkLogprobs | None:
    if topk is None:
        return None
    length, k = topk.token_ids.shape
    return pb.TopkLogprobs(
        token_ids=_int32_bytes(topk.token_ids), logprobs=_float32_bytes(topk.logprobs), k=k, length=length
    )


def _topk(message: pb.TopkLogprobs) -> TopkLogprobs | None:
    if message.k == 0 or message.length == 0:
        return None
    shape = (message.length, message.k)
    ids = _array(message.token_ids, "<i4", "topk.token_ids")
    logprobs = _array(message.logprobs, "<f4", "topk.logprobs")
    if len(ids) != len(logprobs) or len(ids) != shape[0] * shape[1]:
        raise WireError(f"top-k table of {len(ids)} ids and {len(logprobs)} log-probs does not fill {shape!r}")
    return TopkLogprobs(ids.reshape(shape), logprobs.reshape(shape))


# ---- bytes ----


def _parse(message_type: Any, body: bytes) -> Any:
    try:
        return message_type.FromString(body)
    except DecodeError as error:
        raise WireError(f"{len(body)} bytes are no {message_type.DESCRIPTOR.name} message: {error}") from error


def _array(data: bytes, dtype: str, where: str) -> np.ndarray:
    if len(data) % np.dtype(dtype).itemsize:
        raise WireError(f"{where}: {len(data)} bytes are no whole number of {np.dtype(dtype).name} values")
    return np.frombuffer(data, dtype=dtype)


def _int32_bytes(values: Any) -> bytes:
    if isinstance(values, list | tuple):
        try:
            return struct.pack(f"<{len(values)}i", *values)
        except struct.error:
            pass  # found and named below
    array = np.asarray(values)
    if array.size and (array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min):
        raise InvalidInput(f"token id {int(array.max())} does not fit in 32 bits")
    return array.astype("<i4").tobytes()


def _float32_bytes(values: np.ndarray | None) -> bytes | None:
    return None if values is None else values.astype("<f4").tobytes()
