"""What completions and chat completions share: sampling fields, usage, the frame of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tinsmith.server.chat.asks import Ask, Target, check_stops, check_token_ids, check_top_k
from tinsmith.server.chat.fields import BadField, refuse_unsupported
from tinsmith.server.chat.text import SequenceText
from tinsmith.server.openai.bodies import SamplingBody
from tinsmith.types.results import SampleResponse

END_OF_STREAM = b"data: [DONE]\n\n"


def check_extras(body: SamplingBody, instead: dict[str, str] | None = None) -> None:
    """Raises `BadField` for what asks for something this server does not do."""
    neutral = dict(body.NEUTRAL)
    if body.n is not None:
        neutral["best_of"] = (body.n,)
    refuse_unsupported(body.model_extra or {}, neutral, instead)
    if body.stream_options is not None and not body.stream:
        raise BadField("stream_options", "stream_options is for streams; set stream to true")
    if body.stream_options is not None:
        refuse_unsupported(body.stream_options.model_extra or {}, {}, None)


def ask_of(
    body: SamplingBody,
    target: Target,
    prompt: Sequence[int],
    max_tokens: int,
    natural_stops: Sequence[int],
    **more: Any,
) -> Ask:
    """`natural_stops`: tokens that end the text unless `ignore_eos`. Raises `BadField`."""
    given = check_token_ids(target.card, list(body.stop_token_ids or ()), "stop_token_ids")
    natural = () if body.ignore_eos else tuple(natural_stops)
    return Ask(
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        num_samples=body.n or 1,
        seed=body.seed,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=check_top_k(target.card, body.top_k),
        stops=check_stops(body.stops, "stop"),
        stop_tokens=tuple(dict.fromkeys([*natural, *given])),
        **more,
    )


def sequence_text(body: SamplingBody, target: Target, ask: Ask) -> SequenceText:
    skip_special = body.skip_special_tokens is not False
    return SequenceText(
        target.text.decode if skip_special else target.text.decode_with_special,
        before=ask.prompt,
        stops=ask.stops,
        stop_tokens=ask.stop_tokens,
        keep_stop=bool(body.include_stop_str_in_output),
    )


def usage(asks: Sequence[Ask], num_completion: int, num_cached: int | None) -> dict[str, Any]:
    num_prompt = sum(len(ask.prompt) for ask in asks)
    fields: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }
    if num_cached is not None:
        fields["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return fields


def usage_of(asks: Sequence[Ask], responses: Iterable[SampleResponse]) -> dict[str, Any]:
    responses = list(responses)
    drawn = sum(len(sequence.tokens) for response in responses for sequence in response.sequences)
    return usage(asks, drawn, sum(response.prompt_cache_hit_tokens for response in responses))
