"""Training and sampling as JSON: the wire of Tinker before protobuf, which other servers still speak.

Raises `WireError` for an answer that has not the shape it should.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tinsmith.types.results import (
    ForwardBackwardOutput,
    LossFnOutput,
    SampledSequence,
    SampleResponse,
    StopReason,
    TopkLogprobs,
)
from tinsmith.types.tensor import TensorData
from tinsmith.wire.tinker_proto import TrainRequest, WireError


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Output(_Loose):
    loss_fn_output_type: str = ""
    loss_fn_outputs: list[dict[str, Any]]
    metrics: dict[str, float] = {}


class _Sequence(_Loose):
    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float] | None = None


class _Response(_Loose):
    sequences: list[_Sequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None


_OUTPUT, _RESPONSE = TypeAdapter(_Output), TypeAdapter(_Response)


def encode_train_request_json(request: TrainRequest) -> bytes:
    """The body of `forward_backward`, or with `forward_only` of `forward`, without its sequence number."""
    pass_input = {
        "data": [
            {
                "model_input": datum.model_input.model_dump(mode="json", exclude_none=True),
                "loss_fn_inputs": {key: tensor.model_dump() for key, tensor in datum.loss_fn_inputs.items()},
            }
            for datum in request.data
        ],
        "loss_fn": request.loss_fn,
        "loss_fn_config": dict(request.loss_fn_config) or None,
    }
    name = "forward_input" if request.forward_only else "forward_backward_input"
    return json.dumps({"model_id": request.model_id, name: pass_input}, separators=(",", ":")).encode()


def with_seq_id(body: bytes, seq_id: int) -> bytes:
    """A JSON object, and its sequence number."""
    return body[:-1] + b',"seq_id":%d}' % seq_id


def decode_forward_backward_output_json(body: bytes) -> ForwardBackwardOutput:
    """`loss:sum` is the sum of `elementwise_loss` where the server reports only that."""
    output = _checked(_OUTPUT, body, "a training pass")
    datums = [_tensors(datum, index) for index, datum in enumerate(output.loss_fn_outputs)]
    metrics = dict(output.metrics)
    if "loss:sum" not in metrics and datums and all("elementwise_loss" in datum for datum in datums):
        metrics["loss:sum"] = float(sum(datum["elementwise_loss"].flat.sum(dtype=np.float64) for datum in datums))
    return ForwardBackwardOutput(output.loss_fn_output_type, datums, metrics)


def decode_sample_response_json(body: bytes, sequence_ids: Sequence[str]) -> SampleResponse:
    """Without `sequence_ids` the sequences have none."""
    response = _checked(_RESPONSE, body, "a sample")
    ids = sequence_ids or [""] * len(response.sequences)
    if len(ids) != len(response.sequences):
        raise WireError(f"the sample has {len(response.sequences)} sequences, not {len(ids)}")
    topk = response.topk_prompt_logprobs
    return SampleResponse(
        sequences=[
            SampledSequence(
                stop_reason=sequence.stop_reason,
                sequence_id=sequence_id,
                tokens_np=np.asarray(sequence.tokens, dtype=np.int32),
                logprobs_np=None if sequence.logprobs is None else np.asarray(sequence.logprobs, dtype=np.float32),
            )
            for sequence, sequence_id in zip(response.sequences, ids, strict=True)
        ],
        prompt_logprobs_np=_with_gaps(response.prompt_logprobs),
        topk_prompt_logprobs_np=None if topk is None else _topk(topk),
    )


def _with_gaps(logprobs: Sequence[float | None] | None) -> np.ndarray | None:
    if logprobs is None:
        return None
    return np.asarray([np.nan if value is None else value for value in logprobs], dtype=np.float32)


def _topk(rows: Sequence[Sequence[tuple[int, float]] | None]) -> TopkLogprobs:
    width = max((len(row) for row in rows if row), default=0)
    token_ids = np.zeros((len(rows), width), dtype=np.int32)
    logprobs = np.full((len(rows), width), TopkLogprobs.UNUSED_LOGPROB, dtype=np.float32)
    for index, row in enumerate(rows):
        for column, (token, logprob) in enumerate(row or ()):
            token_ids[index, column], logprobs[index, column] = token, logprob
    return TopkLogprobs(token_ids, logprobs)


def _tensors(datum: Mapping[str, Any], index: int) -> LossFnOutput:
    try:
        return {
            name: TensorData(value["data"], value.get("dtype"), value.get("shape")) for name, value in datum.items()
        }
    except (TypeError, KeyError, ValueError) as error:
        raise WireError(f"loss_fn_outputs[{index}] holds no arrays: {error!r}") from error


def _checked(adapter: TypeAdapter[Any], body: bytes, what: str) -> Any:
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        raise WireError(f"the result of {what} is not what it should be: {error}") from error
