"""Adapters from elsewhere: a folder in PEFT's layout becomes weights of ours that compute the same.

Exact are: any rank up to the limit and any `lora_alpha` per module (rows are added that change nothing, B takes what
the scales differ by), rsLoRA, missing modules of a group (their B is zero), keys with and without PEFT's prefix.
What an adapter of ours cannot be is refused by name: DoRA, biases, embeddings, whole modules, changed base weights.
"""

# E expert, I in features, O out features, R rank, P all parameters of one adapter

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinsmith.engine.lora import LoraLayout, LoraSite, MatrixPair
from tinsmith.engine.peft_layout import PREFIX, wrapper
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.operations import LoraSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SEED = 0
"""Of the rows that are added: they change nothing until they are trained."""

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
_COPY = re.compile(r"(?P<module>[a-z_.]*(lm_head|embed_tokens))(\.base_layer)?\.weight")
_MAX_NAMED = 5
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_UNKNOWN_TO_US = {
    "use_dora": "DoRA scales whole weight rows",
    "lora_bias": "it has biases",
    "modules_to_save": "it replaces whole modules",
    "layer_replication": "it repeats layers of the base model",
    "trainable_token_indices": "it changes embeddings of tokens",
    "alora_invocation_tokens": "it is an activated LoRA, which works from a token on",
    "use_qalora": "QALoRA pools what goes into a layer",
    "arrow_config": "it is a router over adapters",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "KaSA adds singular values to it",
    "monteclora_config": "MonteCLoRA draws its weights",
}


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What a folder holds, read as far as no base model is needed."""

    config: Mapping[str, Any]
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    """A and B, fp32, by the path of what PEFT wrapped."""
    copies: Mapping[str, Tensor]
    """What is said to be the base model's own, by module."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A and B of one site in our shapes, `[*E, r, I]` and `[*E, r, O]`, and what their product is multiplied with."""

    pair: MatrixPair
    scale: float

    @property
    def rank(self) -> int:
        return self.pair.a_RI.shape[-2]


def import_adapter(
    folder: Path,
    sites: Sequence[LoraSite],
    make_layout: Callable[[LoraSpec], LoraLayout],
    base_weight: Callable[[str], Tensor | None],
) -> tuple[LoraLayout, Tensor]:
    """The layout and the weights `[P]`, fp32 on the CPU, of an adapter with the same effect.

    `base_weight` knows the base model's own weights by module: PEFT stores a copy of an unembedding that it adapts,
    and of embeddings that it thinks were changed.

    Raises `InvalidInput` for files that are damaged or do not fit `sites`, `Unsupported` for what adapters here cannot
    do, and what `make_layout` does about the shape.
    """
    adapter = read_peft(folder)
    _check_copies(adapter.copies, base_weight)
    placed = _place(adapter, sites)
    rank = max(one.rank for one in placed.values())
    scale = Counter(one.scale for one in placed.values()).most_common(1)[0][0]
    groups = {site.group for site in placed}
    spec = LoraSpec(
        rank=rank,
        seed=SEED,
        alpha=scale * rank,
        train_attn="attn" in groups,
        train_mlp="mlp" in groups,
        train_unembed="unembed" in groups,
    )
    layout = make_layout(spec)
    flat_P = layout.initial_weights(torch.device("cpu"))
    for site, pair in zip(layout.sites, layout.views(flat_P), strict=True):
        if pair is not None and (given := placed.get(site)) is not None:
            pair.a_RI[..., : given.rank, :] = given.pair.a_RI
            pair.b_RO[..., : given.rank, :] = given.pair.b_RO * (given.scale / scale)
    return layout, flat_P


def read_peft(folder: Path) -> PeftAdapter:
    """Raises `InvalidInput` or `Unsupported`."""
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    halves: dict[str, dict[str, Tensor]] = {}
    foreign: list[str] = []
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if (found := _KEY.fullmatch(key)) is not None:
            halves.setdefault(found["module"].removeprefix(PREFIX), {})[found["which"]] = tensor
        elif (copied := _COPY.fullmatch(key)) is not None:
            copies[copied["module"].removeprefix(PREFIX)] = tensor
        else:
            foreign.append(key)
    if foreign:
        raise Unsupported(f"{WEIGHTS} holds what adapters here cannot have: {_some(foreign)}")
    if not halves:
        raise InvalidInput(f"{WEIGHTS} holds no adapter: it has no tensors")
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise InvalidInput(f"{WEIGHTS} has lora_{next(iter(pair))} of {module!r} and not its other half")
    matrices = {module: (pair["A"], pair["B"]) for module, pair in halves.items()}
    return PeftAdapter(config, matrices, copies)


