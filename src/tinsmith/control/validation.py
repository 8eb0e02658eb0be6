"""Whether a request can work at all: checks of numbers against a base model, before an engine sees them.

Every error names the field, the position and the value. Nothing here changes a value but `sampling_operation`, which
fills in what the caller left open.
"""

# N token positions of one datum, K targets per position

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinsmith.control.pictures import check_picture
from tinsmith.control.prompt_scoring import (
    MAX_TARGETS_PER_POSITION,
    check_count,
    check_prompt_scoring,
    most_alternatives,
)
from tinsmith.control.requests import DrawSamples
from tinsmith.types.custom_loss import CustomLoss
from tinsmith.types.datum import Datum, EncodedTextChunk, ImageChunk, ModelInput, ProvenanceSpan
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.images import PlacedTokens, place_tokens
from tinsmith.types.operations import BaseModelCard, LoraSpec, Sample
from tinsmith.types.params import DEFAULT_LORA_ALPHA, AdamParams, LoraConfig
from tinsmith.types.shares import NOBODY, Payer
from tinsmith.types.tensor import TensorData

MAX_SAMPLES = 4096
TTL_SECONDS = (3600, 10 * 365 * 86400)
"""Shortest and longest life of a checkpoint that expires."""
_SEED_RANGE = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRule:
    """What one loss reads."""

    inputs: Mapping[str, str]
    """Name to dtype; all are required."""
    config: frozenset[str] = frozenset()
    per_token: frozenset[str] = frozenset()
    """Settings that a datum may give as float32 inputs, one value per token, where the config does not name them."""
    many_targets: bool = False
    """Whether targets may be `(N, K)`."""


_POLICY_INPUTS = {"target_tokens": "int64", "logprobs": "float32", "advantages": "float32"}
_CLIP = frozenset({"clip_low_threshold", "clip_high_threshold"})

LOSSES: dict[str, LossRule] = {
    "cross_entropy": LossRule(inputs={"target_tokens": "int64", "weights": "float32"}, many_targets=True),
    "importance_sampling": LossRule(inputs=_POLICY_INPUTS),
    "ppo": LossRule(inputs=_POLICY_INPUTS, config=_CLIP, per_token=_CLIP),
    "cispo": LossRule(inputs=_POLICY_INPUTS, config=_CLIP, per_token=_CLIP),
    "dro": LossRule(inputs=_POLICY_INPUTS, config=frozenset({"beta"})),
    "gspo": LossRule(inputs={**_POLICY_INPUTS, "sequence_ratio_mask": "float32"}, config=_CLIP, per_token=_CLIP),
}
_UNSUPPORTED_LOSSES = {"stable_reinforce": "its objective is not published; use 'importance_sampling'"}
_CLIP_DEFAULTS = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0), "gspo": (0.8, 1.2)}
"""Lower and upper bound of the ratio; for gspo our choice, for none are published."""
MAX_CUSTOM_INPUT = 2**24
"""Most values in one tensor that a custom loss reads."""


def check_training(
    data: Sequence[Datum],
    loss_fn: str,
    loss_fn_config: Mapping[str, float | str],
    card: BaseModelCard,
    custom_loss: CustomLoss | None = None,
) -> None:
    """`custom_loss` is the loss that a `loss_fn` of "custom" stands for. Raises `InvalidInput` or `Unsupported`."""
    rule = None
    if custom_loss is None:
        rule = _loss_rule(loss_fn)
        _check_loss_config(loss_fn, rule, loss_fn_config)
    if not data:
        raise InvalidInput("data is empty; a training request needs at least one datum")
    for index, datum in enumerate(data):
        if rule is not None:
            _check_datum(datum, f"data[{index}]", loss_fn, rule, loss_fn_config, card)
        elif custom_loss is not None:
            _check_custom_datum(datum, f"data[{index}]", custom_loss, card)


def _loss_rule(loss_fn: str) -> LossRule:
    if loss_fn in LOSSES:
        return LOSSES[loss_fn]
    if loss_fn == "custom":
        raise InvalidInput("loss_fn 'custom' needs a loss_fn_config['loss_id'], which create_custom_loss gives")
    supported = ", ".join([*LOSSES, "custom"])
    if loss_fn in _UNSUPPORTED_LOSSES:
        hint = _UNSUPPORTED_LOSSES[loss_fn]
        raise Unsupported(f"loss_fn {loss_fn!r} is not supported by this server: {hint}. Supported: {supported}")
    raise InvalidInput(f"loss_fn {loss_fn!r} is unknown. Supported: {supported}")


