"""A sampling request inside the engine, its sequences, and the stages they are in before they draw."""

# N prompt token

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tinsmith.engine.block_pool import BLOCK_TOKENS, end_key
from tinsmith.engine.lora import LoraWeights
from tinsmith.engine.prompt_scores import PromptScores
from tinsmith.engine.stopping import StopStrings
from tinsmith.engine.vision import ImageRows, positions_of
from tinsmith.types.images import PlacedImage
from tinsmith.types.operations import Sample
from tinsmith.types.results import SampledSequence, SampleResponse, StopReason, TopkLogprobs


@dataclass(slots=True, eq=False)
class Request:
    ticket: int
    operation: Sample
    weights: LoraWeights | None
    owner: bytes
    """Names the weights in the prefix cache."""
    prompt_keys: list[bytes]
    """Of the prompt's full blocks."""
    stop_strings: StopStrings | None
    scores: PromptScores | None
    sequences: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    cache_hit_tokens: int | None = None
    """Prompt tokens that were not computed because the cache had them; `None` until the prompt is begun."""
    is_over: bool = False
    """Answered, with a result or an error."""
    scored_by: Prefill | None = None
    prompt_positions_3N: np.ndarray | None = field(init=False)
    """Where the prompt holds pictures; without them tokens are simply counted."""
    shift: int = field(init=False, default=0)
    """What to add to a drawn token's index for its position."""

    def __post_init__(self) -> None:
        images, num_tokens = self.operation.images, len(self.operation.prompt)
        self.prompt_positions_3N = positions_of(num_tokens, images) if images else None
        if self.prompt_positions_3N is not None:
            self.shift = int(self.prompt_positions_3N.max()) + 1 - num_tokens

    @property
    def adapter(self) -> int:
        """Equal for equal weights, 0 for the base model; equal ranks lie next to each other."""
        return 0 if self.weights is None else (self.weights.layout.spec.rank << 48) | (id(self.weights) & (2**48 - 1))

    def positions(self, start: int, end: int) -> np.ndarray:
        """Of its tokens `[start, end)`, prompt and drawn: `[n]`, or `[3, n]` if the prompt holds pictures."""
        if self.prompt_positions_3N is None:
            return np.arange(start, end)
        prompt_3N = self.prompt_positions_3N
        drawn_n = np.arange(max(start, prompt_3N.shape[1]), end) + self.shift
        return np.concatenate([prompt_3N[:, start:end], np.broadcast_to(drawn_n, (3, len(drawn_n)))], axis=1)

    def response(self) -> SampleResponse:
        scores = self.scores
        return SampleResponse(
            sequences=[sequence.result() for sequence in self.sequences],
            prompt_logprobs_np=scores.prompt_logprobs if scores else None,
            topk_prompt_logprobs_np=scores.topk if scores else None,
            target_prompt_logprobs=scores.targets if scores else None,
            prompt_alt_tokens=scores.alternatives if scores else None,
            prompt_cache_hit_tokens=self.cache_hit_tokens or 0,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample on its way. While it has a slot of the decode batch, the newest of what it drew lies there."""

    request: Request
    index: int
    slot: int | None = None
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    topk: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    stop_reason: StopReason | None = None

    def result(self) -> SampledSequence:
        assert self.stop_reason is not None
        topk = None
        if self.topk:
            topk = TopkLogprobs(np.stack([ids for ids, _ in self.topk]), np.stack([lps for _, lps in self.topk]))
        return SampledSequence(
            stop_reason=self.stop_reason, tokens_np=self.tokens, logprobs_np=self.logprobs, topk_logprobs_np=topk
        )


@dataclass(slots=True, eq=False)
class Pending:
    """Sequences of a request that wait for their prompt to be computed; all have the same tokens so far."""

    request: Request
    sequences: list[Sequence]
    tokens: np.ndarray
    """Prompt and what was drawn before an interruption."""
    keys: list[bytes]
    """Of the full blocks of `tokens`."""

    @property
    def end_key(self) -> bytes:
        return end_key(self.request.owner, self.tokens, self.keys)

    @property
    def is_scored(self) -> bool:
        """Nothing is left to be known of the prompt's rows."""
        scores = self.request.scores
        return scores is None or scores.is_complete

    @property
    def blocks_reusable(self) -> int:
        """Full blocks that need not be computed if the cache has them: the last row must be, and rows to be scored."""
        scores = self.request.scores
        last = len(self.tokens) - 1
        if scores is not None and not self.is_scored:
            last = min(last, scores.next_row)
        return last // BLOCK_TOKENS


@dataclass(slots=True, eq=False)
class Prefill:
    """Tokens of a sequence on their way into the cache, for it and those that begin alike."""

    pending: Pending
    sequences: list[Sequence]
    blocks: list[int]
    """For all tokens."""
    tails: list[int]
    """For each further sequence a last block of its own, if the last block is not full."""
    num_done: int
    """Tokens in the cache so far."""
    num_registered: int
    """Full blocks whose content the cache knows by key."""

    @property
    def request(self) -> Request:
        return self.pending.request

    @property
    def num_left(self) -> int:
        return len(self.pending.tokens) - self.num_done


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Rows `[start, end)` of a prefill, computed in one pass."""

    prefill: Prefill
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    def image_rows(self, first_row: int) -> Iterator[ImageRows]:
        """The rows of pictures among them; the chunk's own begin at packed row `first_row`."""
        for image in self.prefill.request.operation.images:
            start, end = max(self.start, image.start), min(self.end, image.end)
            if start < end:
                yield ImageRows(
                    image,
                    at=first_row + start - self.start,
                    first=start - image.start,
                    end=end - image.start,
                    where=image_place(image),
                )


def image_place(image: PlacedImage) -> str:
    """What errors call a picture of a prompt."""
    return f"prompt.chunks[{image.chunk_index}]"
