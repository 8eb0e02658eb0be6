"""Training passes: many requests of many adapters, losses and ranks through the frozen base at once."""

# T packed token, M target token, H hidden

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.adapter import Adapter
from tinsmith.engine.attention import PassLayout
from tinsmith.engine.base_model import BaseModel
from tinsmith.engine.figures import Figures
from tinsmith.engine.lora import Segment
from tinsmith.engine.loss_head import target_logprobs
from tinsmith.engine.packing import PassRequest, Piece, micro_batches, pack
from tinsmith.engine.request_losses import RequestLosses
from tinsmith.engine.self_attention import plan_blocks
from tinsmith.types.errors import NotFound, ServerError, TinsmithError
from tinsmith.types.images import PlacedTokens, place_tokens
from tinsmith.types.metrics import merge_metrics
from tinsmith.types.operations import TrainItem
from tinsmith.types.results import ForwardBackwardOutput, LossFnOutput
from tinsmith.types.tensor import TensorData

Finished: TypeAlias = tuple[int, ForwardBackwardOutput | TinsmithError]
"""Index of a request in its batch, and how it ended."""


@dataclass(frozen=True, slots=True)
class _Computed:
    """Of one piece."""

    outputs: list[LossFnOutput]
    metrics: dict[str, float]
    num_meant: int
    """How many values its means are of."""


@dataclass(slots=True, eq=False)
class _Request:
    """A training request on its way through the passes."""

    item: TrainItem
    adapter: Adapter
    tokens: tuple[PlacedTokens, ...]
    """Of each datum's input."""
    passed: list[Piece] = field(default_factory=list)
    computed: list[_Computed] = field(default_factory=list)
    """Of the pieces that passed."""
    grads_before: Tensor | None = None
    """The adapter's gradients before the first pass with a piece of it; `None` stands for all zero."""

    @property
    def is_complete(self) -> bool:
        return sum(len(piece.data) for piece in self.passed) == len(self.item.data)

    def restart(self) -> None:
        self.passed, self.computed = [], []
        self.grads_before = self.adapter.backup_grads()

    def undo(self) -> None:
        if not self.item.forward_only:
            self.adapter.restore_grads(self.grads_before)

    def finish(self) -> ForwardBackwardOutput:
        self.adapter.num_pending += 0 if self.item.forward_only else 1
        outputs = [output for computed in self.computed for output in computed.outputs]
        metrics = merge_metrics([c.metrics for c in self.computed], [c.num_meant for c in self.computed])
        return ForwardBackwardOutput("ArrayRecord", outputs, metrics)


