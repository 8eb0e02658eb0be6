"""Bodies of the Tinker dialect to the requests that control takes."""

# N token position

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from tinsmith.control import requests as ask
from tinsmith.server.errors import brief, explain
from tinsmith.server.tinker.loss_graphs import read_custom_loss
from tinsmith.server.tinker.schemas import (
    OFF,
    Body,
    CreateCustomLossBody,
    CreateModelBody,
    LoadIntoModelBody,
    LoadNewModelBody,
    OptimStepBody,
    SampleBody,
    SaveWeightsBody,
    SaveWeightsExternalBody,
    SaveWeightsForSamplerBody,
    TrainBody,
    UnloadBody,
)
from tinsmith.types.datum import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
)
from tinsmith.types.errors import InvalidInput, TinsmithError, Unsupported
from tinsmith.types.params import AdamParams, LoraConfig, SamplingParams
from tinsmith.types.tensor import TensorData
from tinsmith.wire.tinker_proto import decode_train_request

BodyT = TypeVar("BodyT", bound=Body)


def read(schema: type[BodyT], payload: Mapping[str, Any]) -> BodyT:
    """Raises `InvalidInput` naming each bad field and its value."""
    try:
        return schema.model_validate(payload)
    except ValidationError as error:
        raise InvalidInput(explain(error)) from error


# ---- training ----


def train_from_protobuf(body: bytes) -> ask.ForwardBackward:
    try:
        request = decode_train_request(body)
    except TinsmithError:
        raise
    except ValueError as error:
        raise InvalidInput(f"the request cannot be read: {error}") from error
    if not request.model_id or not request.seq_id:
        raise InvalidInput("the body is no ForwardBackwardRequest: model_id or seq_id is missing")
    return ask.ForwardBackward(
        model_id=request.model_id,
        seq_id=request.seq_id,
        data=request.data,
        loss_fn=request.loss_fn,
        loss_fn_config=request.loss_fn_config,
        forward_only=request.forward_only,
    )


def train_from_json(payload: Mapping[str, Any], *, forward_only: bool) -> ask.ForwardBackward:
    body = read(TrainBody, payload)
    given = body.forward_input if forward_only else body.forward_backward_input
    if given is None:
        name = "forward_input" if forward_only else "forward_backward_input"
        raise InvalidInput(f"{name} is missing; a JSON body holds the data there (a protobuf body is better)")
    return ask.ForwardBackward(
        model_id=body.model_id,
        seq_id=body.seq_id,
        data=tuple(_datum(value, f"data[{index}]") for index, value in enumerate(given.data)),
        loss_fn=given.loss_fn,
        loss_fn_config=given.loss_fn_config,
        forward_only=forward_only,
    )


def optim_step(payload: Mapping[str, Any]) -> ask.ApplyOptimizer:
    body = read(OptimStepBody, payload)
    if body.optimizer_params is not None:
        family = body.optimizer_params.get("type")
        raise Unsupported(f"optimizer_params.type {family!r} is not supported; send adam_params (AdamW)")
    if body.adam_params is None:
        raise InvalidInput("adam_params is missing")
    params = AdamParams(**{name: getattr(body.adam_params, name) for name in AdamParams.model_fields})
    return ask.ApplyOptimizer(model_id=body.model_id, seq_id=body.seq_id, params=params)


def save_weights(payload: Mapping[str, Any]) -> ask.SaveState:
    body = read(SaveWeightsBody, payload)
    return ask.SaveState(
        model_id=body.model_id,
        seq_id=body.seq_id,
        name=body.path,
        overwrite=body.overwrite,
        ttl_seconds=body.ttl_seconds,
        user_metadata=body.user_metadata,
    )


def save_weights_for_sampler(payload: Mapping[str, Any]) -> ask.SaveForSampler:
    body = read(SaveWeightsForSamplerBody, payload)
    if (body.path is None) == (body.sampling_session_seq_id is None):
        raise InvalidInput("give either path (a named checkpoint) or sampling_session_seq_id (an unnamed sampler)")
    return ask.SaveForSampler(
        model_id=body.model_id,
        seq_id=body.seq_id,
        name=body.path,
        sampling_session_seq_id=body.sampling_session_seq_id,
        kind=body.kind,
        ttl_seconds=body.ttl_seconds,
        user_metadata=body.user_metadata,
    )


