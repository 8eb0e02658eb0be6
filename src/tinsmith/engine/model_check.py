"""Whether our packed pass computes what the model's own code computes: what it does not reproduce is refused."""

# T packed token, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tinsmith.engine.sites import counted_rows
from tinsmith.types.errors import Unsupported

CHECK_LENGTHS = (12, 5)
"""Two sequences: rows that see across their border, or count positions across it, are found out."""
_CHECK_WINDOW = 3
"""Sliding windows are narrowed to this, so that the check reaches beyond them."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest difference from the model's own logits, relative to their spread."""
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model's own code computes for `check_rows`, each sequence alone."""

    logits_TV: Tensor
    """fp32."""
    rows_seen: Mapping[str, set[int]]
    """Numbers of rows that each linear layer saw of the first sequence."""


def refuse_unknown_layers(config: PretrainedConfig, architecture: str) -> None:
    """Raises `Unsupported` for kinds of layers that our attention does not compute."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := sorted(kinds - _KNOWN_LAYERS):
        raise Unsupported(f"{architecture} has layers of kind {', '.join(unknown)}, which this engine cannot run")


def check_rows(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and positions `[T]` of both sequences, packed."""
    ids_T = torch.cat([torch.arange(n, device=device) * 7919 % vocab_size for n in CHECK_LENGTHS])
    return ids_T, torch.cat([torch.arange(n, device=device) for n in CHECK_LENGTHS])


@torch.inference_mode()
def reference_of(model: PreTrainedModel) -> Reference:
    """To be called under `narrow_windows`, before the model is changed in any way."""
    ids_T, _ = check_rows(model.config.get_text_config().vocab_size, model.device)
    first, *others = ids_T.split(CHECK_LENGTHS)
    with counted_rows(model) as rows:
        logits = [_own_logits(model, first)]
    logits.extend(_own_logits(model, ids) for ids in others)
    return Reference(torch.cat(logits), rows)


def compare(ours_TV: Tensor, own_TV: Tensor, dtype: torch.dtype, architecture: str) -> None:
    """Raises `Unsupported` if the logits differ by more than rounding."""
    worst = float((ours_TV - own_TV).abs().max() / own_TV.std().clamp_min(1e-6))
    if not worst <= _TOLERANCE[dtype]:
        raise Unsupported(
            f"{architecture} computes logits that this engine does not reproduce "
            f"(largest difference {worst:.3g} of their spread); the architecture is not supported"
        )


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Sliding windows of a few tokens, wherever an attention layer or its mask looks them up."""
    owners = [model.config.get_text_config(), *model.modules()]
    before = [(owner, owner.sliding_window) for owner in owners if isinstance(_window_of(owner), int)]
    try:
        for owner, _ in before:
            owner.sliding_window = _CHECK_WINDOW
        yield
    finally:
        for owner, window in before:
            owner.sliding_window = window


def _window_of(owner: object) -> object:
    return getattr(owner, "sliding_window", None)


def _own_logits(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_T[None], use_cache=False).logits[0]
    return logits.float()
