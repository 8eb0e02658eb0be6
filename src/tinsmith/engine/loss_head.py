"""Log-probabilities of chosen tokens, without ever holding `[T, V]`.

    logits = h W^T + b + update of the unembedding's adapter;   log p(v | t) = logits[t, v] - logsumexp(logits[t])

Rows are processed in chunks, in fp32; the backward pass recomputes each chunk's logits from the saved normalizers.
"""

# T row (packed token), H hidden, V vocabulary, M wanted (row, token) pair, C row of a chunk

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinsmith.engine.lora import Segment

_CHUNK_LOGITS = 2**23
"""Logits held at once: 32 MB in fp32, written again for every chunk."""


@dataclass(frozen=True, slots=True)
class Unembedding:
    """The last linear layer, its weights in fp32 so that log-probabilities are not rounded to 8 bits of mantissa."""

    weight_VH: Tensor
    bias_V: Tensor | None
    site: int | None
    """Its number among the adapter sites, if adapters may attach to it."""
    softcap: float | None = None
    """Logits are squeezed into ± this: c * tanh(logits / c)."""
    stored_VH: Tensor | None = None
    """The weights in the dtype of the base model. Gradients of hidden states in that dtype are multiplied with them."""

    @property
    def vocab_size(self) -> int:
        return self.weight_VH.shape[0]


def target_logprobs(
    hidden_TH: Tensor, head: Unembedding, segments: Sequence[Segment], rows_M: Tensor, tokens_M: Tensor
) -> Tensor:
    """fp32 log-probabilities `[M]` of `tokens_M` after `rows_M`. `rows_M` must be non-decreasing."""
    result: Tensor = _TargetLogprobs.apply(hidden_TH, head, segments, rows_M, tokens_M)
    return result


def logits_of(hidden_TH: Tensor, head: Unembedding, segments: Sequence[Segment]) -> Tensor:
    """fp32 logits `[T, V]`; for a handful of rows."""
    logits_TV, _ = _chunk_logits(hidden_TH.float(), head, _active(segments, head), 0, None)
    return logits_TV


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, head, segments, rows_M, tokens_M):  # type: ignore[no-untyped-def]
        segments = _active(segments, head)
        logprobs_M = torch.empty(len(rows_M), dtype=torch.float32, device=hidden_TH.device)
        normalizer_T = torch.empty(hidden_TH.shape[0], dtype=torch.float32, device=hidden_TH.device)
        buffer = _buffer(hidden_TH, head)
        for start, end, pairs in _chunks(hidden_TH.shape[0], head.vocab_size, rows_M):
            logits_CV, _ = _chunk_logits(hidden_TH[start:end].float(), head, segments, start, buffer)
            normalizer_T[start:end] = torch.logsumexp(logits_CV, dim=-1)
            rows = rows_M[pairs]
            logprobs_M[pairs] = logits_CV[rows - start, tokens_M[pairs]] - normalizer_T[rows]
        ctx.save_for_backward(hidden_TH, rows_M, tokens_M, normalizer_T)
        ctx.head, ctx.segments = head, segments
        return logprobs_M

    @staticmethod
    def backward(ctx, grad_M):  # type: ignore[no-untyped-def]
        hidden_TH, rows_M, tokens_M, normalizer_T = ctx.saved_tensors
        head: Unembedding = ctx.head
        grad_TH = torch.zeros_like(hidden_TH)
        buffer = _buffer(hidden_TH, head)
        # d lp[t, v] / d logits[t, :] = onehot(v) - softmax(logits[t, :])
        for start, end, pairs in _chunks(hidden_TH.shape[0], head.vocab_size, rows_M):
            chunk_grad = grad_M[pairs]
            if not chunk_grad.any():
                continue
            hidden_CH = hidden_TH[start:end].float()
            grad_logits_CV, low_rank = _chunk_logits(hidden_CH, head, ctx.segments, start, buffer)
            slope_CV = None if head.softcap is None else 1 - (grad_logits_CV / head.softcap).square_()
            rows = rows_M[pairs] - start
            total_C = torch.zeros(end - start, dtype=torch.float32, device=grad_M.device).index_add_(
                0, rows, chunk_grad
            )
            grad_logits_CV.sub_(normalizer_T[start:end, None]).exp_().mul_(-total_C[:, None])
            grad_logits_CV.index_put_((rows, tokens_M[pairs]), chunk_grad, accumulate=True)
            if slope_CV is not None:
                grad_logits_CV.mul_(slope_CV)
            grad_CH = _carried_back(grad_logits_CV, head, hidden_TH.dtype)
            if low_rank:
                inside = _within(ctx.segments, start, end)
                for segment, h_tR in zip(inside, low_rank, strict=True):
                    segment.add_gradients(grad_CH, grad_logits_CV, hidden_CH, h_tR, _site(head))
            grad_TH[start:end] = grad_CH.to(grad_TH.dtype)
        return grad_TH, None, None, None, None


def _buffer(hidden_TH: Tensor, head: Unembedding) -> Tensor:
    rows = min(hidden_TH.shape[0], _rows_per_chunk(head.vocab_size))
    return torch.empty(rows, head.vocab_size, dtype=torch.float32, device=hidden_TH.device)


def _carried_back(grad_logits_CV: Tensor, head: Unembedding, dtype: torch.dtype) -> Tensor:
    """fp32; in a low-precision model its factors are rounded as those of its other layers are."""
    if head.stored_VH is None or head.stored_VH.dtype != dtype or dtype == torch.float32:
        return grad_logits_CV @ head.weight_VH
    return (grad_logits_CV.to(dtype) @ head.stored_VH).float()


def _chunk_logits(
    hidden_CH: Tensor, head: Unembedding, segments: Sequence[Segment], start: int, buffer: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """`buffer`, if there is one, is written to."""
    if buffer is None:
        logits_CV = torch.nn.functional.linear(hidden_CH, head.weight_VH, head.bias_V)
    else:
        logits_CV = torch.mm(hidden_CH, head.weight_VH.T, out=buffer[: hidden_CH.shape[0]])
        if head.bias_V is not None:
            logits_CV.add_(head.bias_V)
    inside = _within(segments, start, start + hidden_CH.shape[0])
    low_rank = [segment.add_update(logits_CV, hidden_CH, _site(head)) for segment in inside]
    if head.softcap is not None:
        logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_CV, low_rank


def _rows_per_chunk(vocab_size: int) -> int:
    return max(1, _CHUNK_LOGITS // vocab_size)


def _chunks(num_rows: int, vocab_size: int, rows_M: Tensor) -> Iterator[tuple[int, int, slice]]:
    """`(first row, end row, the pairs that want them)`."""
    size = _rows_per_chunk(vocab_size)
    starts = list(range(0, num_rows, size))
    bounds = torch.searchsorted(rows_M, torch.tensor([*starts, num_rows], device=rows_M.device)).tolist()
    for i, start in enumerate(starts):
        yield start, min(start + size, num_rows), slice(bounds[i], bounds[i + 1])


def _active(segments: Sequence[Segment], head: Unembedding) -> list[Segment]:
    if head.site is None:
        return []
    return [s for s in segments if s.attaches_to(head.site)]


def _within(segments: Sequence[Segment], start: int, end: int) -> list[Segment]:
    """The parts of the segments inside `[start, end)`, counted from `start`."""
    parts = []
    for s in segments:
        low, high = max(s.start, start), min(s.end, end)
        if low < high:
            parts.append(replace(s, start=low - start, end=high - start))
    return parts


def _site(head: Unembedding) -> int:
    return -1 if head.site is None else head.site
