"""Continuous batching: sequences join when there is room, advance one token per step together, and leave when done.

A request is prefilled once; its samples share the prompt's cache blocks. Whatever its adapter, every running sequence
takes part in the same decode step. If the cache runs out, the youngest request gives its blocks back and is prefilled
again later; its draws do not change, because they depend only on its own seed and positions.
"""

# T packed token, B sequence, V vocabulary, N prompt token, K alternative

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.attention import PassLayout
from tinsmith.engine.base_model import BaseModel
from tinsmith.engine.kv_cache import BlockTable, CachePlan, KVCache
from tinsmith.engine.lora import LoraWeights, Segment
from tinsmith.engine.loss_head import logits_of, target_logprobs
from tinsmith.engine.self_attention import plan_blocks
from tinsmith.engine.stopping import Decoder, StopRule
from tinsmith.engine.token_choice import ChoiceRule, Choices, choose, uniform
from tinsmith.types.errors import InvalidInput, ServerError, TinsmithError, UserError
from tinsmith.types.operations import Sample
from tinsmith.types.results import SampledSequence, SampleResponse, StopReason, TopkLogprobs


@dataclass(slots=True)
class _Sequence:
    """One sample on its way."""

    index: int
    table: BlockTable = field(default_factory=BlockTable)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    stop_reason: StopReason | None = None


@dataclass(slots=True, eq=False)
class _Request:
    ticket: int
    operation: Sample
    weights: LoraWeights | None
    rule: ChoiceRule
    stop: StopRule
    sequences: list[_Sequence]
    prompt_logprobs: np.ndarray | None = None
    topk_prompt: TopkLogprobs | None = None
    prompt_scored: bool = False

    @property
    def live(self) -> list[_Sequence]:
        return [s for s in self.sequences if s.stop_reason is None]

    @property
    def adapter_key(self) -> int:
        return 0 if self.weights is None else id(self.weights)


Finish = Callable[[int, SampleResponse | TinsmithError], None]


