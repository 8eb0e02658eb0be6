"""Continuous batching: in every pass all running sequences advance by one token, and waiting prompts by a chunk.

A prompt is computed once for all samples of its request, and not at all as far as the cache still has it. Whatever its
adapter, every sequence takes part in the same pass. If the cache runs out, the youngest give their blocks back and are
computed again later; their draws do not change, because they depend only on their own seed and positions.
"""

# T packed row, B drawing sequence, V vocabulary, H hidden

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.base_model import BaseModel
from tinsmith.engine.block_pool import BASE_OWNER, BLOCK_TOKENS, PromptEnd, block_keys, blocks_for
from tinsmith.engine.decode_batch import DecodeBatch
from tinsmith.engine.figures import Figures
from tinsmith.engine.kv_cache import KVCache
from tinsmith.engine.lora import LoraWeights
from tinsmith.engine.loss_head import logits_of, target_logprobs
from tinsmith.engine.places import Places
from tinsmith.engine.prompt_scores import PromptScores, scores_of
from tinsmith.engine.sampling_pass import PackedPass, pack_pass, segments_of
from tinsmith.engine.sampling_request import Chunk, Pending, Prefill, Request, Sequence, image_place
from tinsmith.engine.stopping import Decoder, StopStrings
from tinsmith.engine.token_choice import Choices, choose
from tinsmith.types.errors import InvalidInput, ServerError, TinsmithError, UserError
from tinsmith.types.operations import Sample
from tinsmith.types.results import DrawnToken, SampleResponse
from tinsmith.types.shares import Payer

_PREFILL_BESIDE_RUNNING = 1024
"""Prompt tokens per pass while running sequences wait for it to end."""
_PREFILL_BESIDE_TRAINING = 512
"""The same while training waits."""
_SMALLEST_CHUNK = 64
"""A prompt is not cut for what is left of a pass if that is less."""
_MAX_PASSED_OVER = 64
"""Requests that may be overtaken because the cache is about to have their prompt."""
_LOGITS_AT_ONCE = 2**24

Tell: TypeAlias = Callable[[int, DrawnToken | SampleResponse | TinsmithError], None]


