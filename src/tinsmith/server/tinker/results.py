"""Outcomes of futures as the Tinker dialect writes them: protobuf or JSON for arrays, JSON for the rest."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from tinsmith.control.futures import Outcome
from tinsmith.types.results import ForwardBackwardOutput, SampleResponse, TopkLogprobs
from tinsmith.types.tensor import TensorData
from tinsmith.wire.tinker_proto import CONTENT_TYPE as PROTOBUF
from tinsmith.wire.tinker_proto import encode_forward_backward_output, encode_sample_response

JSON = "application/json"
logger = logging.getLogger(__name__)


def encode_result(outcome: Outcome, accept: str) -> tuple[str, bytes]:
    """Content type and body of a finished, successful future; encoded once and kept with it.

    `accept` is the request's `Accept` header: arrays go out as protobuf where it names that, else as JSON.
    """
    is_array = isinstance(outcome.result, (ForwardBackwardOutput, SampleResponse))
    content_type = PROTOBUF if is_array and PROTOBUF in accept else JSON
    body = outcome.encoded.get(content_type)
    if body is None:
        body = _protobuf(outcome.result) if content_type == PROTOBUF else orjson.dumps(_json(outcome))
        outcome.encoded[content_type] = body
    return content_type, body


def encode_failure(outcome: Outcome) -> bytes:
    assert outcome.error is not None
    return orjson.dumps({"error": outcome.error.message or repr(outcome.error), "category": outcome.error.category})


def _protobuf(result: Any) -> bytes:
    if isinstance(result, SampleResponse):
        return encode_sample_response(result)
    return encode_forward_backward_output(result)


def _json(outcome: Outcome) -> dict[str, Any]:
    result = outcome.result
    match outcome.request_type:
        case "CreateModel":
            return {"model_id": result, "type": "create_model"}
        case "CreateCustomLoss":
            return {"loss_id": result, "type": "create_custom_loss"}
        case "ForwardBackward":
            return _forward_backward(result)
        case "OptimStep":
            return {"metrics": _finite(result)}
        case "SaveWeights":
            return {"path": result, "type": "save_weights"}
        case "SaveWeightsForSampler":
            fields = {"path": result.path, "sampling_session_id": result.sampling_session_id}
            return {key: value for key, value in fields.items() if value is not None} | {
                "type": "save_weights_for_sampler"
            }
        case "SaveWeightsExternal":
            return {"path": result.path, "size_bytes": result.size_bytes, "type": "save_weights_external"}
        case "LoadWeights":
            return {**result.model_dump(exclude_none=True), "type": "load_weights"}
        case "Sample":
            return _sample_response(result)
        case "UnloadModel":
            return {"type": "unload_model"} | ({"model_id": result} if isinstance(result, str) else {})
        case _:
            raise AssertionError(f"no JSON form for {outcome.request_type!r}")


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN, and clients refuse null for a number; such metrics are left out and logged."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if len(finite) < len(metrics):
        logger.warning("metrics that are not finite were left out: %s", sorted(metrics.keys() - finite.keys()))
    return finite


def _forward_backward(output: ForwardBackwardOutput) -> dict[str, Any]:
    return {
        "loss_fn_output_type": output.loss_fn_output_type,
        "loss_fn_outputs": [{k: _tensor(v) for k, v in datum.items()} for datum in output.loss_fn_outputs],
        "metrics": _finite(output.metrics),
    }


def _tensor(tensor: TensorData) -> dict[str, Any]:
    dense = tensor.to_numpy()
    return {"data": dense.reshape(-1).tolist(), "dtype": tensor.dtype, "shape": list(dense.shape)}


def _sample_response(response: SampleResponse) -> dict[str, Any]:
    targets, alternatives = response.target_prompt_logprobs, response.prompt_alt_tokens
    return {
        "sequences": [
            {
                "stop_reason": sequence.stop_reason,
                "tokens": sequence.tokens,
                "logprobs": sequence.logprobs,
                "topk_logprobs": _topk(sequence.topk_logprobs_np),
            }
            for sequence in response.sequences
        ],
        "prompt_logprobs": _nan_is_null(response.prompt_logprobs_np),
        "topk_prompt_logprobs": _topk(response.topk_prompt_logprobs_np),
        "target_prompt_logprobs": None if targets is None else targets.model_dump(),
        "prompt_alt_tokens": None
        if alternatives is None
        else {"tokens": alternatives.tokens.model_dump(), "logprobs": alternatives.logprobs.model_dump()},
        "prompt_cache_hit_tokens": response.prompt_cache_hit_tokens,
        "type": "sample",
    }


def _nan_is_null(values: np.ndarray | None) -> list[float | None] | None:
    return None if values is None else [None if value != value else value for value in values.tolist()]


def _topk(topk: TopkLogprobs | None) -> list[list[tuple[int, float]] | None] | None:
    return None if topk is None else topk.rows()