class Trainer:
    """Runs training requests on one base model, a micro-batch at a time."""

    def __init__(
        self, base: BaseModel, *, max_micro_batch_tokens: int, share_passes: bool = True, figures: Figures | None = None
    ) -> None:
        """Without `share_passes`, no pass ever holds two requests."""
        self._base = base
        self._max_tokens = max_micro_batch_tokens
        self._share_passes = share_passes
        self._losses = RequestLosses()
        self._figures = figures or Figures()
        self.tokens_trained = 0

    def run(self, items: Sequence[TrainItem], adapters: Mapping[str, Adapter]) -> Generator[list[Finished]]:
        """Compute all items. Yields after every pass the index and the outcome of each item that ended with it.

        If a pass fails, its items run alone: only the guilty one fails, and it leaves its adapter's gradients as they
        were.
        """
        requests: dict[int, _Request] = {}
        refused: list[Finished] = []
        for index, item in enumerate(items):
            try:
                adapter = _adapter_of(item, adapters)
                adapter.check_trainable()
                requests[index] = _Request(item, adapter, self._place(item))
            except TinsmithError as error:
                refused.append((index, error))
        if refused:
            yield refused
        work = [
            PassRequest(index, request.item.model_id, request.adapter.spec.rank, request.item.data, request.tokens)
            for index, request in requests.items()
        ]
        for pieces in micro_batches(work, max_tokens=self._max_tokens, share_passes=self._share_passes):
            if wanted := [piece for piece in pieces if piece.item in requests]:
                yield from self._pass(wanted, requests)

    def _place(self, item: TrainItem) -> tuple[PlacedTokens, ...]:
        rule = self._base.card.images
        return tuple(place_tokens(d.model_input, rule, f"data[{i}].model_input") for i, d in enumerate(item.data))

    def _pass(self, pieces: Sequence[Piece], requests: dict[int, _Request]) -> Generator[list[Finished]]:
        """All pieces at once or, if that fails, request by request. Requests that end are taken out of `requests`."""
        groups = {index: list(group) for index, group in groupby(pieces, key=lambda piece: piece.item)}
        before: dict[str, Tensor | None] = {}
        for index in groups:
            request = requests[index]
            if request.item.forward_only:
                continue
            if request.item.model_id not in before:
                before[request.item.model_id] = (
                    request.grads_before if request.passed else request.adapter.backup_grads()
                )
            request.grads_before = before[request.item.model_id]
        error = self._attempt(pieces, requests)
        if error is None:
            yield [(index, requests.pop(index).finish()) for index in groups if requests[index].is_complete]
            return
        for index in groups:
            requests[index].undo()
        if len(groups) == 1:
            (index,) = groups
            del requests[index]
            yield [(index, error)]
            return
        for index, group in groups.items():
            yield from self._alone(index, [*requests[index].passed, *group], requests)

    def _alone(self, index: int, pieces: Sequence[Piece], requests: dict[int, _Request]) -> Generator[list[Finished]]:
        """A request from its beginning as far as it had come, in passes of its own."""
        request = requests[index]
        request.restart()
        for piece in pieces:
            if (error := self._attempt([piece], requests)) is not None:
                request.undo()
                del requests[index]
                yield [(index, error)]
                return
            yield []
        if request.is_complete:
            yield [(index, requests.pop(index).finish())]

    def _attempt(self, pieces: Sequence[Piece], requests: Mapping[int, _Request]) -> TinsmithError | None:
        """One pass. On an error of the device, or of a custom loss, gradients may have been added to; nothing else."""
        try:
            computed = self._compute(pieces, requests)
        except TinsmithError as error:
            return error
        except (RuntimeError, MemoryError) as error:  # what torch raises for out-of-memory and device faults
            return ServerError(f"the pass failed on the device: {error}")
        for piece, of_piece in zip(pieces, computed, strict=True):
            request = requests[piece.item]
            request.passed.append(piece)
            request.computed.append(of_piece)
        return None

    def _compute(self, pieces: Sequence[Piece], requests: Mapping[int, _Request]) -> list[_Computed]:
        """Forward, losses, backward."""
        figures = self._figures
        with figures.phase("pack"):
            rows = pack(pieces, self._base.device)
            segments = _segments(pieces, requests)
            layout = PassLayout(blocks=plan_blocks(rows.lengths, self._base.device))
        any_backward = any(not requests[p.item].item.forward_only for p in pieces)
        with figures.phase("forward"), torch.set_grad_enabled(any_backward):
            hidden_TH = self._base.hidden(rows.input_ids_T, rows.position_ids_T, segments, layout, rows.images)
            logprobs_M = target_logprobs(hidden_TH, self._base.head, segments, rows.rows_M, rows.targets_M)
        with figures.phase("loss"):
            grads, computed = self._evaluate(pieces, requests, logprobs_M.detach().split(rows.targets_per_piece))
        # groups whose rewards are all equal have no advantage anywhere: nothing to carry back
        if any_backward and (grad_M := torch.cat(grads)).any():
            with figures.phase("backward"):
                self._base.backward(logprobs_M, grad_M, segments)
        figures.num_training_passes += 1
        self.tokens_trained += len(rows.input_ids_T)
        return computed

    def _evaluate(
        self, pieces: Sequence[Piece], requests: Mapping[int, _Request], logprobs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[_Computed]]:
        """dL/dlogprob `[M]` of every piece, and what its requests are told.

        Raises `AdapterCorrupted` for log-probabilities of weights that are not finite.
        """
        grads: list[Tensor] = []
        computed: list[_Computed] = []
        for piece, piece_logprobs in zip(pieces, logprobs, strict=True):
            request = requests[piece.item]
            logprobs_M = piece_logprobs.cpu().numpy()
            if not np.isfinite(logprobs_M).all():
                request.adapter.check_weights()
            value, grad, metrics, num_meant = self._losses.evaluate(request.item, piece, piece_logprobs)
            grads.append(torch.zeros_like(grad) if request.item.forward_only else grad)
            figures = {"loss:sum": float(value), "tokens:sum": float(piece.num_tokens), **metrics}
            computed.append(_Computed(_outputs(piece, logprobs_M), figures, num_meant))
        return grads, computed


def _adapter_of(item: TrainItem, adapters: Mapping[str, Adapter]) -> Adapter:
    if item.model_id not in adapters:
        raise NotFound(f"model {item.model_id!r} is not loaded")
    return adapters[item.model_id]


def _segments(pieces: Sequence[Piece], requests: Mapping[int, _Request]) -> list[Segment]:
    """One segment per adapter and kind of pass: forward-only rows must leave no gradient behind."""
    segments: list[Segment] = []
    at = 0

    def kind(piece: Piece) -> tuple[str, bool]:
        item = requests[piece.item].item
        return item.model_id, item.forward_only

    for (_, forward_only), group in groupby(pieces, key=kind):
        run = list(group)
        adapter = requests[run[0].item].adapter
        end = at + sum(piece.num_tokens for piece in run)
        segments.append(Segment(at, end, adapter.weights, None if forward_only else adapter.grad_views))
        at = end
    return segments


def _outputs(piece: Piece, logprobs_M: np.ndarray) -> list[LossFnOutput]:
    outputs: list[LossFnOutput] = []
    at = 0
    for datum in piece.data:
        shape = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
        end = at + int(np.prod(shape))
        outputs.append({"logprobs": TensorData(logprobs_M[at:end], "float32", shape)})
        at = end
    return outputs