class Sampler:
    """All sampling on one base model. `tell` is called once per ticket with the response or the error; before that, if
    the request is streamed, with each token."""

    def __init__(
        self,
        base: BaseModel,
        decoder: Decoder,
        tell: Tell,
        *,
        kv_cache_bytes: int,
        max_prefill_tokens: int,
        max_decode_batch: int,
        keep_prompts: bool = True,
        figures: Figures | None = None,
    ) -> None:
        self._base = base
        self._decoder = decoder
        self._tell = tell
        self._max_prefill_tokens = max_prefill_tokens
        self._figures = figures or Figures()
        self._cache = KVCache(bytes_max=kv_cache_bytes, bytes_per_token=base.kv_bytes_per_token, device=base.device)
        self._pool = self._cache.blocks
        self._keep_prompts = keep_prompts
        self._batch = DecodeBatch(max_decode_batch)
        self._open: dict[int, Request] = {}
        self._places = Places()
        self._prefills: list[Prefill] = []
        self._computing: dict[bytes, Prefill] = {}
        """Keys of blocks, and of prompts' ends, that a prefill will have computed soon."""
        self._resumed: list[tuple[int, Tensor]] = []
        """Slots that joined without a prefill, and the hidden state their first token is drawn from."""
        self.tokens_sampled = 0
        self.tokens_prefilled = 0

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    @property
    def num_running(self) -> int:
        """Requests with a sequence in progress."""
        running = {s.request.ticket for s in self._batch.sequences if s is not None}
        return len(running.union(p.request.ticket for p in self._prefills))

    @property
    def cache_blocks(self) -> tuple[int, int]:
        """All there are for sequences, and how many are free."""
        return self._pool.num_blocks - 1, self._pool.num_free

    @property
    def num_waiting(self) -> int:
        return len(self._open) - self.num_running

    def add(self, ticket: int, operation: Sample, weights: LoraWeights | None, digest: str | None) -> None:
        """Queue a request; the weights must be frozen, `digest` theirs. One that can never be done fails at once."""
        owner = BASE_OWNER if digest is None else digest.encode()
        request = Request(
            ticket=ticket,
            operation=operation,
            weights=weights,
            owner=owner,
            stop_strings=StopStrings(operation.stop_strings) if operation.stop_strings else None,
            scores=scores_of(operation),
            num_unfinished=operation.num_samples,
            prompt_keys=block_keys(owner, operation.prompt),
        )
        request.sequences = [Sequence(request, index) for index in range(operation.num_samples)]
        try:
            self._check_possible(operation)
            for image in operation.images:
                self._base.check_image(image, image_place(image))
        except TinsmithError as error:
            self._tell(ticket, error)
            return
        if self._keep_prompts:
            self._pool.open(owner)
        self._open[ticket] = request
        self._places.wait(_pending(request.sequences))

    def cancel(self, ticket: int) -> None:
        """Whatever stage it is in. Unknown tickets are no error."""
        if ticket in self._open:
            self._fail(self._open[ticket], UserError("the sample was cancelled"))

    def fail_all(self, error: TinsmithError) -> None:
        for request in list(self._open.values()):
            self._fail(request, error)

    def forget(self, digest: str) -> None:
        """Weights of this digest will not be sampled any more: their cached prompts make room."""
        self._pool.forget(digest.encode())

    def step(self, *, shared: bool = False) -> None:
        """One pass. `shared`: training waits for the device, so let it be short."""
        self._make_room()
        budget = self._max_prefill_tokens
        if shared or self._batch.num_running:
            budget = min(budget, _PREFILL_BESIDE_TRAINING if shared else _PREFILL_BESIDE_RUNNING)
        self._places.settle()
        self._admit(budget)
        chunks = self._next_chunks(budget)
        resumed, self._resumed = self._resumed, []
        slots_B = self._batch.rows()
        if resumed:  # their newest token is yet to be drawn
            slots_B = slots_B[~np.isin(slots_B, [slot for slot, _ in resumed])]
        if not chunks and not len(slots_B) and not resumed:
            return
        self._places.charge_pass()
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                self._compute(chunks, slots_B, resumed)
        except (RuntimeError, MemoryError) as error:  # a device fault fails the requests of this pass, not the engine
            slots = [*slots_B.tolist(), *(slot for slot, _ in resumed)]
            running = (self._batch.sequences[slot] for slot in slots)
            requests = [c.prefill.request for c in chunks] + [s.request for s in running if s is not None]
            for request in requests:
                self._fail(request, ServerError(f"sampling failed on the device: {error}"), tainted=True)
        self._figures.sampling_pass(
            time.perf_counter() - began,
            prompt_rows=sum(chunk.length for chunk in chunks),
            drawing_rows=len(slots_B) + len(resumed),
        )

    def _check_possible(self, operation: Sample) -> None:
        """Raises `InvalidInput` if the cache can never hold it, `Unsupported` if its stop strings cannot be found."""
        tokens = len(operation.prompt) + operation.max_tokens - 1  # the last token drawn is not read again
        room = (self._pool.num_blocks - 1) * BLOCK_TOKENS
        if tokens > room:
            raise InvalidInput(
                f"prompt of {len(operation.prompt)} tokens and sampling_params.max_tokens {operation.max_tokens} need "
                f"a cache of {tokens} tokens; this engine's holds {room}"
            )
        if operation.stop_strings:
            self._decoder.decode([max(0, int(operation.prompt[-1]))])

    # ---- who takes part ----

    def _make_room(self) -> None:
        """Lend every running sequence the block its next token needs; the younger make room for the older."""
        while len(slots := self._batch.needing_block()) > self._pool.num_free:
            self._places.wait(self._preempt_youngest(), first=True)
        if len(slots):
            owners = [self._sequence(slot).request.owner for slot in slots.tolist()]
            self._batch.add_blocks(slots, [self._pool.take(1, owner)[0] for owner in owners])

    def _preempt_youngest(self, payer: Payer | None = None) -> Pending:
        """What is to wait again. `payer`: only of its sequences, of which there is one."""
        prefills = [p for p in self._prefills if payer is None or p.request.operation.payer == payer]
        if prefills:
            self._drop_prefill(prefills[-1])
            sequences = prefills[-1].sequences
        else:
            sequences = [self._sequence(self._youngest(payer))]
            self._leave(sequences[0])
        return _pending(sequences)

    def _youngest(self, payer: Payer | None) -> int:
        if payer is None:
            return self._batch.youngest()
        slots = self._batch.rows().tolist()
        return self._batch.youngest([slot for slot in slots if self._sequence(slot).request.operation.payer == payer])

    def _admit(self, budget: int) -> None:
        """Begin waiting prompts, by shares, while this pass, the batch and the cache have room.

        For those behind their share room is made, and a prompt is begun even if those of others take all of this pass.
        """
        passed_over: list[Pending] = []
        yielded: list[Pending] = []  # not before the next pass again, or two would take turns for ever
        queued = sum(prefill.num_left for prefill in self._prefills)
        while self._places.is_wanted and len(passed_over) < _MAX_PASSED_OVER:
            pending = self._places.next()
            if pending.request.is_over:
                continue
            if queued >= budget and self._places.reads(pending.request, self._prefills):
                self._places.wait(pending, first=True)
                break
            reused = self._pool.find(pending.keys[: pending.blocks_reusable])
            if self._is_on_its_way(pending, len(reused)):
                passed_over.append(pending)
                continue
            end = self._known_end(pending, len(reused))
            count = self._num_that_fit(pending, reused, end)
            while count == 0 and (payer := self._places.who_yields(pending.request)) is not None:
                yielded.append(self._preempt_youngest(payer))
                count = self._num_that_fit(pending, reused, end)
            if count == 0:
                self._places.wait(pending, first=True)
                break
            if end is not None:
                self._resume(pending, reused, end, count)
            else:
                queued += self._begin(pending, reused, count).num_left
        for pending in [*yielded, *reversed(passed_over)]:
            self._places.wait(pending, first=True)

    def _is_on_its_way(self, pending: Pending, num_reused: int) -> bool:
        """Someone is computing what this one could reuse in a moment."""
        if pending.request.scored_by is not None:
            return True
        if num_reused < pending.blocks_reusable:
            return pending.keys[num_reused] in self._computing
        return pending.is_scored and pending.end_key in self._computing

    def _known_end(self, pending: Pending, num_reused: int) -> PromptEnd | None:
        """Set if all of the prompt was computed before and is kept."""
        if not pending.is_scored or num_reused < pending.blocks_reusable:
            return None
        return self._pool.find_end(pending.end_key)

    def _num_that_fit(self, pending: Pending, reused: list[int], end: PromptEnd | None) -> int:
        """How many of the sequences can begin now. All running ones may soon want a block, so that many stay free."""
        num_busy = self._batch.num_running + sum(len(p.sequences) for p in self._prefills)
        count = min(len(pending.sequences), self._batch.capacity - num_busy)
        read = reused if end is None else [*reused, end.block]
        kept = sum(self._pool.num_users(block) == 0 for block in read)
        spare = self._pool.num_free - kept - num_busy - (blocks_for(len(pending.tokens)) - len(reused))
        return max(0, min(count, spare + 1))

    def _begin(self, pending: Pending, reused: list[int], count: int) -> Prefill:
        request, num_tokens = pending.request, len(pending.tokens)
        self._wait_again(pending.sequences[count:])
        self._pool.share(reused)
        num_tails = count - 1 if num_tokens % BLOCK_TOKENS else 0
        fresh = self._pool.take(blocks_for(num_tokens) - len(reused) + num_tails, request.owner)
        num_tail_start = len(fresh) - num_tails
        prefill = Prefill(
            pending=pending,
            sequences=pending.sequences[:count],
            blocks=reused + fresh[:num_tail_start],
            tails=fresh[num_tail_start:],
            num_done=len(reused) * BLOCK_TOKENS,
            num_registered=len(reused),
        )
        if request.cache_hit_tokens is None:
            request.cache_hit_tokens = prefill.num_done
        if request.scores is not None and not request.scores.is_complete:
            request.scored_by = prefill
        for key in [*pending.keys[len(reused) :], *([pending.end_key] if self._pool.is_open(request.owner) else [])]:
            self._computing.setdefault(key, prefill)
        self._prefills.append(prefill)
        self._places.take(request, count)
        return prefill

    def _resume(self, pending: Pending, reused: list[int], end: PromptEnd, count: int) -> None:
        """Let sequences join whose prompt is in the cache to its last token: nothing of it is computed."""
        request, num_tokens = pending.request, len(pending.tokens)
        self._wait_again(pending.sequences[count:])
        if request.cache_hit_tokens is None:
            request.cache_hit_tokens = num_tokens
        self._pool.share([*reused, end.block])
        tails = self._pool.take(count, request.owner) if num_tokens % BLOCK_TOKENS else []
        if tails:
            self._cache.zero_stale()
            self._cache.copy([end.block] * count, tails)
        for index, sequence in enumerate(pending.sequences[:count]):
            shared = reused if tails else [*reused, end.block]
            self._pool.share(shared)
            slot = self._batch.join(sequence, shared + tails[index : index + 1], num_tokens)
            self._places.take(request, 1)
            self._resumed.append((slot, end.hidden_H))
        self._pool.release([*reused, end.block])

    def _wait_again(self, sequences: list[Sequence]) -> None:
        if sequences:
            self._places.wait(_pending(sequences), first=True)

    def _next_chunks(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for prefill in self._places.in_order(self._prefills):
            count = min(prefill.num_left, budget)
            if count == 0 or (chunks and count < min(prefill.num_left, _SMALLEST_CHUNK)):
                break
            chunks.append(Chunk(prefill, prefill.num_done, prefill.num_done + count))
            self._places.charge_prompt(prefill.request, count)
            budget -= count
        return chunks

    # ---- the pass ----

    def _compute(self, chunks: list[Chunk], slots_B: np.ndarray, resumed: list[tuple[int, Tensor]]) -> None:
        joined: list[int] = []
        rows: list[int] = []
        hidden = [hidden_H[None] for _, hidden_H in resumed]
        num_rows = num_chunk_rows = 0
        if chunks or len(slots_B):
            packed = pack_pass(chunks, self._batch, slots_B, self._cache, self._base.device)
            self._cache.zero_stale()
            hidden_TH = self._base.hidden(
                packed.ids_T, packed.positions_T, packed.segments, packed.layout, packed.images
            )
            self._batch.cached_S[slots_B] += 1
            num_rows, num_chunk_rows = len(hidden_TH), packed.num_chunk_rows
            self.tokens_prefilled += num_chunk_rows
            if chunks:
                self._fail_broken_prompts(packed, hidden_TH)
                self._score_prompts(packed, hidden_TH)
            joined, rows = self._end_prefills(packed, hidden_TH)
            hidden.insert(0, hidden_TH)
        new = np.array([*joined, *(slot for slot, _ in resumed)], np.int64)
        new_rows = np.array([*rows, *range(num_rows, num_rows + len(resumed))], np.int64)
        slots = np.concatenate([new, slots_B]) if len(new) else slots_B
        rows_B = np.concatenate([new_rows, num_chunk_rows + np.arange(len(slots_B))])
        self._draw_all(slots, rows_B, torch.cat(hidden) if resumed else hidden[0])

    def _draw_all(self, slots: np.ndarray, rows_B: np.ndarray, hidden_TH: Tensor) -> None:
        size = max(1, _LOGITS_AT_ONCE // self._base.head.vocab_size)
        for start in range(0, len(slots), size):
            some = slots[start : start + size] if len(slots) > size else slots
            kept = self._still_running(some)
            if kept.all():
                self._draw(some, rows_B[start : start + size], hidden_TH)
            elif kept.any():
                self._draw(some[kept], rows_B[start : start + size][kept], hidden_TH)

    def _fail_broken_prompts(self, packed: PackedPass, hidden_TH: Tensor) -> None:
        """A row whose key or value is not finite has a hidden state that is not."""
        finite_T = torch.isfinite(hidden_TH[: packed.num_chunk_rows].float().sum(dim=-1)).cpu().numpy()
        if finite_T.all():
            return
        for first, chunk in zip(packed.first_rows, packed.chunks, strict=True):
            if not finite_T[first : first + chunk.length].all():
                self._fail_as_broken(chunk.prefill.request)

    def _score_prompts(self, packed: PackedPass, hidden_TH: Tensor) -> None:
        """What requests want to know of the rows of this pass: given tokens for all at once, the rest one by one."""
        asking = []
        for first, chunk in zip(packed.first_rows, packed.chunks, strict=True):
            request = chunk.prefill.request
            scores = request.scores
            if scores is None or request.scored_by is not chunk.prefill:
                continue
            start, end = scores.next_row, min(chunk.end, scores.end_row)
            if start < end:
                asking.append((request, scores, first - chunk.start, start, end))
        self._score_pairs(asking, hidden_TH)
        for request, scores, shift, start, end in asking:
            low, high = scores.distribution_rows(start, end)
            size = max(1, _LOGITS_AT_ONCE // 4 // self._base.head.vocab_size)
            for at in range(low, high, size):
                rows_CH = hidden_TH[shift + at : shift + min(at + size, high)]
                segments = segments_of([(request.weights, len(rows_CH))])
                scores.put_distributions(at, logits_of(rows_CH, self._base.head, segments))
            scores.next_row = end
            if scores.is_complete:
                request.scored_by = None

    def _score_pairs(self, asking: list[tuple[Request, PromptScores, int, int, int]], hidden_TH: Tensor) -> None:
        """`asking`: request, scores, what to add to a prompt row for the packed row, first and end prompt row."""
        pairs = [(scores.pairs(start, end), shift) for _, scores, shift, start, end in asking]
        if not any(len(rows) for (rows, _), _ in pairs):
            return
        device = hidden_TH.device
        packed_M = np.concatenate([rows + shift for (rows, _), shift in pairs])
        tokens_M = np.concatenate([tokens for (_, tokens), _ in pairs])
        needed = [np.unique(rows) + shift for (rows, _), shift in pairs]
        needed_T = np.concatenate(needed)
        rows_M = torch.from_numpy(np.searchsorted(needed_T, packed_M)).to(device)
        segments = segments_of([(request.weights, len(n)) for (request, *_), n in zip(asking, needed, strict=True)])
        hidden = hidden_TH.index_select(0, torch.from_numpy(needed_T).to(device))
        scored_M = target_logprobs(hidden, self._base.head, segments, rows_M, torch.from_numpy(tokens_M).to(device))
        parts = np.split(scored_M.cpu().numpy(), np.cumsum([len(rows) for (rows, _), _ in pairs])[:-1])
        for (_, scores, _, start, end), part in zip(asking, parts, strict=True):
            scores.put_pairs(start, end, part)

    def _end_prefills(self, packed: PackedPass, hidden_TH: Tensor) -> tuple[list[int], list[int]]:
        """Note what is computed. Sequences whose prompt is done join the batch: their slots and packed rows."""
        slots: list[int] = []
        rows: list[int] = []
        sources: list[int] = []
        targets: list[int] = []
        for first, chunk in zip(packed.first_rows, packed.chunks, strict=True):
            prefill = chunk.prefill
            if prefill.request.is_over:
                continue
            prefill.num_done = chunk.end
            self._register(prefill)
            if prefill.num_left:
                continue
            self._remove_prefill(prefill)
            last_row = first + chunk.length - 1
            self._register_end(prefill, hidden_TH[last_row])
            sources.extend([prefill.blocks[-1]] * len(prefill.tails))
            targets.extend(prefill.tails)
            slots.extend(self._join(prefill))
            rows.extend([last_row] * len(prefill.sequences))
        if targets:
            self._cache.copy(sources, targets)
        return slots, rows

    def _join(self, prefill: Prefill) -> list[int]:
        """The first sequence takes over the blocks; the others share them, but for a last block of their own."""
        self._places.take(prefill.request, len(prefill.sequences))
        num_tokens = len(prefill.pending.tokens)
        slots = [self._batch.join(prefill.sequences[0], prefill.blocks, num_tokens)]
        for index, sequence in enumerate(prefill.sequences[1:]):
            shared = prefill.blocks[:-1] if prefill.tails else prefill.blocks
            self._pool.share(shared)
            own = prefill.tails[index : index + 1]
            slots.append(self._batch.join(sequence, shared + own, num_tokens))
        return slots

    def _register(self, prefill: Prefill) -> None:
        keys = prefill.pending.keys
        for index in range(prefill.num_registered, min(prefill.num_done // BLOCK_TOKENS, len(keys))):
            self._pool.register(prefill.blocks[index], keys[index], prefill.request.owner)
        prefill.num_registered = prefill.num_done // BLOCK_TOKENS

    def _register_end(self, prefill: Prefill, hidden_H: Tensor) -> None:
        owner = prefill.request.owner
        if self._pool.is_open(owner):
            self._pool.register_end(prefill.blocks[-1], prefill.pending.end_key, owner, hidden_H.clone())

    # ---- drawing and ending ----

    def _draw(self, slots_B: np.ndarray, rows_B: np.ndarray, hidden_TH: Tensor) -> None:
        hidden_BH = hidden_TH.index_select(0, torch.from_numpy(rows_B).to(hidden_TH.device))
        logits_BV = logits_of(hidden_BH, self._base.head, segments_of(self._batch.runs(slots_B)))
        topk_B = self._batch.topk_S[slots_B]
        rules, numbers_B = self._batch.draw_rules(slots_B)
        choices = choose(logits_BV, rules, numbers_B, topk=int(topk_B.max()))
        for slot in slots_B[~choices.finite_B].tolist():
            if (broken := self._batch.sequences[slot]) is not None:
                self._fail_as_broken(broken.request)  # the others of the batch go on untouched
        kept = self._still_running(slots_B)
        for row in np.flatnonzero(kept & (topk_B > 0)).tolist():
            self._note_topk(int(slots_B[row]), choices, row, int(topk_B[row]))
        slots_B = slots_B[kept]
        tokens_B, logprobs_B = choices.tokens_B[kept], choices.logprobs_B[kept]
        self.tokens_sampled += len(slots_B)
        stopped_B, full_B = self._batch.extend(slots_B, tokens_B, logprobs_B)
        for row in np.flatnonzero(self._batch.with_strings(slots_B) & ~stopped_B).tolist():
            stopped_B[row] = self._completes_string(int(slots_B[row]))
        for row in np.flatnonzero(stopped_B | full_B).tolist():
            self._sequence(int(slots_B[row])).stop_reason = "stop" if stopped_B[row] else "length"
        for row in np.flatnonzero(self._batch.streamed(slots_B)).tolist():
            self._stream(self._sequence(int(slots_B[row])), int(tokens_B[row]), float(logprobs_B[row]))
        for row in np.flatnonzero(stopped_B | full_B).tolist():
            self._end(self._sequence(int(slots_B[row])))

    def _still_running(self, slots_B: np.ndarray) -> np.ndarray:
        """Which slots were not emptied since the pass began, by the failure of their request. Bool `[B]`."""
        return np.array([self._batch.sequences[slot] is not None for slot in slots_B.tolist()], bool)

    def _note_topk(self, slot: int, choices: Choices, row: int, k: int) -> None:
        assert choices.topk_ids_BK is not None
        assert choices.topk_logprobs_BK is not None
        ids, logprobs = choices.topk_ids_BK[row, :k].copy(), choices.topk_logprobs_BK[row, :k].copy()
        self._sequence(slot).topk.append((ids, logprobs))

    def _stream(self, sequence: Sequence, token: int, logprob: float) -> None:
        ids, logprobs = ([], []) if not sequence.topk else (array.tolist() for array in sequence.topk[-1])
        drawn = DrawnToken(
            index=sequence.index,
            token=token,
            logprob=logprob,
            topk=tuple(zip(ids, logprobs, strict=True)),
            stop_reason=sequence.stop_reason,
        )
        self._tell(sequence.request.ticket, drawn)

    def _completes_string(self, slot: int) -> bool:
        strings = self._sequence(slot).request.stop_strings
        assert strings is not None
        return strings.completed_by(self._batch.tail(slot, strings.tail_tokens), self._decoder)

    def _end(self, sequence: Sequence) -> None:
        self._leave(sequence)
        request = sequence.request
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            request.is_over = True
            del self._open[request.ticket]
            self._tell(request.ticket, request.response())

    def _fail_as_broken(self, request: Request) -> None:
        error = UserError("the adapter computes logits that are not finite; nothing can be drawn")
        self._fail(request, error, tainted=True)

    def _fail(self, request: Request, error: TinsmithError, *, tainted: bool = False) -> None:
        """Whatever stage it is in. Places in the waiting line are given up when their turn comes."""
        if request.is_over:
            return
        request.is_over = True
        del self._open[request.ticket]
        for prefill in [p for p in self._prefills if p.request is request]:
            self._drop_prefill(prefill, tainted=tainted)
        for sequence in request.sequences:
            if sequence.slot is not None:
                self._leave(sequence, tainted=tainted)
        self._tell(request.ticket, error)

    def _leave(self, sequence: Sequence, *, tainted: bool = False) -> None:
        """Take a sequence out of the batch. What its blocks hold is kept for those who continue from there."""
        assert sequence.slot is not None
        request = sequence.request
        self._places.give_back(request, 1)
        num_cached = int(self._batch.cached_S[sequence.slot])
        self._resumed = [(slot, hidden_H) for slot, hidden_H in self._resumed if slot != sequence.slot]
        blocks = self._batch.leave(sequence.slot)
        if not tainted and self._pool.is_open(request.owner):
            tokens = np.concatenate([request.operation.prompt, sequence.tokens])[:num_cached]
            for block, key in zip(blocks, block_keys(request.owner, tokens, request.prompt_keys), strict=False):
                self._pool.register(block, key, request.owner)
        self._pool.release(blocks, tainted=tainted)

    def _drop_prefill(self, prefill: Prefill, *, tainted: bool = False) -> None:
        self._remove_prefill(prefill)
        self._pool.release(prefill.blocks + prefill.tails, tainted=tainted)

    def _remove_prefill(self, prefill: Prefill) -> None:
        self._prefills.remove(prefill)
        self._places.give_back(prefill.request, len(prefill.sequences))
        for key in [*prefill.pending.keys, prefill.pending.end_key]:
            if self._computing.get(key) is prefill:
                del self._computing[key]
        if prefill.request.scored_by is prefill:
            prefill.request.scored_by = None

    def _sequence(self, slot: int) -> Sequence:
        sequence = self._batch.sequences[slot]
        assert sequence is not None
        return sequence


def _pending(sequences: list[Sequence]) -> Pending:
    """`sequences`, all of one request, have the same tokens so far."""
    request = sequences[0].request
    tokens = np.concatenate([request.operation.prompt, sequences[0].tokens])
    return Pending(request, sequences, tokens, block_keys(request.owner, tokens, request.prompt_keys))
