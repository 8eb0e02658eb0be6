"""An adapter in training: weights, gradients and optimizer state, all flat fp32 vectors of one layout."""

# P all parameters of one adapter

from __future__ import annotations

import torch
from torch import Tensor

from tinsmith.engine.lora import LoraLayout, LoraWeights, MatrixPair
from tinsmith.engine.optimizer import AdamState, adamw_step
from tinsmith.types.errors import AdapterCorrupted
from tinsmith.types.operations import LoraSpec
from tinsmith.types.params import AdamParams


class Adapter:
    """One model of one tenant. What it holds is touched by its own requests only."""

    def __init__(
        self, model_id: str, layout: LoraLayout, device: torch.device, *, weights: Tensor | None = None, step: int = 0
    ) -> None:
        flat_P = layout.initial_weights(device) if weights is None else weights
        self.model_id = model_id
        self.layout = layout
        self.weights = LoraWeights(layout, flat_P)
        self.grads_P = torch.zeros_like(flat_P)
        self.grad_views: list[MatrixPair | None] = layout.views(self.grads_P)
        self.optimizer = AdamState.fresh(flat_P)
        self.num_pending = 0
        """Backward passes since the last optimizer step."""
        self.step = step
        """Optimizer steps applied over the adapter's whole life, loads included."""
        self.corrupted: str | None = None
        """Why the adapter refuses further training, once it does."""

    @property
    def spec(self) -> LoraSpec:
        return self.layout.spec

    def check_trainable(self) -> None:
        """Raises `AdapterCorrupted` once a gradient was not finite."""
        if self.corrupted:
            raise AdapterCorrupted(f"model {self.model_id!r} refuses further training: {self.corrupted}")

    def backup_grads(self) -> Tensor | None:
        """What `restore_grads` needs to undo the passes that follow; `None` stands for all zero."""
        return self.grads_P.clone() if self.num_pending else None

    def restore_grads(self, backup_P: Tensor | None) -> None:
        if backup_P is None:
            self.grads_P.zero_()
        else:
            self.grads_P.copy_(backup_P)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """Advance by one AdamW step over the accumulated gradients and clear them.

        Without gradients nothing moves (`step_applied` 0). Raises `AdapterCorrupted` if a gradient is not finite;
        nothing is applied then, and the adapter refuses further training.
        """
        self.check_trainable()
        if self.num_pending == 0:
            return {"step_applied": 0.0, "grad_norm:mean": 0.0, "learning_rate:mean": params.learning_rate}
        norm = float(torch.linalg.vector_norm(self.grads_P))
        if not norm < float("inf"):
            self.corrupted = f"the gradient norm of step {self.step + 1} was {norm}"
            self.check_trainable()
        adamw_step(self._writable_weights(), self.grads_P, self.optimizer, params, grad_norm=norm)
        self.weights.changed()
        self.grads_P.zero_()
        self.num_pending = 0
        self.step += 1
        return {"step_applied": 1.0, "grad_norm:mean": norm, "learning_rate:mean": params.learning_rate}

    def snapshot(self) -> LoraWeights:
        """The present weights for sampling; later steps write to a copy."""
        return self.weights.freeze()

    def _writable_weights(self) -> Tensor:
        if self.weights.is_frozen:
            self.weights = LoraWeights(self.layout, self.weights.flat_P.clone())
        return self.weights.flat_P
