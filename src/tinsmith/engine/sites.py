"""Which linear layers and experts of a model adapters can attach to."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tinsmith.engine.experts import LoraExperts, can_adapt, expert_sites, is_experts
from tinsmith.engine.lora import LoraSite
from tinsmith.engine.lora_linear import LoraLinear, LoraRouter
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.operations import LoraSpec

_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention)\.[^.]+$")
_MLP = re.compile(
    r"(^|\.)((mlp|feed_forward|ffn|block_sparse_moe|shared_experts?|shared_mlp)\.([^.]+\.)*|(layers|h)\.\d+\.)"
    r"([a-z_]*proj|fc_?(\d|in|out)|dense_h_to_4h|dense_4h_to_h|c_fc|w\d|W[io]|[a-z]+_linear)$"
)
_GROUP_NAMES = {"attn": "attention", "mlp": "MLP", "unembed": "unembedding"}

_logger = logging.getLogger("tinsmith.engine")


def group_of(name: str) -> str | None:
    """`attn` or `mlp` by the module path of a linear layer, `None` if adapters do not attach there."""
    if _ATTENTION.search(name):
        return "attn"
    return "mlp" if _MLP.search(name) else None


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[Mapping[str, set[int]]]:
    """While open, notes for every linear layer the numbers of rows it is called with."""
    rows: dict[str, set[int]] = defaultdict(set)

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs:
                rows[name].add(inputs[0].numel() // inputs[0].shape[-1])

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def open_sites(
    model: PreTrainedModel, router: LoraRouter, rows: Mapping[str, set[int]], num_rows: int
) -> tuple[LoraSite, ...]:
    """Open every targeted linear layer and expert; returns the sites in module order, the unembedding last.

    `rows` are what the model's own pass over `num_rows` tokens showed: only linear layers that see all of them qualify.
    If the routed experts of a mixture are not ours to adapt, none of its MLPs is: an adapter on the dense rest alone
    would leave most of what `train_mlp` means untrained, in a shape that PEFT reads as an adapter on the experts.
    Raises `Unsupported` if no attention projection qualifies.
    """
    head = model.get_output_embeddings()
    experts = {name: module for name, module in model.named_modules() if is_experts(name, module)}
    foreign = sorted({type(module).__name__ for module in experts.values() if not can_adapt(module)})
    if foreign:
        _logger.warning(
            "the MLPs of %s stay frozen: its routed experts (%s) are kept in a way that adapters cannot "
            "attach to; train_mlp is refused",
            type(model).__name__,
            ", ".join(foreign),
        )
    groups = {"attn"} if foreign else {"attn", "mlp"}
    sites: list[LoraSite] = []
    for name, module in list(model.named_modules()):
        if name in experts and not foreign:
            module.forward = LoraExperts(module, len(sites), router).forward
            sites.extend(expert_sites(name, module))
            continue
        group = group_of(name)
        if group not in groups or not isinstance(module, nn.Linear) or module is head or rows.get(name) != {num_rows}:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(module, len(sites), router))
        sites.append(LoraSite(name, group, module.in_features, module.out_features))
    if not any(site.group == "attn" for site in sites):
        raise Unsupported(
            f"{type(model).__name__} has no attention projections that adapters could attach to: they attach to "
            f"nn.Linear layers, and its attention has {_kinds_in_attention(model) or 'none'}"
        )
    if isinstance(head, nn.Linear):
        head_name = next(name for name, module in model.named_modules() if module is head)
        sites.append(LoraSite(head_name, "unembed", head.in_features, head.out_features))
    return tuple(sites)


def sites_in_words(sites: Sequence[LoraSite]) -> str:
    """What adapters attach to, for the log."""
    parts = []
    for group, what in _GROUP_NAMES.items():
        parts.append(f"{sum(site.group == group and site.num_experts is None for site in sites)} {what} layers")
    if stacks := [site for site in sites if site.num_experts is not None]:
        parts.append(f"{len(stacks)} stacks of {stacks[0].num_experts} routed experts")
    return ", ".join(parts)


def check_groups(sites: tuple[LoraSite, ...], spec: LoraSpec, architecture: str) -> None:
    """Raises `InvalidInput` if a group that is to be trained has no site: it would silently stay as it is."""
    for group, what in _GROUP_NAMES.items():
        if getattr(spec, f"train_{group}") and not any(site.group == group for site in sites):
            raise InvalidInput(
                f"lora_config.train_{group} is true, but {architecture} has no {what} layers that adapters can attach "
                f"to; set train_{group} to false"
            )


def _kinds_in_attention(model: nn.Module) -> str:
    kinds = {type(module).__name__ for name, module in model.named_modules() if _ATTENTION.search(name)}
    return ", ".join(sorted(kinds))
