"""`POST /v1/completions`: texts or token ids continued, or scored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.server.chat.asks import Ask, Target, check_token_ids, room_for
from tinsmith.server.chat.fields import BadField
from tinsmith.server.chat.recorder import Visit
from tinsmith.server.chat.replies import EventStream, close, event, unless_gone, with_first
from tinsmith.server.chat.routing import ERRORS, STREAMED, as_tinsmith_error, new_visit
from tinsmith.server.chat.text import SequenceText
from tinsmith.server.errors import json_response
from tinsmith.server.openai.bodies import CompletionBody
from tinsmith.server.openai.errors import OpenAIRoute, error_body
from tinsmith.server.openai.logprobs import (
    Scored,
    completion_logprobs,
    scored_prompt,
    scored_sequence,
    scored_token,
)
from tinsmith.server.openai.sampling import (
    END_OF_STREAM,
    ask_of,
    check_extras,
    sequence_text,
    usage_of,
)
from tinsmith.server.service import Service, ServiceDep
from tinsmith.types.results import DrawnToken, SampleResponse

router = APIRouter(tags=["openai"], route_class=OpenAIRoute, responses=ERRORS)

DEFAULT_MAX_TOKENS = 16
MOST_PROMPTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One request, understood."""

    body: CompletionBody
    target: Target
    asks: list[Ask]
    visit: Visit
    created: int

    @property
    def num_choices_each(self) -> int:
        return self.body.n or 1

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.visit.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.target.model,
            "choices": choices,
        }


@router.post("/completions", response_class=Response, responses=STREAMED)
async def create_completion(body: CompletionBody, request: Request, service: ServiceDep) -> Response:
    """With `stream`, server-sent events: a chunk per token as it is drawn, `[DONE]` at the end."""
    check_extras(body)
    job = await _understand(body, request, service)
    headers = {"x-request-id": job.visit.request_id}
    if body.stream:
        events = _events(job, service)
        first = await unless_gone(request, anext(events))
        return EventStream(with_first(first, events), headers)
    responses = await unless_gone(request, service.chat.draw_all(job.target, job.asks, job.visit))
    return json_response(await _whole(job, responses, service), headers=headers)


async def _understand(body: CompletionBody, request: Request, service: Service) -> _Job:
    visit = new_visit(request, "openai.completions", "cmpl-")
    target = await service.chat.target(body.model)
    prompts = await _prompts(body, target, service)
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    asks = []
    for prompt in prompts:
        room_for(target, len(prompt), max(1, wanted), prompt_field="prompt", field="max_tokens")
        ask = ask_of(body, target, prompt, wanted, target.card.eos_token_ids, num_top=body.logprobs or 0)
        if body.echo and body.logprobs is not None and not body.stream:
            ask = replace(ask, score_prompt=True, num_prompt_top=body.logprobs)
        asks.append(ask)
    return _Job(body=body, target=target, asks=asks, visit=visit, created=int(time.time()))


async def _prompts(body: CompletionBody, target: Target, service: Service) -> list[tuple[int, ...]]:
    """Token ids of each prompt. Raises `BadField`."""
    prompt: Any = body.prompt
    is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    prompts = [prompt] if is_one else list(prompt)
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise BadField("prompt", f"prompt holds {len(prompts)} prompts; it may hold 1 to {MOST_PROMPTS}")
    if isinstance(prompts[0], str):
        special = body.add_special_tokens is not False

        def work() -> list[tuple[int, ...]]:
            return [tuple(target.text.encode(text, add_special_tokens=special)) for text in prompts]

        return await service.codecs.run(sum(map(len, prompts)), work)
    return [
        check_token_ids(target.card, tokens, "prompt" if is_one else f"prompt[{i}]") for i, tokens in enumerate(prompts)
    ]


# ---- the whole answer ----


async def _whole(job: _Job, responses: Sequence[SampleResponse], service: Service) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        choices = [
            _choice(job, number, index, response)
            for number, response in enumerate(responses)
            for index in range(len(response.sequences))
        ]
        return job.frame(choices) | {"usage": usage_of(job.asks, responses)}

    num_tokens = sum(len(ask.prompt) + ask.max_tokens * ask.num_samples for ask in job.asks)
    return await service.codecs.run(num_tokens * _BYTES_PER_TOKEN, work)


_BYTES_PER_TOKEN = 16
"""About what a token costs to write, in bytes of a body to read."""