def _check_copies(copies: Mapping[str, Tensor], base_weight: Callable[[str], Tensor | None]) -> None:
    for module, tensor in copies.items():
        own = base_weight(module)
        if own is None or own.shape != tensor.shape or not torch.equal(own.cpu(), tensor.to(own.dtype)):
            raise Unsupported(
                f"{WEIGHTS} holds a weight of {module!r} that is not the base model's; adapters here change weights by "
                "low-rank matrices alone"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no {CONFIG}: an adapter in PEFT's layout has one") from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{CONFIG} must be a JSON object, not {type(config).__name__}")
    _check_config(config)
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise Unsupported(f"{CONFIG}: peft_type is {config.get('peft_type')!r}; adapters here are of type 'LORA'")
    for field, reason in _UNKNOWN_TO_US.items():
        if config.get(field):
            raise Unsupported(f"{CONFIG}: {field} is {config[field]!r}: {reason}, which adapters here cannot")
    if config.get("bias", "none") != "none":
        raise Unsupported(f"{CONFIG}: bias is {config['bias']!r}; adapters here have none")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise Unsupported(
            f"{CONFIG}: init_lora_weights is {start!r}, which changes the base weights too; convert the adapter with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first"
        )
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InvalidInput(f"{CONFIG}: {field} must be a number above 0, not {value!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise InvalidInput(f"{CONFIG}: {field} must be an object, not {config[field]!r}")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise Unsupported(
                "adapter_model.bin is a pickle, which can run code as it is read; save the adapter as safetensors"
            )
        raise InvalidInput(f"there is no {WEIGHTS}: an adapter in PEFT's layout has one")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                tensor = file.get_tensor(key)
                if not tensor.is_floating_point():
                    raise InvalidInput(f"{key} in {WEIGHTS} holds {tensor.dtype}; expected floating point numbers")
                tensors[key] = tensor.float()
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{WEIGHTS} cannot be read: {error}") from error
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InvalidInput(f"{key} in {WEIGHTS} holds numbers that are not finite")
    return tensors


def _place(adapter: PeftAdapter, sites: Sequence[LoraSite]) -> dict[LoraSite, _Placed]:
    """Every matrix at its site. Raises `InvalidInput` naming modules that this base model has no site for."""
    by_module: dict[str, list[LoraSite]] = {}
    for site in sites:
        for name in {site.name, wrapper(site), _plain(site)}:
            by_module.setdefault(name, []).append(site)
    unknown = [module for module in adapter.matrices if module not in by_module]
    if unknown:
        raise Unsupported(
            f"the adapter has matrices for {_some(unknown)}, where adapters of this base model cannot attach; they "
            f"attach to {_some(sorted({_kind(site.name) for site in sites}))}"
        )
    placed = {}
    for module, (a, b) in adapter.matrices.items():
        fitting = [site for site in by_module[module] if _fits(site, a, b)]
        if not fitting:
            site = by_module[module][0]
            raise InvalidInput(
                f"the matrices of {module!r} have shapes {tuple(a.shape)} and {tuple(b.shape)}; this base model takes "
                f"{site.num_in} to {site.num_out} there{_experts(site)}: the adapter belongs to another one"
            )
        pair = _ours(fitting[0], a, b)
        placed[fitting[0]] = _Placed(pair, _scale(adapter.config, fitting[0].name, module, pair.a_RI.shape[-2]))
    return placed


def _plain(site: LoraSite) -> str:
    """Of an adapter on one parameter of a module of experts alone, PEFT wraps the module once."""
    return site.name.rpartition(".")[0] if site.num_experts is not None else site.name


def _fits(site: LoraSite, a: Tensor, b: Tensor) -> bool:
    experts = site.num_experts or 1
    return (
        a.ndim == b.ndim == 2
        and (a.shape[1], b.shape[0]) == (site.num_in, site.num_out)
        and a.shape[0] == b.shape[1]
        and a.shape[0] >= experts
        and a.shape[0] % experts == 0
    )


def _ours(site: LoraSite, a: Tensor, b: Tensor) -> MatrixPair:
    """PEFT: A `[E * R, I]`, B `[O, R * E]`."""
    if site.num_experts is None:
        return MatrixPair(a, b.mT)
    rank = a.shape[0] // site.num_experts
    return MatrixPair(
        a.view(site.num_experts, rank, site.num_in),
        b.reshape(site.num_out, rank, site.num_experts).permute(2, 1, 0),
    )


def _scale(config: Mapping[str, Any], name: str, module: str, rank: int) -> float:
    """What PEFT multiplies B A with. Raises `InvalidInput` if the rank is not what the config says."""
    said = _pattern(config.get("rank_pattern") or {}, name, module, config["r"])
    if said != rank:
        raise InvalidInput(f"the matrices of {module!r} have rank {rank}; {CONFIG} says {said}")
    alpha = _pattern(config.get("alpha_pattern") or {}, name, module, config["lora_alpha"])
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise InvalidInput(f"{CONFIG}: alpha of {module!r} must be above 0, not {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """As PEFT reads its patterns: the first that the end of the path matches."""
    for pattern, value in patterns.items():
        try:
            if any(re.fullmatch(rf"(.*\.)?({pattern})", path) for path in (name, module)):
                return value
        except re.error as error:
            raise InvalidInput(f"{CONFIG}: {pattern!r} is no pattern: {error}") from error
    return default


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _experts(site: LoraSite) -> str:
    return "" if site.num_experts is None else f", for each of {site.num_experts} experts"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