def _check_loss_config(loss_fn: str, rule: LossRule, config: Mapping[str, float | str]) -> None:
    for key, value in config.items():
        if key not in rule.config:
            allowed = ", ".join(sorted(rule.config)) or "no keys"
            raise InvalidInput(f"loss_fn_config[{key!r}] is unknown for {loss_fn!r}, which takes {allowed}")
        if isinstance(value, str | bool):
            raise InvalidInput(f"loss_fn_config[{key!r}] must be a number, not {value!r}")
        if not math.isfinite(value):
            raise InvalidInput(f"loss_fn_config[{key!r}] must be finite, not {value!r}")
        if value < 0:
            raise InvalidInput(f"loss_fn_config[{key!r}] must be at least 0, not {value!r}")
    if loss_fn in _CLIP_DEFAULTS:
        default_low, default_high = _CLIP_DEFAULTS[loss_fn]
        low = config.get("clip_low_threshold", default_low)
        high = config.get("clip_high_threshold", default_high)
        if float(low) > float(high):
            raise InvalidInput(
                f"loss_fn_config: clip_low_threshold {low!r} is above clip_high_threshold {high!r} for {loss_fn!r}"
            )


def _check_datum(
    datum: Datum,
    where: str,
    loss_fn: str,
    rule: LossRule,
    config: Mapping[str, float | str],
    card: BaseModelCard,
) -> None:
    num_tokens = len(check_tokens(datum.model_input, f"{where}.model_input", card))
    inputs = datum.loss_fn_inputs
    for key in rule.inputs:
        if key not in inputs:
            raise InvalidInput(
                f"{where}.loss_fn_inputs[{key!r}] is missing; {loss_fn!r} needs {', '.join(rule.inputs)}"
            )
    for key in inputs:
        if key not in rule.inputs and key not in rule.per_token:
            raise InvalidInput(
                f"{where}.loss_fn_inputs[{key!r}] is unknown for {loss_fn!r}, which takes "
                f"{', '.join([*rule.inputs, *sorted(rule.per_token)])}"
            )
    shape = _check_targets(
        inputs["target_tokens"], where, num_tokens, card, ranks=(1, 2) if rule.many_targets else (1,)
    )
    for key, tensor in inputs.items():
        if key != "target_tokens":
            _check_float_input(tensor, f"{where}.loss_fn_inputs[{key!r}]", "float32", shape)
    if rule.per_token & inputs.keys():
        _check_thresholds(inputs, where, config, _CLIP_DEFAULTS[loss_fn])
    if "sequence_ratio_mask" in inputs:
        _check_ratio_mask(inputs, where)
    _check_spans(datum, where, num_tokens)


def _check_thresholds(
    inputs: Mapping[str, TensorData], where: str, config: Mapping[str, float | str], defaults: tuple[float, float]
) -> None:
    """Of one datum: each bound from its input, else from the config, else the default."""
    bounds = []
    for key, default in zip(("clip_low_threshold", "clip_high_threshold"), defaults, strict=True):
        if key in inputs and key in config:
            raise InvalidInput(
                f"{where}.loss_fn_inputs[{key!r}] and loss_fn_config[{key!r}] are both given; give one of them"
            )
        scalar = np.full(len(inputs["target_tokens"].flat), config.get(key, default), dtype=np.float32)
        bound_N = inputs[key].flat if key in inputs else scalar
        for position in np.flatnonzero(bound_N < 0)[:1]:
            raise InvalidInput(
                f"{where}.loss_fn_inputs[{key!r}] is {float(bound_N[position])!r} at position {position}; "
                "must be at least 0"
            )
        bounds.append(bound_N)
    low_N, high_N = bounds
    for position in np.flatnonzero(low_N > high_N)[:1]:
        raise InvalidInput(
            f"{where}: clip_low_threshold {float(low_N[position]):g} is above clip_high_threshold "
            f"{float(high_N[position]):g} at position {position}"
        )


def _check_ratio_mask(inputs: Mapping[str, TensorData], where: str) -> None:
    if not inputs["sequence_ratio_mask"].flat.any() and inputs["advantages"].flat.any():
        raise InvalidInput(
            f"{where}.loss_fn_inputs['sequence_ratio_mask'] is 0 everywhere, so the sequence has no ratio, but "
            "advantages are not; mark the tokens the ratio is taken over"
        )