class Sampler:
    """All sampling on one base model. `finish` is called once per ticket, with the response or the error."""

    def __init__(
        self,
        base: BaseModel,
        decoder: Decoder,
        finish: Finish,
        *,
        kv_cache_bytes: int,
        max_prefill_tokens: int,
        max_decode_batch: int,
    ) -> None:
        self._base = base
        self._decoder = decoder
        self._finish = finish
        self._max_prefill_tokens = max_prefill_tokens
        self._max_decode_batch = max_decode_batch
        self._cache = KVCache(bytes_max=kv_cache_bytes, bytes_per_token=base.kv_bytes_per_token, device=base.device)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self.tokens_sampled = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, ticket: int, operation: Sample, weights: LoraWeights | None) -> None:
        """Queue a request; the weights must be frozen. One that can never fit fails at once."""
        request = _Request(
            ticket=ticket,
            operation=operation,
            weights=weights,
            rule=ChoiceRule(operation.temperature, operation.top_k, operation.top_p),
            stop=StopRule(frozenset(operation.stop_token_ids), operation.stop_strings, operation.max_tokens),
            sequences=[_Sequence(index) for index in range(operation.num_samples)],
        )
        longest = BlockTable(num_tokens=0)
        needed = self._cache.blocks_needed(longest, len(operation.prompt) + operation.max_tokens) + 1
        if needed >= self._cache.num_blocks:
            tokens = len(operation.prompt) + operation.max_tokens
            self._finish(ticket, InvalidInput(f"prompt and max_tokens are {tokens} tokens; the cache cannot hold them"))
            return
        self._waiting.append(request)

    def cancel(self, ticket: int) -> None:
        for request in [*self._waiting, *self._running]:
            if request.ticket == ticket:
                self._fail(request, UserError("the sample was cancelled"))

    def fail_all(self, error: TinsmithError) -> None:
        for request in [*self._waiting, *self._running]:
            self._fail(request, error)

    def step(self) -> None:
        """Admit and prefill what fits, else advance every running sequence by one token."""
        admitted = self._admit()
        if admitted:
            self._guarded(admitted, self._prefill)
        elif self._running:
            batch = self._decode_batch()
            self._guarded(list(dict.fromkeys(request for request, _ in batch)), lambda _: self._decode(batch))

    def _guarded(self, requests: list[_Request], work: Callable[[list[_Request]], None]) -> None:
        """A device fault fails the requests of this pass, not the engine."""
        try:
            with torch.inference_mode():
                work(requests)
        except (RuntimeError, MemoryError) as error:
            for request in requests:
                self._fail(request, ServerError(f"sampling failed on the device: {error}"))

    # ---- prefill ----

    def _admit(self) -> list[_Request]:
        """Waiting requests, oldest first, while the pass, the batch and the cache have room."""
        admitted: list[_Request] = []
        tokens, blocks = 0, 0
        num_live = sum(len(r.live) for r in self._running)
        while self._waiting:
            request = self._waiting[0]
            needed = sum(self._cache.blocks_needed(BlockTable(), n + 1) for n in _prefill_lengths(request))
            num_live += len(request.live)
            num_tokens = sum(_prefill_lengths(request))
            if (self._running or admitted) and num_live > self._max_decode_batch:
                break
            if admitted and tokens + num_tokens > self._max_prefill_tokens:
                break
            if (self._running or admitted) and blocks + needed + len(request.live) > self._cache.num_free_blocks:
                break
            admitted.append(self._waiting.popleft())
            tokens, blocks = tokens + num_tokens, blocks + needed
        return sorted(admitted, key=lambda r: r.adapter_key)

    def _prefill(self, requests: list[_Request]) -> None:
        self._running.extend(requests)
        rows = [(request, row) for request in requests for row in _prefill_rows(request)]
        token_rows = [_row_tokens(request, sequences) for request, sequences in rows]
        lengths = [len(t) for t in token_rows]
        slots: list[int] = []
        for (_, sequences), length in zip(rows, lengths, strict=True):
            slots.extend(self._cache.append(sequences[0].table, length))
        segments = _segments([(r.weights, n) for (r, _), n in zip(rows, lengths, strict=True)])
        plan = CachePlan(torch.tensor(slots, device=self._base.device))
        layout = PassLayout(plan_blocks(lengths, self._base.device), self._cache, plan)
        hidden_TH = self._hidden(token_rows, [np.arange(n) for n in lengths], segments, layout)
        self._score_prompts(rows, lengths, hidden_TH, segments)
        ends = np.cumsum(lengths) - 1
        last = torch.from_numpy(ends).to(self._base.device)
        drawing: list[tuple[_Request, _Sequence]] = []
        owners: list[int] = []
        for index, (request, sequences) in enumerate(rows):
            for sequence in sequences[1:]:
                sequence.table = self._cache.fork(sequences[0].table)
            drawing.extend((request, sequence) for sequence in sequences)
            owners.extend([index] * len(sequences))
        logits_RV = logits_of(hidden_TH[last], self._base.head, _segments([(r.weights, 1) for r, _ in rows]))
        self._draw(drawing, logits_RV[torch.tensor(owners, device=logits_RV.device)])

    def _score_prompts(
        self,
        rows: Sequence[tuple[_Request, list[_Sequence]]],
        lengths: Sequence[int],
        hidden_TH: Tensor,
        segments: Sequence[Segment],
    ) -> None:
        """Prompt log-probabilities: row i predicts prompt token i + 1; the first token has none."""
        start = 0
        for (request, _), length in zip(rows, lengths, strict=True):
            operation = request.operation
            if not request.prompt_scored and (operation.prompt_logprobs or operation.topk_prompt_logprobs):
                request.prompt_scored = True
                num_scored = len(operation.prompt) - 1
                own = [Segment(0, num_scored, request.weights)]
                hidden = hidden_TH[start : start + num_scored]
                if operation.prompt_logprobs:
                    targets = torch.from_numpy(operation.prompt[1:]).to(hidden.device)
                    at = torch.arange(num_scored, device=hidden.device)
                    scored = target_logprobs(hidden, self._base.head, own, at, targets).cpu().numpy()
                    request.prompt_logprobs = np.concatenate([np.full(1, np.nan, np.float32), scored])
                if operation.topk_prompt_logprobs:
                    request.topk_prompt = self._topk_prompt(hidden, own, operation.topk_prompt_logprobs)
            start += length

    def _topk_prompt(self, hidden_NH: Tensor, own: list[Segment], k: int) -> TopkLogprobs:
        ids = [np.zeros((1, k), np.int64)]
        logprobs = [np.full((1, k), TopkLogprobs.UNUSED_LOGPROB, np.float32)]
        chunk = max(1, 2**22 // self._base.head.vocab_size)
        for start in range(0, len(hidden_NH), chunk):
            part = hidden_NH[start : start + chunk]
            segments = [Segment(0, len(part), own[0].weights)]
            top = torch.log_softmax(logits_of(part, self._base.head, segments), dim=-1).topk(k, dim=-1)
            ids.append(top.indices.cpu().numpy())
            logprobs.append(top.values.cpu().numpy())
        return TopkLogprobs(np.concatenate(ids), np.concatenate(logprobs))

    # ---- decode ----

    def _decode_batch(self) -> list[tuple[_Request, _Sequence]]:
        """Live sequences, adapters together, for which the cache has room; younger requests make room for older."""
        batch: list[tuple[_Request, _Sequence]] = []
        needed = 0
        for request in list(self._running):
            if request not in self._running:
                continue
            wanted = sum(self._cache.blocks_needed(s.table, 1) for s in request.live)
            while needed + wanted > self._cache.num_free_blocks and self._running[-1] is not request:
                self._preempt(self._running[-1])
            if needed + wanted > self._cache.num_free_blocks:
                if not batch:
                    self._fail(request, ServerError("the key-value cache is too small for this request's samples"))
                break
            needed += wanted
            batch.extend((request, sequence) for sequence in request.live)
        return sorted(batch, key=lambda pair: pair[0].adapter_key)

    def _preempt(self, request: _Request) -> None:
        for sequence in request.sequences:
            self._cache.release(sequence.table)
        self._running.remove(request)
        self._waiting.appendleft(request)

    def _decode(self, batch: list[tuple[_Request, _Sequence]]) -> None:
        if not batch:
            return
        positions = [np.array([sequence.table.num_tokens]) for _, sequence in batch]
        plan = self._cache.plan_decode([sequence.table for _, sequence in batch])
        segments = _segments([(request.weights, 1) for request, _ in batch])
        layout = PassLayout(cache=self._cache, plan=plan, is_decode=True)
        newest = [np.array([sequence.tokens[-1]]) for _, sequence in batch]
        hidden_BH = self._hidden(newest, positions, segments, layout)
        self._draw(batch, logits_of(hidden_BH, self._base.head, segments))

    def _hidden(
        self, tokens: Sequence[np.ndarray], positions: Sequence[np.ndarray], segments: list[Segment], layout: PassLayout
    ) -> Tensor:
        ids_T = torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(self._base.device)
        positions_T = torch.from_numpy(np.concatenate(positions).astype(np.int64)).to(self._base.device)
        return self._base.hidden(ids_T, positions_T, segments, layout)

    # ---- drawing and ending ----

    def _draw(self, batch: Sequence[tuple[_Request, _Sequence]], logits_BV: Tensor) -> None:
        batch, logits_BV = self._without_broken(batch, logits_BV)
        if not batch:
            return
        uniforms = [uniform(r.operation.seed, s.index, len(s.tokens)) for r, s in batch]
        topk = max(r.operation.topk_sample_logprobs for r, _ in batch)
        choices = choose(logits_BV, [r.rule for r, _ in batch], uniforms, topk=topk)
        self.tokens_sampled += len(batch)
        for row, (request, sequence) in enumerate(batch):
            self._extend(request, sequence, choices, row)
        for request in dict.fromkeys(request for request, _ in batch):
            if not request.live:
                self._running.remove(request)
                self._finish(request.ticket, _response(request))

    def _without_broken(
        self, batch: Sequence[tuple[_Request, _Sequence]], logits_BV: Tensor
    ) -> tuple[Sequence[tuple[_Request, _Sequence]], Tensor]:
        """Fail requests whose logits are not finite; the others of the batch go on untouched."""
        finite_B = torch.isfinite(logits_BV).all(dim=-1).tolist()
        if all(finite_B):
            return batch, logits_BV
        broken = {request for (request, _), finite in zip(batch, finite_B, strict=True) if not finite}
        for request in broken:
            error = UserError("the adapter computes logits that are not finite; nothing can be drawn")
            self._fail(request, error, scrub=True)
        keep = [i for i, (request, _) in enumerate(batch) if request not in broken]
        return [batch[i] for i in keep], logits_BV[torch.tensor(keep, dtype=torch.int64, device=logits_BV.device)]

    def _extend(self, request: _Request, sequence: _Sequence, choices: Choices, row: int) -> None:
        sequence.tokens.append(int(choices.tokens_B[row]))
        sequence.logprobs.append(float(choices.logprobs_B[row]))
        k = request.operation.topk_sample_logprobs
        if k and choices.topk_ids_BK is not None and choices.topk_logprobs_BK is not None:
            sequence.topk.append((choices.topk_ids_BK[row, :k], choices.topk_logprobs_BK[row, :k]))
        sequence.stop_reason = request.stop.reason(sequence.tokens, self._decoder)
        if sequence.stop_reason is not None:
            self._cache.release(sequence.table)

    def _fail(self, request: _Request, error: TinsmithError, *, scrub: bool = False) -> None:
        for sequence in request.sequences:
            self._cache.release(sequence.table, scrub=scrub)
        if request in self._running:
            self._running.remove(request)
        if request in self._waiting:
            self._waiting.remove(request)
        self._finish(request.ticket, error)


def _prefill_rows(request: _Request) -> list[list[_Sequence]]:
    """Samples that still hold the bare prompt share one row; a sample interrupted while drawing needs its own."""
    untouched = [s for s in request.live if not s.tokens]
    return ([untouched] if untouched else []) + [[s] for s in request.live if s.tokens]


def _prefill_lengths(request: _Request) -> list[int]:
    return [len(request.operation.prompt) + len(row[0].tokens) for row in _prefill_rows(request)]


def _row_tokens(request: _Request, sequences: Sequence[_Sequence]) -> np.ndarray:
    return np.concatenate([request.operation.prompt, np.asarray(sequences[0].tokens, dtype=np.int64)])


def _segments(runs: Sequence[tuple[LoraWeights | None, int]]) -> list[Segment]:
    """Contiguous rows of the same weights, from `(weights, rows)` in packed order."""
    segments: list[Segment] = []
    at = 0
    for _, group in groupby(runs, key=lambda run: id(run[0])):
        members = list(group)
        end = at + sum(length for _, length in members)
        segments.append(Segment(at, end, members[0][0]))
        at = end
    return segments


def _response(request: _Request) -> SampleResponse:
    return SampleResponse(
        sequences=[_sampled(sequence) for sequence in request.sequences],
        prompt_logprobs_np=request.prompt_logprobs,
        topk_prompt_logprobs_np=request.topk_prompt,
    )


def _sampled(sequence: _Sequence) -> SampledSequence:
    assert sequence.stop_reason is not None
    topk = None
    if sequence.topk:
        topk = TopkLogprobs(np.stack([ids for ids, _ in sequence.topk]), np.stack([lps for _, lps in sequence.topk]))
    return SampledSequence(
        stop_reason=sequence.stop_reason,
        tokens_np=np.asarray(sequence.tokens, dtype=np.int64),
        logprobs_np=np.asarray(sequence.logprobs, dtype=np.float32),
        topk_logprobs_np=topk,
    )
