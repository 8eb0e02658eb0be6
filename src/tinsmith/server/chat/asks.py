"""What the dialects ask of the desk: one prompt to continue, free of any dialect."""

from __future__ import annotations

from dataclasses import dataclass

from tinsmith.control.requests import DrawSamples
from tinsmith.server.chat.fields import BadField
from tinsmith.server.chat.tokens import ModelText
from tinsmith.types.datum import ModelInput
from tinsmith.types.operations import BaseModelCard
from tinsmith.types.params import SamplingParams

MOST_TOP_LOGPROBS = 128
MOST_SAMPLES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The weights that a request's `model` means."""

    model: str
    """As the request named it."""
    sampler_id: str
    digest: str | None
    """Of the adapter; `None` for a base model."""
    card: BaseModelCard
    text: ModelText


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    prompt: tuple[int, ...]
    max_tokens: int
    """0 only scores the prompt."""
    num_samples: int = 1
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stops: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    """All of them, the end of a turn or text included."""
    num_top: int = 0
    """Likely tokens to name beside each drawn one."""
    score_prompt: bool = False
    num_prompt_top: int = 0

    def request(self, target: Target) -> DrawSamples:
        """One token is drawn where none is wanted: a prompt is scored on the way."""
        params = SamplingParams(
            max_tokens=max(1, self.max_tokens),
            seed=self.seed,
            stop=list(self.stops) if self.max_tokens else [],
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        return DrawSamples(
            sampling_session_id=target.sampler_id,
            seq_id=0,
            prompt=ModelInput.from_ints(list(self.prompt)),
            num_samples=self.num_samples if self.max_tokens else 1,
            params=params,
            prompt_logprobs=self.score_prompt,
            topk_prompt_logprobs=self.num_prompt_top,
            topk_sample_logprobs=self.num_top,
            more_stop_tokens=self.stop_tokens,
        )


def room_for(target: Target, num_prompt_tokens: int, asked: int | None, *, prompt_field: str, field: str) -> int:
    """Tokens to draw at most; all that the context has room for if `asked` is `None`. Raises `BadField`."""
    card = target.card
    room = card.max_context - num_prompt_tokens
    if num_prompt_tokens < 1:
        raise BadField(prompt_field, f"{prompt_field} has no tokens; give at least one")
    if room < 1:
        raise BadField(
            prompt_field,
            f"{prompt_field} has {num_prompt_tokens} tokens and leaves no room in the context of {card.max_context} "
            f"tokens of {card.name!r}",
            code="context_length_exceeded",
        )
    if asked is not None and asked > room:
        raise BadField(
            field,
            f"{prompt_field} has {num_prompt_tokens} tokens and {field} is {asked}; together they exceed the context "
            f"of {card.max_context} tokens of {card.name!r}; ask for at most {room}",
            code="context_length_exceeded",
        )
    return room if asked is None else asked


def check_top_k(card: BaseModelCard, top_k: int | None) -> int:
    """-1 for none. Raises `BadField`."""
    if top_k is None or top_k in (0, -1):
        return -1
    if not 1 <= top_k <= card.vocab_size:
        raise BadField("top_k", f"top_k must be -1 or 0 (off) or 1..{card.vocab_size}, not {top_k}")
    return top_k


def check_token_ids(card: BaseModelCard, tokens: list[int], field: str) -> tuple[int, ...]:
    """Raises `BadField`."""
    for index, token in enumerate(tokens):
        if not 0 <= token < card.vocab_size:
            raise BadField(
                field,
                f"{field}[{index}]: token {token} is outside the vocabulary 0..{card.vocab_size - 1} of {card.name!r}",
            )
    return tuple(tokens)


def check_stops(stops: list[str], field: str) -> tuple[str, ...]:
    """Raises `BadField`."""
    for index, stop in enumerate(stops):
        if not stop:
            raise BadField(field, f"{field}[{index}] is an empty text")
        try:
            stop.encode()
        except UnicodeEncodeError as error:
            raise BadField(field, f"{field}[{index}] {stop!r} holds half of a surrogate pair") from error
    return tuple(stops)