def _check_custom_datum(datum: Datum, where: str, loss: CustomLoss, card: BaseModelCard) -> None:
    """Values may be anything, NaN too: what they mean is the loss's affair. Other inputs may be there, unread."""
    num_tokens = len(check_tokens(datum.model_input, f"{where}.model_input", card))
    inputs = datum.loss_fn_inputs
    for loss_input in loss.inputs:
        key = "target_tokens" if loss_input.name == "logprobs" else loss_input.name
        if key not in inputs:
            raise InvalidInput(f"{where}.loss_fn_inputs[{key!r}] is missing; custom loss {loss.name!r} takes it")
        shape = tensor_shape(inputs[key])
        if inputs[key].shape is None and shape == (1,) and loss_input.rank == 0:
            shape = ()  # on the wire a scalar has no shape
        if len(shape) != loss_input.rank:
            raise InvalidInput(
                f"{where}.loss_fn_inputs[{key!r}] has shape {shape!r}, but custom loss {loss.name!r} takes "
                f"{loss_input.name} with {loss_input.rank} dimensions"
            )
        if math.prod(shape) > MAX_CUSTOM_INPUT:
            raise InvalidInput(
                f"{where}.loss_fn_inputs[{key!r}] of shape {shape!r} has more than {MAX_CUSTOM_INPUT} values, "
                "the most a custom loss reads"
            )
    _check_targets(inputs["target_tokens"], where, num_tokens, card, ranks=(loss.inputs[0].rank,))
    _check_spans(datum, where, num_tokens)


def check_tokens(model_input: ModelInput, where: str, card: BaseModelCard) -> PlacedTokens:
    """Raises `Unsupported` for chunks that the base model does not read, `InvalidInput` for ids out of range, pictures
    that cannot be read, and inputs that are empty or longer than the context.
    """
    for position, chunk in enumerate(model_input.chunks):
        if isinstance(chunk, ImageChunk) and card.images is not None:
            check_picture(chunk, f"{where}.chunks[{position}]")
        elif not isinstance(chunk, EncodedTextChunk):
            reads = "text only" if card.images is None else "text and images whose bytes are in the request"
            raise Unsupported(
                f"{where}.chunks[{position}] is of type {chunk.type!r}; base model {card.name!r} reads {reads}"
            )
    tokens = place_tokens(model_input, card.images, where)
    if len(tokens) == 0:
        raise InvalidInput(f"{where} is empty; it needs at least one token")
    if len(tokens) > card.max_context:
        raise InvalidInput(
            f"{where} has {len(tokens)} tokens; base model {card.name!r} takes at most {card.max_context}"
        )
    _check_ids(tokens.text_ids(), where, card, lambda flat: f"position {flat}")
    return tokens


def _check_ids(ids: np.ndarray, where: str, card: BaseModelCard, place: Callable[[int], str]) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= card.vocab_size):
        flat = int(np.flatnonzero((ids < 0) | (ids >= card.vocab_size))[0])
        raise InvalidInput(
            f"{where}: token {int(ids[flat])} at {place(flat)} is outside the vocabulary 0..{card.vocab_size - 1} "
            f"of {card.name!r}"
        )


