"""How PEFT names, shapes and describes what an adapter holds."""

# E expert, I in features, O out features, R rank

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from tinsmith.engine.lora import LoraLayout, LoraSite

PREFIX = "base_model.model."
NESTED = "gate_up_proj"
"""Of the two parameters of a module of experts, the one whose wrapper lies inside the other's."""


def peft_tensors(layout: LoraLayout, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`(name, matrix)` as PEFT stores them: A `[R, I]`, B `[O, R]`; of E experts `[E * R, I]` and `[O, R * E]`."""
    for name, view in peft_views(layout, flat_P):
        yield name, view.reshape(-1, view.shape[-1]) if name.endswith("A.weight") else view.flatten(1).contiguous()


def peft_views(layout: LoraLayout, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same elements in the same order as views into `flat_P`: those of experts are `[E, R, I]` and `[O, R, E]`."""
    for site, pair in zip(layout.sites, layout.views(flat_P), strict=True):
        if pair is None:
            continue
        module = f"{PREFIX}{wrapper(site)}"
        yield f"{module}.lora_A.weight", pair.a_RI
        yield f"{module}.lora_B.weight", pair.b_RO.mT if site.num_experts is None else pair.b_RO.permute(2, 1, 0)


def peft_config(layout: LoraLayout, base_model: str, other_modules: Sequence[str]) -> bytes:
    """The content of `adapter_config.json`. `other_modules` are the base model's paths beside its adapter sites."""
    spec = layout.spec
    modules, parameters = _targets(layout, other_modules)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": modules or None,
    }
    if parameters:
        config["target_parameters"] = parameters
    return json.dumps(config, indent=2).encode()


def wrapper(site: LoraSite) -> str:
    """PEFT wraps a module once per adapted parameter, the later wrapper around the earlier."""
    if site.num_experts is None:
        return site.name
    module, _, parameter = site.name.rpartition(".")
    return f"{module}.base_layer" if parameter == NESTED else module


def _targets(layout: LoraLayout, other_modules: Sequence[str]) -> tuple[list[str], list[str]]:
    """`target_modules` and `target_parameters`.

    Modules by the last parts of their paths, as is customary; by full paths where a last part would also match what is
    not trained: PEFT takes a module if its path equals a target or ends with `.` and the target. The MLPs of a mixture
    are all named by parameter, dense ones too: PEFT would read `up_proj` among the modules as the routed experts.
    """
    trained = [site for site in layout.sites if layout.trains(site)]
    is_mixture = any(site.num_experts is not None for site in layout.sites)
    by_parameter = [site for site in trained if is_mixture and site.group == "mlp"]
    modules = [site.name for site in trained if site not in by_parameter]
    others = [site.name for site in layout.sites if site.name not in modules]
    leaves = {_leaf(name) for name in modules}
    shared = leaves & {_leaf(name) for name in (*others, *other_modules)}
    parameters = [site.name if site.num_experts is not None else f"{site.name}.weight" for site in by_parameter]
    return sorted(modules if shared else leaves), sorted(parameters)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
