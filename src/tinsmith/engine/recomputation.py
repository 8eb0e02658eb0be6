"""Gradient checkpointing: a layer keeps only its input, and computes the rest again in the backward pass.

Chen et al., arXiv 1604.06174. Ours, not the one of transformers, which wants the model in training mode (dropout with
it) and decides once for all passes. Here every pass decides by its own length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(slots=True)
class Recomputation:
    """Whether the layers of the pass that runs now are to be recomputed. One per base model."""

    most_tokens_kept: int | None
    """Longest pass whose activations are all kept; `None`: any."""
    is_on: bool = False

    def decide(self, num_tokens: int) -> None:
        """For the pass of so many tokens that follows."""
        self.is_on = self.most_tokens_kept is not None and num_tokens > self.most_tokens_kept

    def in_words(self) -> str:
        if self.most_tokens_kept is None:
            return "activations are kept"
        return f"activations of passes above {self.most_tokens_kept} tokens are recomputed"

    def attach(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            layer.forward = self._recomputed(layer.forward)

    def _recomputed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_or_recompute(*args: Any, **kwargs: Any) -> Any:
            if self.is_on and torch.is_grad_enabled():
                # nothing here draws random numbers: dropout is off in evaluation mode
                return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return forward(*args, **kwargs)

        return forward_or_recompute