def _choice(job: _Job, number: int, index: int, response: SampleResponse) -> dict[str, Any]:
    body, ask, sequence = job.body, job.asks[number], response.sequences[index]
    writer = sequence_text(body, job.target, ask)
    text = writer.whole(sequence.tokens, stopped=sequence.stop_reason == "stop")
    scored = scored_sequence(sequence) if body.logprobs is not None else []
    if body.echo:
        text = _prompt_text(job, number) + text
        scored = scored_prompt(ask.prompt, response) + scored if body.logprobs is not None else []
    return {
        "index": number * job.num_choices_each + index,
        "text": text,
        "logprobs": _logprobs(job, scored, 0),
        "finish_reason": sequence.stop_reason,
        "stop_reason": writer.matched_stop,
    } | (_token_ids(ask.prompt, sequence.tokens) if body.return_token_ids else {})


def _token_ids(prompt: Sequence[int] | None, tokens: Sequence[int]) -> dict[str, Any]:
    return {"prompt_token_ids": None if prompt is None else list(prompt), "token_ids": list(tokens)}


def _logprobs(job: _Job, scored: Sequence[Scored], text_start: int) -> dict[str, Any] | None:
    if job.body.logprobs is None:
        return None
    return completion_logprobs(
        job.target,
        scored,
        num_top=job.body.logprobs,
        as_ids=bool(job.body.return_tokens_as_token_ids),
        text_start=text_start,
    )


def _prompt_text(job: _Job, number: int) -> str:
    prompt = job.body.prompt
    if isinstance(prompt, str):
        return prompt
    given = prompt[number] if number < len(prompt) else None
    return given if isinstance(given, str) else job.target.text.decode_with_special(job.asks[number].prompt)


# ---- the answer in pieces ----


async def _events(job: _Job, service: Service) -> AsyncIterator[bytes]:
    """Raises what goes wrong before the first event; later errors are events."""
    chunks = _chunks(job, service)
    told_any = False
    try:
        async for chunk in chunks:
            told_any = True
            yield event(chunk)
        yield END_OF_STREAM
    except Exception as error:
        if not told_any:
            raise
        yield event(error_body(as_tinsmith_error(error, "POST", "/v1/completions")))
    finally:
        await close(chunks)


async def _chunks(job: _Job, service: Service) -> AsyncIterator[dict[str, Any]]:
    body = job.body
    writers = {
        number * job.num_choices_each + index: sequence_text(body, job.target, ask)
        for number, ask in enumerate(job.asks)
        for index in range(ask.num_samples)
    }
    lengths = dict.fromkeys(writers, 0)
    if body.echo:
        async for number, chunk in _echoes(job, service):
            for index in range(job.num_choices_each):
                choice = number * job.num_choices_each + index
                lengths[choice] = len(chunk["text"])
                yield job.frame([{"index": choice, **chunk}])
    responses: list[SampleResponse] = []
    drawn = service.chat.stream(job.target, job.asks, job.visit)
    try:
        async for number, item in drawn:
            if isinstance(item, SampleResponse):
                responses.append(item)
                continue
            choice = number * job.num_choices_each + item.index
            chunk = _piece(job, number, item, writers[choice], lengths[choice])
            lengths[choice] += len(chunk["text"])
            yield job.frame([{"index": choice, **chunk}])
    finally:
        await close(drawn)
    if not job.asks[0].max_tokens:
        for choice in writers:
            yield job.frame([{"index": choice, "text": "", "logprobs": None, "finish_reason": "length"}])
    if body.stream_options is not None and body.stream_options.include_usage:
        yield job.frame([]) | {"usage": usage_of(job.asks, responses)}


async def _echoes(job: _Job, service: Service) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """A chunk for each prompt, its log-probabilities computed before the drawing begins."""
    for number, ask in enumerate(job.asks):
        logprobs = None
        if job.body.logprobs is not None:
            scoring = replace(ask, max_tokens=0, num_samples=1, score_prompt=True, num_prompt_top=job.body.logprobs)
            response = await service.chat.draw(job.target, scoring, job.visit)
            logprobs = _logprobs(job, scored_prompt(ask.prompt, response), 0)
        chunk = {"text": _prompt_text(job, number), "logprobs": logprobs, "finish_reason": None}
        yield number, chunk | (_token_ids(ask.prompt, []) if job.body.return_token_ids else {})


def _piece(job: _Job, number: int, drawn: DrawnToken, writer: SequenceText, text_start: int) -> dict[str, Any]:
    body = job.body
    if drawn.stop_reason is None:
        text = writer.add(drawn.token)
    else:
        text = writer.add_last(drawn.token, stopped=drawn.stop_reason == "stop")
    chunk: dict[str, Any] = {
        "text": text,
        "logprobs": _logprobs(job, [scored_token(drawn)], text_start),
        "finish_reason": drawn.stop_reason,
    }
    if drawn.stop_reason is not None:
        chunk["stop_reason"] = writer.matched_stop
    if body.return_token_ids:
        chunk |= _token_ids(None, [drawn.token])
    return chunk
