"""The loss of a piece of a request, whichever kind it is."""

# M target token of one request

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from tinsmith.engine.custom_loss import TracedLoss
from tinsmith.engine.losses import LOSSES, evaluate
from tinsmith.engine.packing import Piece, loss_inputs
from tinsmith.types.custom_loss import CustomLoss
from tinsmith.types.operations import TrainItem

MAX_TRACED = 256
"""Custom losses kept ready; beyond it the least recently used is looked up again."""


class RequestLosses:
    def __init__(self) -> None:
        self._traced: OrderedDict[str, TracedLoss] = OrderedDict()

    def evaluate(
        self, item: TrainItem, piece: Piece, logprobs_M: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float], int]:
        """The loss (scalar) of a piece of `item`, its gradient `[M]`, its metrics, and how many values their means are
        of: datums for a custom loss, tokens with an advantage for the others.

        Raises `InvalidInput` if a custom loss does not fit the data.
        """
        if item.custom_loss is not None:
            evaluated = self._ready(item.custom_loss).evaluate(
                logprobs_M, piece.data, first_datum=piece.first_datum, forward_only=item.forward_only
            )
            return *evaluated, len(piece.data)
        loss = LOSSES[item.loss_fn]
        config = {**loss.defaults, **{key: float(value) for key, value in item.loss_fn_config.items()}}
        inputs = loss_inputs(piece, loss, config, logprobs_M.device)
        num_meant = int((inputs["advantages"] != 0).sum()) if "advantages" in loss.inputs else 0
        return *evaluate(loss, logprobs_M, inputs, config), num_meant

    def _ready(self, loss: CustomLoss) -> TracedLoss:
        traced = self._traced.get(loss.digest)
        if traced is None:
            traced = self._traced[loss.digest] = TracedLoss(loss)
        self._traced.move_to_end(loss.digest)
        if len(self._traced) > MAX_TRACED:
            self._traced.popitem(last=False)
        return traced
