"""From requests to packed rows: which datums share a pass, and where each one's tokens lie in it."""

# T packed token, M target token

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.losses import Config, Loss, LossInputs
from tinsmith.engine.vision import ImageRows, positions_of
from tinsmith.types.datum import Datum
from tinsmith.types.images import PlacedTokens


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive datums of one request inside one micro-batch."""

    item: int
    """Index of the request in its batch."""
    model_id: str
    first_datum: int
    data: tuple[Datum, ...]
    tokens: tuple[PlacedTokens, ...]
    """Of each datum's input."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One micro-batch as tensors. Targets are flat `(row, token)` pairs in row order, piece after piece."""

    input_ids_T: Tensor
    """Below zero in the rows of pictures."""
    position_ids_T: Tensor
    """`[3, T]` if there are pictures."""
    images: tuple[ImageRows, ...]
    lengths: list[int]
    rows_M: Tensor
    targets_M: Tensor
    targets_per_piece: list[int]


@dataclass(frozen=True, slots=True)
class PassRequest:
    """A request that waits to be spread over passes."""

    index: int
    """In its batch."""
    model_id: str
    rank: int
    data: tuple[Datum, ...]
    tokens: tuple[PlacedTokens, ...]
    """Of each datum's input."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


def micro_batches(requests: Sequence[PassRequest], *, max_tokens: int, share_passes: bool) -> Iterator[list[Piece]]:
    """Spread the datums of all requests over passes of at most `max_tokens` tokens; a longer datum goes alone.

    Adapters with little work come first, so that it is answered first, and adapters of one rank side by side. Requests
    of one adapter stay together and in order: each adapter is one contiguous segment. A request that does not end in a
    pass is the first of its adapter in it, so that it can be undone without those before it.
    """
    batch: list[Piece] = []
    room = max_tokens
    for request in _in_order(requests):
        is_followed = batch and request.num_tokens > room and batch[-1].model_id == request.model_id
        if batch and (is_followed or not share_passes):
            yield batch
            batch, room = [], max_tokens
        first = 0
        for index, tokens in enumerate(request.tokens):
            if len(tokens) > room and (index > first or batch):
                if index > first:
                    batch.append(_piece(request, first, index))
                yield batch
                batch, first, room = [], index, max_tokens
            room -= len(tokens)
        batch.append(_piece(request, first, len(request.data)))
    if batch:
        yield batch


def _in_order(requests: Sequence[PassRequest]) -> list[PassRequest]:
    tokens: dict[str, int] = {}
    for request in requests:
        tokens[request.model_id] = tokens.get(request.model_id, 0) + request.num_tokens
    places = {model_id: place for place, model_id in enumerate(tokens)}
    return sorted(requests, key=lambda r: (tokens[r.model_id], r.rank, places[r.model_id], r.index))


def _piece(request: PassRequest, first: int, end: int) -> Piece:
    return Piece(request.index, request.model_id, first, request.data[first:end], request.tokens[first:end])


def pack(pieces: Sequence[Piece], device: torch.device) -> PackedRows:
    data = [datum for piece in pieces for datum in piece.data]
    tokens = [placed for piece in pieces for placed in piece.tokens]
    lengths = [len(t) for t in tokens]
    targets = [datum.loss_fn_inputs["target_tokens"].to_numpy() for datum in data]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    rows = [
        np.repeat(np.arange(s, s + len(t)), t.shape[1] if t.ndim == 2 else 1)
        for s, t in zip(starts, targets, strict=True)
    ]
    return PackedRows(
        input_ids_T=torch.from_numpy(np.concatenate([t.ids_N for t in tokens])).to(device),
        position_ids_T=torch.from_numpy(_positions(tokens)).to(device),
        images=tuple(_image_rows(pieces, starts)),
        lengths=lengths,
        rows_M=torch.from_numpy(np.concatenate(rows)).to(device),
        targets_M=torch.from_numpy(np.concatenate([t.reshape(-1) for t in targets])).to(device),
        targets_per_piece=[
            sum(datum.loss_fn_inputs["target_tokens"].to_numpy().size for datum in piece.data) for piece in pieces
        ],
    )


def _positions(tokens: Sequence[PlacedTokens]) -> np.ndarray:
    if not any(t.images for t in tokens):
        return np.concatenate([np.arange(len(t)) for t in tokens])
    return np.concatenate([positions_of(len(t), t.images) for t in tokens], axis=1)


def _image_rows(pieces: Sequence[Piece], starts: np.ndarray) -> Iterator[ImageRows]:
    datums = ((piece.first_datum + i, placed) for piece in pieces for i, placed in enumerate(piece.tokens))
    for start, (index, placed) in zip(starts.tolist(), datums, strict=True):
        for image in placed.images:
            where = f"data[{index}].model_input.chunks[{image.chunk_index}]"
            yield ImageRows(image, at=start + image.start, first=0, end=image.length, where=where)


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
