"""Training passes: many requests of many adapters, losses and ranks through the frozen base at once."""

# T packed token, M target token, H hidden

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch

from tinsmith.engine.adapter import Adapter
from tinsmith.engine.attention import PassLayout
from tinsmith.engine.base_model import BaseModel
from tinsmith.engine.lora import Segment
from tinsmith.engine.loss_head import target_logprobs
from tinsmith.engine.packing import Piece, micro_batches, pack
from tinsmith.engine.request_losses import RequestLosses
from tinsmith.engine.self_attention import plan_blocks
from tinsmith.types.errors import NotFound, ServerError, TinsmithError
from tinsmith.types.metrics import merge_metrics
from tinsmith.types.operations import TrainItem, TrainOutcome
from tinsmith.types.results import ForwardBackwardOutput, LossFnOutput
from tinsmith.types.tensor import TensorData


@dataclass(slots=True)
class _Progress:
    """What has been computed of one request so far."""

    outputs: list[LossFnOutput] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    datums: list[int] = field(default_factory=list)

    def result(self) -> ForwardBackwardOutput:
        return ForwardBackwardOutput("ArrayRecord", self.outputs, merge_metrics(self.metrics, self.datums))


class Trainer:
    """Runs training batches on one base model, a micro-batch at a time."""

    def __init__(self, base: BaseModel, *, max_micro_batch_tokens: int) -> None:
        self._base = base
        self._max_tokens = max_micro_batch_tokens
        self._losses = RequestLosses()
        self.tokens_trained = 0

    def run(
        self, items: Sequence[TrainItem], adapters: Mapping[str, Adapter]
    ) -> Generator[None, None, list[TrainOutcome]]:
        """Compute all items; yields between micro-batches. If a pass fails, its items run alone: only the guilty fails.

        An item that fails leaves its adapter's gradients as they were.
        """
        outcomes: dict[int, TrainOutcome] = {}
        ready: list[int] = []
        for index, item in enumerate(items):
            try:
                _adapter_of(item, adapters).check_trainable()
                ready.append(index)
            except TinsmithError as error:
                outcomes[index] = error
        together = yield from self._attempt([items[i] for i in ready], adapters)
        if isinstance(together, TinsmithError) and len(ready) > 1:
            for index in ready:
                alone = yield from self._attempt([items[index]], adapters)
                outcomes[index] = alone if isinstance(alone, TinsmithError) else alone[0]
        elif isinstance(together, TinsmithError):
            outcomes[ready[0]] = together
        else:
            outcomes.update(zip(ready, together, strict=True))
        return [outcomes[i] for i in range(len(items))]

    def _attempt(
        self, items: Sequence[TrainItem], adapters: Mapping[str, Adapter]
    ) -> Generator[None, None, list[ForwardBackwardOutput] | TinsmithError]:
        """All items or none: on an error of the device, or of a custom loss, every gradient is put back."""
        owners = [_adapter_of(item, adapters) for item in items]
        trained = {a.model_id: a for a, item in zip(owners, items, strict=True) if not item.forward_only}
        backups = {model_id: adapter.backup_grads() for model_id, adapter in trained.items()}
        progress = [_Progress() for _ in items]
        try:
            for pieces in micro_batches(items, owners, max_tokens=self._max_tokens):
                self._micro_batch(pieces, items, owners, progress)
                yield
        except (TinsmithError, RuntimeError, MemoryError) as error:
            for model_id, adapter in trained.items():
                adapter.restore_grads(backups[model_id])
            if isinstance(error, TinsmithError):
                return error
            # what torch raises for out-of-memory and device faults
            return ServerError(f"the pass failed on the device: {error}")
        for adapter, item in zip(owners, items, strict=True):
            adapter.num_pending += 0 if item.forward_only else 1
        return [p.result() for p in progress]

    def _micro_batch(
        self,
        pieces: Sequence[Piece],
        items: Sequence[TrainItem],
        owners: Sequence[Adapter],
        progress: Sequence[_Progress],
    ) -> None:
        rows = pack(pieces, self._base.device)
        segments = _segments(pieces, items, owners)
        layout = PassLayout(blocks=plan_blocks(rows.lengths, self._base.device))
        any_backward = any(not items[p.item].forward_only for p in pieces)
        with torch.set_grad_enabled(any_backward):
            hidden_TH = self._base.hidden(rows.input_ids_T, rows.position_ids_T, segments, layout)
            logprobs_M = target_logprobs(hidden_TH, self._base.head, segments, rows.rows_M, rows.targets_M)
        grads = []
        for piece, piece_logprobs in zip(pieces, logprobs_M.detach().split(rows.targets_per_piece), strict=True):
            item = items[piece.item]
            value, grad, metrics = self._losses.evaluate(item, piece, piece_logprobs)
            grads.append(torch.zeros_like(grad) if item.forward_only else grad)
            _record(progress[piece.item], piece, piece_logprobs.cpu().numpy(), float(value), metrics)
        if any_backward:
            self._base.backward(logprobs_M, torch.cat(grads), segments)
        self.tokens_trained += len(rows.input_ids_T)


def _adapter_of(item: TrainItem, adapters: Mapping[str, Adapter]) -> Adapter:
    if item.model_id not in adapters:
        raise NotFound(f"model {item.model_id!r} is not loaded")
    return adapters[item.model_id]


def _segments(pieces: Sequence[Piece], items: Sequence[TrainItem], owners: Sequence[Adapter]) -> list[Segment]:
    """One segment per adapter and kind of pass: forward-only rows must leave no gradient behind."""
    segments: list[Segment] = []
    at = 0
    for (_, forward_only), group in groupby(pieces, key=lambda p: (id(owners[p.item]), items[p.item].forward_only)):
        run = list(group)
        adapter = owners[run[0].item]
        end = at + sum(p.num_tokens for p in run)
        segments.append(Segment(at, end, adapter.weights, None if forward_only else adapter.grad_views))
        at = end
    return segments


def _record(progress: _Progress, piece: Piece, logprobs_M: np.ndarray, loss: float, metrics: dict[str, float]) -> None:
    at = 0
    for datum in piece.data:
        shape = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
        end = at + int(np.prod(shape))
        progress.outputs.append({"logprobs": TensorData(logprobs_M[at:end], "float32", shape)})
        at = end
    progress.metrics.append({"loss:sum": loss, "tokens:sum": float(piece.num_tokens), **metrics})
    progress.datums.append(len(piece.data))
