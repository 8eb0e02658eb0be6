"""From requests to packed rows: which datums share a pass, and where each one's tokens lie in it."""

# T packed token, M target token

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.adapter import Adapter
from tinsmith.engine.losses import Config, Loss, LossInputs
from tinsmith.types.datum import Datum
from tinsmith.types.operations import TrainItem


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive datums of one request inside one micro-batch."""

    item: int
    """Index of the request in its batch."""
    first_datum: int
    data: tuple[Datum, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One micro-batch as tensors. Targets are flat `(row, token)` pairs in row order, piece after piece."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    lengths: list[int]
    rows_M: Tensor
    targets_M: Tensor
    targets_per_piece: list[int]


def micro_batches(items: Sequence[TrainItem], adapters: Sequence[Adapter], *, max_tokens: int) -> Iterator[list[Piece]]:
    """Spread the datums of all requests over passes of at most `max_tokens` tokens; a longer datum goes alone.

    Requests of one adapter stay together so that each adapter is one contiguous segment.
    """
    order = sorted(range(len(items)), key=lambda i: (id(adapters[i]), i))
    batch: list[Piece] = []
    room = max_tokens
    for item in order:
        run: list[Datum] = []
        run_tokens, first = 0, 0
        for index, datum in enumerate(items[item].data):
            length = datum.model_input.length
            if length > room and (run or batch):
                if run:
                    batch.append(Piece(item, first, tuple(run), run_tokens))
                yield batch
                batch, run, run_tokens, first, room = [], [], 0, index, max_tokens
            run.append(datum)
            run_tokens += length
            room -= length
        batch.append(Piece(item, first, tuple(run), run_tokens))
    if batch:
        yield batch


def pack(pieces: Sequence[Piece], device: torch.device) -> PackedRows:
    data = [datum for piece in pieces for datum in piece.data]
    tokens = [datum.model_input.to_numpy() for datum in data]
    lengths = [len(t) for t in tokens]
    targets = [datum.loss_fn_inputs["target_tokens"].to_numpy() for datum in data]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    rows = [
        np.repeat(np.arange(s, s + len(t)), t.shape[1] if t.ndim == 2 else 1)
        for s, t in zip(starts, targets, strict=True)
    ]
    return PackedRows(
        input_ids_T=torch.from_numpy(np.concatenate(tokens)).to(device),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device),
        lengths=lengths,
        rows_M=torch.from_numpy(np.concatenate(rows)).to(device),
        targets_M=torch.from_numpy(np.concatenate([t.reshape(-1) for t in targets])).to(device),
        targets_per_piece=[
            sum(datum.loss_fn_inputs["target_tokens"].to_numpy().size for datum in piece.data) for piece in pieces
        ],
    )


def loss_inputs(piece: Piece, loss: Loss, config: Config, device: torch.device) -> LossInputs:
    """What the loss reads of the datums. A setting that some give per token has its value of `config` in the others."""
    lengths = [datum.loss_fn_inputs["target_tokens"].to_numpy().size for datum in piece.data]
    given = [name for name in loss.per_token if any(name in datum.loss_fn_inputs for datum in piece.data)]
    per_token = {}
    for key in (*loss.inputs, *given):
        rows = [
            datum.loss_fn_inputs[key].to_numpy().reshape(-1)
            if key in datum.loss_fn_inputs
            else np.full(length, config[key], dtype=np.float32)
            for datum, length in zip(piece.data, lengths, strict=True)
        ]
        per_token[key] = torch.from_numpy(np.concatenate(rows)).to(device, torch.float32)
    return LossInputs(per_token, lengths)
