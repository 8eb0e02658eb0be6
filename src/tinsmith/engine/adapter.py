"""An adapter in training: weights, gradients and optimizer state, all flat fp32 vectors of one layout."""

# P all parameters of one adapter

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from tinsmith.engine.lora import LoraLayout, LoraWeights, MatrixPair
from tinsmith.engine.optimizer import AdamState, AdamStep, adamw_steps
from tinsmith.types.errors import AdapterCorrupted, ServerError, TinsmithError
from tinsmith.types.operations import LoraSpec
from tinsmith.types.params import AdamParams

_NORM_STRETCH = 2**16
"""Gradients whose squares are added up at once: one fp32 sum over many millions would be off by percents."""


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
        """Raises `AdapterCorrupted` once a gradient or a weight was not finite, or a step stopped half way."""
        if self.corrupted:
            raise self.corrupt(self.corrupted)

    def check_weights(self) -> None:
        """Raises `AdapterCorrupted`, now and from now on, if a weight is not finite."""
        if not self.weights.flat_P.isfinite().all():
            raise self.corrupt(f"its weights are no longer finite after step {self.step}")

    def corrupt(self, reason: str) -> AdapterCorrupted:
        """Refuse further training, with the error returned."""
        self.corrupted = reason
        return AdapterCorrupted(f"model {self.model_id!r} refuses further training: {reason}")

    def backup_grads(self) -> Tensor | None:
        """What `restore_grads` needs to undo the passes that follow; `None` stands for all zero."""
        return self.grads_P.clone() if self.num_pending else None

    def restore_grads(self, backup_P: Tensor | None) -> None:
        if backup_P is None:
            self.grads_P.zero_()
        else:
            self.grads_P.copy_(backup_P)

    def due_step(self, params: AdamParams) -> AdamStep | None:
        """What the accumulated gradients ask for; `None` without any.

        Raises `AdapterCorrupted` if a gradient is not finite; the adapter refuses further training then.
        """
        self.check_trainable()
        if self.num_pending == 0:
            return None
        norm = float(get_total_norm(self.grads_P.split(_NORM_STRETCH)))
        if not norm < float("inf"):
            raise self.corrupt(f"the gradient norm of step {self.step + 1} was {norm}")
        return AdamStep(self._writable_weights(), self.grads_P, self.optimizer, params, norm)

    def stepped(self) -> None:
        """The step that was due has been written."""
        self.weights.changed()
        self.grads_P.zero_()
        self.num_pending = 0
        self.step += 1

    def copy(self, device: torch.device | None = None) -> Adapter:
        """Everything that later requests depend on, as it is now, bit for bit; shares nothing with the original."""
        device = device or self.grads_P.device
        weights_P = self.weights.flat_P.to(device, copy=True)
        copied = Adapter(self.model_id, self.layout, device, weights=weights_P, step=self.step)
        copied.grads_P.copy_(self.grads_P)
        copied.num_pending = self.num_pending
        copied.corrupted = self.corrupted
        copied.optimizer.exp_avg_P.copy_(self.optimizer.exp_avg_P)
        copied.optimizer.exp_avg_sq_P.copy_(self.optimizer.exp_avg_sq_P)
        copied.optimizer.count = self.optimizer.count
        return copied

    def snapshot(self) -> LoraWeights:
        """The present weights for sampling; later steps write to a copy."""
        return self.weights.freeze()

    def _writable_weights(self) -> Tensor:
        if self.weights.is_frozen:
            self.weights = LoraWeights(self.layout, self.weights.flat_P.clone())
        return self.weights.flat_P


def optim_steps(due: Sequence[tuple[Adapter, AdamParams]]) -> list[dict[str, float] | TinsmithError]:
    """Advance different adapters by one AdamW step each, in one pass over all; their gradients are cleared.

    Returns metrics per adapter. Without gradients nothing moves (`step_applied` 0). One with a gradient that is not
    finite, or whose step cannot be prepared, does not move and is answered with the error. If the pass itself fails,
    half a step may stand: its adapters refuse further training.
    """
    answers: list[dict[str, float] | TinsmithError] = []
    steps: dict[int, AdamStep] = {}
    for index, (adapter, params) in enumerate(due):
        try:
            step = adapter.due_step(params)
        except AdapterCorrupted as error:
            answers.append(error)
            continue
        except (RuntimeError, MemoryError) as error:  # what torch raises for out-of-memory and device faults
            answers.append(ServerError(f"the optimizer step failed on the device: {error}"))
            continue
        norm = 0.0 if step is None else step.grad_norm
        applied = 0.0 if step is None else 1.0
        answers.append({"step_applied": applied, "grad_norm:mean": norm, "learning_rate:mean": params.learning_rate})
        if step is not None:
            steps[index] = step
    try:
        adamw_steps(list(steps.values()))
    except (RuntimeError, MemoryError) as error:
        for index in steps:
            answers[index] = due[index][0].corrupt(f"its optimizer step failed on the device: {error}")
        return answers
    for index in steps:
        due[index][0].stepped()
    return answers