def save_weights_external(payload: Mapping[str, Any]) -> ask.SaveExternal:
    body = read(SaveWeightsExternalBody, payload)
    if body.age_encryption_recipients:
        raise Unsupported("age_encryption_recipients is not supported by this server; files are exported unencrypted")
    return ask.SaveExternal(model_id=body.model_id, seq_id=body.seq_id, name=body.path, ttl_seconds=body.ttl_seconds)


def load_into_model(payload: Mapping[str, Any]) -> ask.LoadState:
    body = read(LoadIntoModelBody, payload)
    return ask.LoadState(model_id=body.model_id, seq_id=body.seq_id, path=body.path, optimizer=body.optimizer)


def load_new_model(payload: Mapping[str, Any]) -> ask.CreateModelFromCheckpoint:
    body = read(LoadNewModelBody, payload)
    return ask.CreateModelFromCheckpoint(
        session_id=body.session_id,
        model_seq_id=body.model_seq_id,
        path=body.path,
        optimizer=body.optimizer,
        base_model=body.base_model,
        optimizer_type=body.optimizer_config.type,
        user_metadata=body.user_metadata,
    )


def unload_model(payload: Mapping[str, Any]) -> ask.UnloadModel:
    body = read(UnloadBody, payload)
    return ask.UnloadModel(model_id=body.model_id, seq_id=body.seq_id)


def create_custom_loss(payload: Mapping[str, Any]) -> ask.CreateCustomLoss:
    body = read(CreateCustomLossBody, payload)
    return ask.CreateCustomLoss(
        session_id=body.session_id,
        custom_loss_seq_id=body.custom_loss_seq_id,
        loss=read_custom_loss(body.name, body.inputs, body.graph),
    )


def create_model(body: CreateModelBody) -> ask.CreateModel:
    lora = body.lora_config
    return ask.CreateModel(
        session_id=body.session_id,
        model_seq_id=body.model_seq_id,
        base_model=body.base_model,
        lora_config=LoraConfig(**{name: getattr(lora, name) for name in LoraConfig.model_fields}),
        alpha=lora.alpha,
        optimizer_type=body.optimizer_config.type,
        user_metadata=body.user_metadata,
    )


# ---- sampling ----

_UNSUPPORTED_OF_SAMPLE = {
    "record_stability_info": "it serves the loss 'stable_reinforce', whose objective is not published; "
    "sample without it and train with 'importance_sampling'",
    "base_model": "sample through a sampling session, which create_sampling_session makes",
    "model_path": "sample through a sampling session, which create_sampling_session makes",
}


def sample(payload: Mapping[str, Any]) -> ask.DrawSamples:
    for name, instead in _UNSUPPORTED_OF_SAMPLE.items():
        if payload.get(name) not in OFF:
            raise Unsupported(f"{name} = {brief(payload[name])} is not supported by this server: {instead}")
    body = read(SampleBody, payload)
    params, targets = body.sampling_params, body.target_prompt_logprobs
    return ask.DrawSamples(
        sampling_session_id=body.sampling_session_id,
        seq_id=body.seq_id,
        prompt=_model_input(body.prompt, "prompt"),
        num_samples=body.num_samples,
        params=SamplingParams.model_construct(**{name: getattr(params, name) for name in SamplingParams.model_fields}),
        prompt_logprobs=body.prompt_logprobs,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        target_prompt_logprobs=None if targets is None else _tensor(targets, "target_prompt_logprobs"),
        prompt_alt_tokens_k=body.prompt_alt_tokens_k,
    )


# ---- data in JSON: checked by hand, for there is much of it ----


