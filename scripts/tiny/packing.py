"""From documents to training rows.

A row holds whole documents, one after another, and padding. Documents in a row do not see each other: `document_BT`
numbers them and positions start again at each, so that training sees what inference sees.
"""

# B row, T position in a row

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from corpus import Conversation, Document
from tokenizer import END_OF_TEXT, TURN_END, TURN_START
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ROW_LENGTH: Final = 256
PROMPT_WEIGHT: Final = 0.1
"""Loss weight of tokens that the model need not say; tokens of answers and passages weigh 1."""

PADDING: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One document as tokens, each with the weight of predicting it."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    ids_BT: Tensor
    weights_BT: Tensor
    document_BT: Tensor
    """The number of the document within its row; `PADDING` after the last."""
    positions_BT: Tensor

    def __len__(self) -> int:
        return self.ids_BT.shape[0]

    def slice(self, start: int, stop: int) -> Rows:
        return Rows(
            ids_BT=self.ids_BT[start:stop],
            weights_BT=self.weights_BT[start:stop],
            document_BT=self.document_BT[start:stop],
            positions_BT=self.positions_BT[start:stop],
        )

    @property
    def num_tokens(self) -> int:
        return int((self.document_BT != PADDING).sum())


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in _spans(document):
        span = tokenizer.encode(text, add_special_tokens=False)
        ids += span
        weights += [weight] * len(span)
    return Encoded(ids=ids, weights=weights)


def pack(documents: Iterable[Encoded]) -> Rows:
    """Fill rows in order; a document longer than a row is cut at the row's end."""
    rows = list(_row_groups(documents))
    shape = (len(rows), ROW_LENGTH)
    ids_BT = torch.zeros(shape, dtype=torch.long)
    weights_BT = torch.zeros(shape)
    document_BT = torch.full(shape, PADDING)
    positions_BT = torch.zeros(shape, dtype=torch.long)
    for row, group in enumerate(rows):
        start = 0
        for number, document in enumerate(group):
            stop = start + len(document.ids)
            ids_BT[row, start:stop] = torch.tensor(document.ids)
            weights_BT[row, start:stop] = torch.tensor(document.weights)
            weights_BT[row, start] = 0.0  # nothing stands before a document's first token
            document_BT[row, start:stop] = number
            positions_BT[row, start:stop] = torch.arange(stop - start)
            start = stop
    return Rows(ids_BT=ids_BT, weights_BT=weights_BT, document_BT=document_BT, positions_BT=positions_BT)


def _spans(document: Document) -> Iterator[tuple[str, float]]:
    if not isinstance(document, Conversation):
        yield END_OF_TEXT, 0.0
        yield document.text + END_OF_TEXT, 1.0
        return
    for message in document.messages:
        weight = 1.0 if message.role == "assistant" else PROMPT_WEIGHT
        yield f"{TURN_START}{message.role}\n", PROMPT_WEIGHT
        yield f"{message.content}{TURN_END}", weight
        yield "\n", PROMPT_WEIGHT
    yield END_OF_TEXT, PROMPT_WEIGHT


def _row_groups(documents: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    group: list[Encoded] = []
    used = 0
    for document in documents:
        document = Encoded(ids=document.ids[:ROW_LENGTH], weights=document.weights[:ROW_LENGTH])
        if used + len(document.ids) > ROW_LENGTH:
            yield group
            group, used = [], 0
        group.append(document)
        used += len(document.ids)
    if group:
        yield group
