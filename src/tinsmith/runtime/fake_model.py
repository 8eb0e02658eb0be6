"""What the fake engine computes: log-probabilities from hashes of tokens, samples from hashes of seeds."""

# N token position, K token of the best, V vocabulary

from __future__ import annotations

import numpy as np

from tinsmith.types.operations import Sample, TrainItem
from tinsmith.types.results import (
    DrawnToken,
    ForwardBackwardOutput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TopkLogprobs,
)
from tinsmith.types.tensor import TensorData


def forward(item: TrainItem, factor: float) -> ForwardBackwardOutput:
    outputs, loss, tokens, weight = [], 0.0, 0, 0.0
    for datum in item.data:
        inputs = {key: tensor.to_numpy() for key, tensor in datum.loss_fn_inputs.items()}
        previous, targets = datum.model_input.to_numpy(), inputs["target_tokens"]
        if targets.ndim == 2:
            previous = previous[:, None]
        logprobs = token_logprobs(previous, targets) * factor
        if item.loss_fn == "cross_entropy":
            loss -= float((logprobs * inputs["weights"]).sum())
            weight += float(inputs["weights"].sum())
        elif item.custom_loss is not None:  # whatever it computes: the fake has no torch
            loss -= float(logprobs.sum())
        else:
            loss -= float((np.exp(logprobs - inputs["logprobs"]) * inputs["advantages"]).sum())
        tokens += len(targets)
        outputs.append({"logprobs": TensorData.from_numpy(logprobs.astype(np.float32))})
    metrics = {"loss:sum": loss, "tokens:sum": float(tokens)}
    if item.loss_fn == "cross_entropy":
        metrics["weight:sum"] = weight
    return ForwardBackwardOutput("ArrayRecord", outputs, metrics)


def token_logprobs(previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """What the untrained fake gives `targets` after `previous`: between -6 and -1, float64, broadcast together."""
    return -(1.0 + 5.0 * _unit(previous.astype(np.uint64) * np.uint64(1_000_003) + targets.astype(np.uint64)))


def _unit(keys: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) from integers (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def draw_all(operation: Sample, factor: float, vocab_size: int) -> SampleResponse:
    prompt = operation.prompt
    sequences = [_draw(operation, index, factor, vocab_size) for index in range(operation.num_samples)]
    response = SampleResponse(sequences=sequences)
    first = 1 if operation.prompt_logprobs_last_n is None else len(prompt) - operation.prompt_logprobs_last_n
    if operation.prompt_logprobs:
        scored = token_logprobs(prompt[first - 1 : -1], prompt[first:]) * factor
        response.prompt_logprobs_np = np.concatenate([np.full(first, np.nan), scored]).astype(np.float32)
    if operation.topk_prompt_logprobs:
        topk = _topk(prompt[first - 1 : -1], operation.topk_prompt_logprobs, factor, vocab_size)
        unused = (first, operation.topk_prompt_logprobs)
        response.topk_prompt_logprobs_np = TopkLogprobs(
            np.concatenate([np.zeros(unused, dtype=np.int64), topk.token_ids]),
            np.concatenate([np.full(unused, TopkLogprobs.UNUSED_LOGPROB), topk.logprobs]).astype(np.float32),
        )
    if operation.target_prompt_logprobs is not None:
        response.target_prompt_logprobs = _score_targets(prompt, operation.target_prompt_logprobs, factor)
    if operation.prompt_alt_tokens_k:
        keys = np.arange((len(prompt) - 1) * operation.prompt_alt_tokens_k, dtype=np.uint64) + np.uint64(operation.seed)
        tokens = (_unit(keys) * vocab_size).astype(np.int64).reshape(len(prompt) - 1, -1)
        scores = token_logprobs(prompt[:-1, None], tokens) * factor
        response.prompt_alt_tokens = PromptAltTokens(TensorData.from_numpy(tokens), TensorData.from_numpy(scores))
    return response


def _score_targets(prompt: np.ndarray, asked: TensorData, factor: float) -> TensorData:
    """In the layout that was asked for."""
    indices, shape = asked.csr_indices, asked.shape
    assert shape is not None
    rows = np.repeat(np.arange(shape[0]), shape[1] if indices is None else np.diff(indices[0]))
    scores = np.where(asked.flat >= 0, token_logprobs(prompt[rows], asked.flat) * factor, 0.0)
    return TensorData(scores, "float32", shape, *(indices or (None, None)))


def _draw(operation: Sample, index: int, factor: float, vocab_size: int) -> SampledSequence:
    greedy = operation.temperature == 0
    salt = 0 if greedy else (operation.seed * 1009 + index * 9176 + 1) % 2**32
    previous, tokens, text = int(operation.prompt[-1]), [], ""
    stop_reason = "length"
    for position in range(operation.max_tokens):
        key = np.asarray([previous + 7919 * position + 104_729 * salt + int(1e6 * factor)], dtype=np.uint64)
        previous = int(_unit(key)[0] * vocab_size)
        tokens.append(previous)
        text += chr(97 + previous % 26)
        if previous in operation.stop_token_ids or any(text.endswith(stop) for stop in operation.stop_strings):
            stop_reason = "stop"
            break
    context = np.asarray([int(operation.prompt[-1]), *tokens[:-1]], dtype=np.int64)
    drawn = np.asarray(tokens, dtype=np.int64)
    sequence = SampledSequence(
        stop_reason="stop" if stop_reason == "stop" else "length",
        tokens_np=drawn,
        logprobs_np=(token_logprobs(context, drawn) * factor).astype(np.float32),
    )
    if operation.topk_sample_logprobs:
        sequence.topk_logprobs_np = _topk(context, operation.topk_sample_logprobs, factor, vocab_size)
    return sequence


def tokens_in_turn(response: SampleResponse) -> list[DrawnToken]:
    """As a continuous batch would draw them: all sequences advance together."""
    drawn = []
    for index, sequence in enumerate(response.sequences):
        tokens, logprobs = sequence.tokens, sequence.logprobs or []
        topk = sequence.topk_logprobs or [None] * len(tokens)
        for at, (token, logprob, row) in enumerate(zip(tokens, logprobs, topk, strict=True)):
            reason = sequence.stop_reason if at + 1 == len(tokens) else None
            one = DrawnToken(index=index, token=token, logprob=logprob, topk=tuple(row or ()), stop_reason=reason)
            drawn.append((at, one))
    return [one for _, one in sorted(drawn, key=lambda pair: pair[0])]


def _topk(previous: np.ndarray, k: int, factor: float, vocab_size: int) -> TopkLogprobs:
    logprobs_NV = token_logprobs(previous[:, None], np.arange(vocab_size)[None, :]) * factor
    ids_NK = np.argsort(-logprobs_NV, axis=1)[:, :k]
    return TopkLogprobs(ids_NK, np.take_along_axis(logprobs_NV, ids_NK, axis=1).astype(np.float32))
