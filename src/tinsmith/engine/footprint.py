"""How much memory a base model will take, reckoned from its configuration before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from tinsmith.types.engine_options import EngineOptions
from tinsmith.types.errors import InvalidInput

_FP32 = 4
_ADAPTER_RANK = 32
"""One adapter of this rank is reckoned with, not on routed experts: those are checked when it is created."""
ADAPTER_COPIES = 4
"""Weights, gradients and two moments."""
_HOST_SHARE, _DEVICE_SHARE, _PARKED_SHARE = 0.5, 0.8, 0.4
"""Of free memory: for adapters in use on a CPU and on another device, and for those parked beside the latter."""
_LOGITS_BYTES = 2 * 2**24
"""What the loss head holds at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model's configuration decides about memory. Sizes are elements per token unless named otherwise."""

    num_parameters: int
    num_layers: int
    hidden: int
    mlp: int
    """Of all MLPs that one token passes in a layer."""
    num_chosen: int = 0
    """Routed experts that one token passes in a layer; each gets a copy of its row and returns one."""
    queries: int
    keys: int
    """Of one layer, all key heads."""
    values: int
    vocab: int

    @classmethod
    def of(cls, config: Any, num_parameters: int) -> ModelShape:
        """`config` is a transformers text configuration.

        Raises `AttributeError` or `TypeError` if it lacks the usual names: then nothing can be reckoned.
        """
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        query = key = value = head
        if getattr(config, "kv_lora_rank", None):  # multi-head latent attention, cached after its expansion
            query = key = config.qk_nope_head_dim + config.qk_rope_head_dim
            value, key_heads = config.v_head_dim, heads
        return cls(
            num_parameters=num_parameters,
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            mlp=_mlp_width(config),
            num_chosen=getattr(config, "num_experts_per_tok", None) or 0,
            queries=heads * query,
            keys=key_heads * key,
            values=key_heads * value,
            vocab=config.vocab_size,
        )

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one cached token takes over all layers."""
        return self.num_layers * (self.keys + self.values) * itemsize

    def layer_activation_bytes(self, itemsize: int) -> int:
        """Bytes per token that one layer keeps for its backward pass.

        Counted on Qwen3 and Llama layers: four tensors of each width, norms partly in fp32.
        """
        widths = (
            4 * self.mlp + 4 * self.queries + 3 * (self.keys + self.values) + (3 + 2 * self.num_chosen) * self.hidden
        )
        return widths * itemsize + 2 * self.hidden * _FP32

    def activation_bytes(self, num_tokens: int, itemsize: int, *, recomputed: bool) -> int:
        """Of one training pass. `recomputed`: layers keep only their input, and one layer at a time all it needs."""
        kept = self.hidden * itemsize if recomputed else self.layer_activation_bytes(itemsize)
        working = self.layer_activation_bytes(itemsize)
        return num_tokens * (self.num_layers * kept + working + 3 * self.hidden * _FP32) + _LOGITS_BYTES

    def tokens_kept_in(self, num_bytes: int, itemsize: int) -> int:
        """Length of the longest training pass whose activations, all kept, fit into so many bytes."""
        per_token = self.activation_bytes(1, itemsize, recomputed=False) - _LOGITS_BYTES
        return max(0, num_bytes - _LOGITS_BYTES) // per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes at full use of the limits in `EngineOptions`."""

    weights: int
    unembedding: int
    """Its fp32 copy beside weights of another dtype."""
    kv_cache: int
    activations: int
    """Of one training pass, the least it can do with."""
    adapter: int
    """Of all that are in use, where that is bounded; else of one."""

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def parts(self) -> str:
        named = ((part.name.replace("_", " "), getattr(self, part.name)) for part in fields(self))
        return ", ".join(f"{name} {in_words(size)}" for name, size in named)


def footprint(shape: ModelShape, options: EngineOptions, itemsize: int) -> Footprint:
    """`itemsize` is that of the base weights and activations, in bytes."""
    per_layer = 2 * shape.hidden + shape.queries + shape.keys + shape.values + 3 * (shape.hidden + shape.mlp)
    recomputed = options.gradient_checkpointing != "off"
    return Footprint(
        weights=shape.num_parameters * itemsize,
        unembedding=shape.vocab * shape.hidden * _FP32 if itemsize != _FP32 else 0,
        kv_cache=options.kv_cache_bytes,
        activations=shape.activation_bytes(options.max_micro_batch_tokens, itemsize, recomputed=recomputed),
        adapter=max(
            _ADAPTER_RANK * shape.num_layers * per_layer * _FP32 * ADAPTER_COPIES, options.adapter_memory_bytes or 0
        ),
    )


def adapter_memory(needed: Footprint, options: EngineOptions, free: int | None, *, is_host: bool) -> int | None:
    """Bytes for adapters in use once the base model is loaded: as asked, or a share of what is `free` beside a full
    cache and a training pass. `is_host`: the rest of the machine lives in the same memory."""
    if options.adapter_memory_bytes is not None or free is None:
        return options.adapter_memory_bytes
    share = _HOST_SHARE if is_host else _DEVICE_SHARE
    return max(needed.adapter, int(share * (free - needed.kv_cache - needed.activations)))


def host_adapter_memory(options: EngineOptions, free: int | None) -> int:
    """Bytes for parked adapters, where the device has a memory of its own."""
    if options.host_adapter_bytes is not None:
        return options.host_adapter_bytes
    return 0 if free is None else int(_PARKED_SHARE * free)


def check_fits(name: str, needed: Footprint, available: int | None, *, dtype: str, device: str) -> None:
    """Raises `InvalidInput` if the model does not fit. `None` for `available`: nobody knows, so it is tried."""
    if available is None or needed.total <= available:
        return
    raise InvalidInput(
        f"base model {name!r} needs about {in_words(needed.total)} on {device} in {dtype} ({needed.parts()}), but only "
        f"{in_words(available)} are free; " + "; ".join(_ways_out(needed, available, dtype))
    )


def check_adapter_fits(num_parameters: int, copies: int, available: int | None) -> None:
    """Raises `InvalidInput` if so many fp32 copies of an adapter do not fit: experts have a pair of matrices each."""
    needed = num_parameters * _FP32 * copies
    if available is not None and needed > available:
        raise InvalidInput(
            f"this adapter has {num_parameters / 1e6:.0f} M parameters and needs {in_words(needed)}, but only "
            f"{in_words(available)} are free; lower lora_config.rank, or set train_mlp to false on a mixture of experts"
        )


def in_words(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _ways_out(needed: Footprint, available: int, dtype: str) -> Iterator[str]:
    fixed = needed.weights + needed.unembedding + needed.adapter
    if dtype == "float32":
        yield "try --dtype bfloat16, which halves its weights"
    if fixed + needed.activations < available:
        yield "lower the option kv_cache_bytes"
    elif fixed < available:
        yield "lower the options kv_cache_bytes and max_micro_batch_tokens"
    yield "take a smaller model, or free memory"


def _mlp_width(config: Any) -> int:
    dense: int = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    chosen = getattr(config, "num_experts_per_tok", None)
    if not chosen:
        return dense
    routed: int = chosen * (getattr(config, "moe_intermediate_size", None) or dense)
    shared: int = getattr(config, "shared_expert_intermediate_size", None) or 0
    return max(dense, routed + shared)