def _check_targets(
    targets: TensorData, where: str, num_tokens: int, card: BaseModelCard, *, ranks: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of the targets, `(N,)` or `(N, K)`."""
    where = f"{where}.loss_fn_inputs['target_tokens']"
    shape = tensor_shape(targets)
    if targets.dtype != "int64":
        raise InvalidInput(f"{where} has dtype {targets.dtype!r}; it must be 'int64'")
    if len(shape) not in ranks:
        allowed = " or ".join({1: "(N,)", 2: "(N, K)"}[rank] for rank in ranks)
        raise InvalidInput(f"{where} has shape {shape!r}; it must be {allowed}")
    if shape[0] != num_tokens:
        raise InvalidInput(f"{where} has {shape[0]} rows, but model_input has {num_tokens} tokens")
    if len(shape) == 2 and not 1 <= shape[1] <= MAX_TARGETS_PER_POSITION:
        raise InvalidInput(f"{where} has {shape[1]} targets per position; 1 to {MAX_TARGETS_PER_POSITION} are allowed")
    _check_ids(targets.flat, where, card, lambda flat: _place(targets, shape, flat))
    return shape


def _check_float_input(tensor: TensorData, where: str, dtype: str, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise InvalidInput(f"{where} has dtype {tensor.dtype!r}; it must be {dtype!r}")
    if tensor_shape(tensor) != shape:
        raise InvalidInput(f"{where} has shape {tensor_shape(tensor)!r}; it must be that of target_tokens, {shape!r}")
    finite = np.isfinite(tensor.flat)
    if not finite.all():
        flat = int(np.flatnonzero(~finite)[0])
        raise InvalidInput(f"{where} is {float(tensor.flat[flat])!r} at {_place(tensor, shape, flat)}; must be finite")


def tensor_shape(tensor: TensorData) -> tuple[int, ...]:
    return (len(tensor.flat),) if tensor.shape is None else tuple(tensor.shape)


def _place(tensor: TensorData, shape: tuple[int, ...], flat: int) -> str:
    """Where the stored value `flat` lies in the dense tensor."""
    if tensor.csr_indices is not None:
        crow, col = tensor.csr_indices
        return f"position ({int(np.searchsorted(crow, flat, side='right')) - 1}, {int(col[flat])})"
    if len(shape) == 1:
        return f"position {flat}"
    return f"position {tuple(int(i) for i in np.unravel_index(flat, shape))}"


def _check_spans(datum: Datum, where: str, num_tokens: int) -> None:
    """Provenance is not used by the supported losses, but what is sent must be well formed."""
    for name in ("model_input_spans", "loss_fn_input_spans"):
        spans: Sequence[ProvenanceSpan] | None = getattr(datum, name)
        if not spans:
            continue
        for index, span in enumerate(spans):
            if not span.sequence_id or span.offset < 0 or span.length < 1:
                raise InvalidInput(
                    f"{where}.{name}[{index}] needs a sequence_id, an offset of at least 0 and a length of at least 1, "
                    f"not {span!r}"
                )
        covered = sum(span.length for span in spans)
        if covered != num_tokens:
            raise InvalidInput(f"{where}.{name} cover {covered} positions of {num_tokens}; they must tile all")


# ---- optimizer ----


def check_adam(params: AdamParams) -> None:
    """Raises `InvalidInput`."""
    for name, value in params.model_dump().items():
        if not math.isfinite(value):
            raise InvalidInput(f"adam_params.{name} must be finite, not {value!r}")
        if value < 0:
            raise InvalidInput(f"adam_params.{name} must be at least 0, not {value!r}")
    for name in ("beta1", "beta2"):
        if getattr(params, name) >= 1:
            raise InvalidInput(f"adam_params.{name} must be below 1, not {getattr(params, name)!r}")


def check_optimizer_type(optimizer_type: str) -> None:
    if optimizer_type != "adamw":
        raise Unsupported(f"optimizer_config.type {optimizer_type!r} is not supported; this server has 'adamw'")


# ---- adapters and checkpoints ----


def lora_spec(config: LoraConfig, alpha: float | None, card: BaseModelCard, draw_seed: Callable[[], int]) -> LoraSpec:
    """Raises `InvalidInput` for a shape the base model cannot take."""
    if not 1 <= config.rank <= card.max_rank:
        raise InvalidInput(
            f"lora_config.rank {config.rank} is outside 1..{card.max_rank}, which base model {card.name!r} takes"
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise InvalidInput(f"lora_config.alpha must be finite and above 0, not {alpha!r}")
    if alpha is not None and alpha / config.rank > float(np.finfo(np.float32).max):
        raise InvalidInput(f"lora_config.alpha {alpha!r} over rank {config.rank} is beyond fp32")
    spec = LoraSpec(
        rank=config.rank,
        seed=draw_seed() if config.seed is None else config.seed % _SEED_RANGE,
        alpha=DEFAULT_LORA_ALPHA if alpha is None else alpha,
        train_unembed=config.train_unembed,
        train_mlp=config.train_mlp,
        train_attn=config.train_attn,
    )
    check_adapter_memory(card, spec)
    return spec


def check_adapter_memory(card: BaseModelCard, spec: LoraSpec) -> None:
    """Raises `InvalidInput` for an adapter that does not fit into the memory for adapters even alone."""
    needed, budget = card.adapter_bytes(spec), card.adapter_memory_bytes
    if budget is not None and needed > budget:
        raise InvalidInput(
            f"an adapter of rank {spec.rank} on base model {card.name!r} takes {needed / 2**20:.1f} MiB, and this "
            f"server has {budget / 2**20:.1f} MiB for all of them; lower lora_config.rank, or start it with a larger "
            "--adapter-memory"
        )


def check_ttl(ttl_seconds: int | None) -> None:
    low, high = TTL_SECONDS
    if ttl_seconds is not None and not low <= ttl_seconds <= high:
        raise InvalidInput(f"ttl_seconds {ttl_seconds} is outside {low}..{high} (one hour to ten years)")


# ---- sampling ----


def sampling_operation(
    request: DrawSamples,
    card: BaseModelCard,
    snapshot_id: str | None,
    draw_seed: Callable[[], int],
    payer: Payer = NOBODY,
) -> Sample:
    """The engine's operation, with the open values filled in: seed, length, stop tokens.

    Raises `InvalidInput` or `Unsupported`.
    """
    prompt = check_tokens(request.prompt, "prompt", card)
    params = request.params
    check_count("num_samples", request.num_samples, 1, MAX_SAMPLES)
    check_count("topk_sample_logprobs", request.topk_sample_logprobs, 0, most_alternatives(card))
    check_prompt_scoring(request, len(prompt), card)
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise InvalidInput(f"sampling_params.temperature must be finite and at least 0, not {params.temperature!r}")
    if params.top_k != -1 and not 1 <= params.top_k <= card.vocab_size:
        raise InvalidInput(
            f"sampling_params.top_k must be -1 (off) or 1..{card.vocab_size}, the vocabulary of {card.name!r}, "
            f"not {params.top_k!r}"
        )
    if not 0 < params.top_p <= 1:
        raise InvalidInput(f"sampling_params.top_p must be above 0 and at most 1, not {params.top_p!r}")
    stop_token_ids, stop_strings = _stops(params.stop, card)
    more_stop_tokens, _ = _stops(request.more_stop_tokens, card)
    return Sample(
        prompt=prompt.ids_N,
        images=prompt.images,
        num_samples=request.num_samples,
        snapshot_id=snapshot_id,
        seed=draw_seed() if params.seed is None else params.seed % _SEED_RANGE,
        max_tokens=_max_tokens(params.max_tokens, len(prompt), card),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids + more_stop_tokens)),
        stop_strings=stop_strings,
        prompt_logprobs=request.prompt_logprobs,
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        target_prompt_logprobs=request.target_prompt_logprobs,
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        payer=payer,
    )


def _max_tokens(asked: int | None, prompt_length: int, card: BaseModelCard) -> int:
    room = card.max_context - prompt_length
    if asked is not None and asked < 1:
        raise InvalidInput(f"sampling_params.max_tokens must be at least 1, not {asked!r}")
    if room < 1:
        raise InvalidInput(
            f"prompt has {prompt_length} tokens and leaves no room in the context of {card.max_context} tokens "
            f"of {card.name!r}"
        )
    if asked is not None and asked > room:
        raise InvalidInput(
            f"prompt of {prompt_length} tokens and sampling_params.max_tokens {asked} exceed the context of "
            f"{card.max_context} tokens of {card.name!r}; ask for at most {room}"
        )
    return room if asked is None else asked


def _stops(stop: Any, card: BaseModelCard) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Token ids and strings that end a sequence."""
    if stop is None:
        return card.eos_token_ids, ()
    values = [stop] if isinstance(stop, str) else list(stop)
    tokens = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    strings = [value for value in values if isinstance(value, str)]
    if len(tokens) + len(strings) != len(values) or (tokens and strings):
        raise InvalidInput(
            f"sampling_params.stop must be a text, a list of texts, or a list of token ids, not {stop!r}"
        )
    for index, text in enumerate(strings):
        if not text:
            raise InvalidInput(f"sampling_params.stop[{index}] is an empty text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"sampling_params.stop[{index}] {text!r} holds half of a surrogate pair") from error
    for index, token in enumerate(tokens):
        if not 0 <= token < card.vocab_size:
            raise InvalidInput(
                f"sampling_params.stop[{index}]: token {token} is outside the vocabulary 0..{card.vocab_size - 1} "
                f"of {card.name!r}"
            )
    return tuple(tokens), tuple(strings)