def _object(value: Any, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object whose other fields are off."""
    if not isinstance(value, dict):
        raise InvalidInput(f"{where} must be an object, not {brief(value)}")
    for name, item in value.items():
        if name not in known and name != "type" and item not in OFF:
            raise InvalidInput(f"{where}.{name} = {brief(item)} is not implemented by this server")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidInput(f"{where} must be a list, not {brief(value)}")
    return value


def _datum(value: Any, where: str) -> Datum:
    fields = _object(value, where, ("model_input", "loss_fn_inputs"))
    if "model_input" not in fields:
        raise InvalidInput(f"{where}.model_input is missing")
    inputs = fields.get("loss_fn_inputs") or {}
    if not isinstance(inputs, dict):
        raise InvalidInput(f"{where}.loss_fn_inputs must be an object, not {brief(inputs)}")
    return Datum(
        _model_input(fields["model_input"], f"{where}.model_input"),
        {key: _tensor(tensor, f"{where}.loss_fn_inputs[{key!r}]") for key, tensor in inputs.items()},
    )


def _model_input(value: Any, where: str) -> ModelInput:
    fields = _object(value, where, ("chunks",))
    chunks = _list(fields.get("chunks"), f"{where}.chunks")
    return ModelInput.model_construct(chunks=[_chunk(c, f"{where}.chunks[{i}]") for i, c in enumerate(chunks)])


_CHUNK_FIELDS: dict[str, tuple[str, ...]] = {
    "encoded_text": ("tokens",),
    "image": ("data", "format", "expected_tokens", "width", "height", "tokens"),  # the last three from older clients
    "image_asset_pointer": ("location", "format", "expected_tokens"),
    "dmel": ("dmel",),
}
_CHUNK_CLASS: dict[str, type[ImageChunk | ImageAssetPointerChunk | DmelChunk]] = {
    "image": ImageChunk,
    "image_asset_pointer": ImageAssetPointerChunk,
    "dmel": DmelChunk,
}


def _chunk(value: Any, where: str) -> ModelInputChunk:
    if not isinstance(value, dict):
        raise InvalidInput(f"{where} must be an object, not {brief(value)}")
    kind = value.get("type") or next((k for k, names in _CHUNK_FIELDS.items() if names[0] in value), None)
    if kind not in _CHUNK_FIELDS:
        raise InvalidInput(f"{where}.type must be one of {', '.join(_CHUNK_FIELDS)}, not {kind!r}")
    fields = _object(value, where, _CHUNK_FIELDS[kind])
    if kind == "encoded_text":
        return EncodedTextChunk.model_construct(tokens=_tokens(fields.get("tokens"), f"{where}.tokens"))
    try:
        given = {name: fields[name] for name in _CHUNK_FIELDS[kind] if fields.get(name) is not None}
        chunk: ModelInputChunk = _CHUNK_CLASS[kind].model_validate(given)
    except ValueError as error:
        text = explain(error) if isinstance(error, ValidationError) else str(error)
        raise InvalidInput(f"{where}: {text}") from error
    return chunk


def _tokens(value: Any, where: str) -> list[int]:
    tokens = _list(value, where)
    if not set(map(type, tokens)) <= {int}:
        position = next(i for i, token in enumerate(tokens) if type(token) is not int)
        raise InvalidInput(f"{where}[{position}] must be an integer, not {brief(tokens[position])}")
    if tokens and not (min(tokens) >= 0 and max(tokens) < 2**31):
        position = next(i for i, token in enumerate(tokens) if not 0 <= token < 2**31)
        raise InvalidInput(f"{where}[{position}] is no token id: {tokens[position]!r}")
    return tokens


def _tensor(value: Any, where: str) -> TensorData:
    names = ("data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices")
    fields = _object(value, where, names)
    dtype = fields.get("dtype")
    if dtype not in ("int64", "float32"):
        raise InvalidInput(f"{where}.dtype must be 'int64' or 'float32', not {brief(dtype)}")
    shape = fields.get("shape")
    try:
        return TensorData(
            _numbers(fields.get("data"), dtype, f"{where}.data"),
            dtype,
            None if shape is None else _sizes(shape, f"{where}.shape"),
            *(None if fields.get(n) is None else _numbers(fields[n], "int64", f"{where}.{n}") for n in names[3:]),
        )
    except TinsmithError:
        raise
    except ValueError as error:
        raise InvalidInput(f"{where}: {error}") from error


def _numbers(value: Any, dtype: str, where: str) -> np.ndarray:
    numbers = _list(value, where)
    allowed = {int} if dtype == "int64" else {int, float}
    if not set(map(type, numbers)) <= allowed:
        position = next(i for i, number in enumerate(numbers) if type(number) not in allowed)
        wanted = "an integer" if dtype == "int64" else "a number"
        raise InvalidInput(f"{where}[{position}] must be {wanted}, not {brief(numbers[position])}")
    try:
        return np.asarray(numbers, dtype=dtype)
    except OverflowError as error:
        raise InvalidInput(f"{where} holds a number that does not fit {dtype}: {error}") from error


def _sizes(value: Any, where: str) -> list[int]:
    sizes = _list(value, where)
    for position, size in enumerate(sizes):
        if type(size) is not int or not 0 <= size < 2**40:
            raise InvalidInput(f"{where}[{position}] must be a size, not {brief(size)}")
    return sizes
