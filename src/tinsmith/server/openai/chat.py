"""`POST /v1/chat/completions`: conversations continued under the model's own chat template."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.server.chat.asks import Ask, Target, room_for
from tinsmith.server.chat.fields import BadField
from tinsmith.server.chat.recorder import Visit
from tinsmith.server.chat.replies import EventStream, close, event, unless_gone, with_first
from tinsmith.server.chat.routing import ERRORS, STREAMED, as_tinsmith_error, new_visit
from tinsmith.server.chat.text import SequenceText
from tinsmith.server.chat.tool_calls import Part, ToolCall, ToolCallText
from tinsmith.server.errors import json_response
from tinsmith.server.openai.bodies import ChatBody
from tinsmith.server.openai.errors import OpenAIRoute, error_body
from tinsmith.server.openai.logprobs import Scored, chat_logprobs, scored_sequence, scored_token
from tinsmith.server.openai.messages import template_messages, template_tools
from tinsmith.server.openai.sampling import END_OF_STREAM, ask_of, check_extras, sequence_text, usage_of
from tinsmith.server.service import Service, ServiceDep
from tinsmith.types.results import DrawnToken, SampledSequence, SampleResponse

router = APIRouter(tags=["openai"], route_class=OpenAIRoute, responses=ERRORS)

_BYTES_PER_TOKEN = 16
"""About what a token costs to write, in bytes of a body to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One request, understood."""

    body: ChatBody
    target: Target
    ask: Ask
    has_tool_calls: bool
    """Whether the answer may hold calls of tools."""
    visit: Visit
    created: int

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.visit.request_id,
            "object": kind,
            "created": self.created,
            "model": self.target.model,
            "choices": choices,
        }

    def logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        as_ids = bool(self.body.return_tokens_as_token_ids)
        return chat_logprobs(self.target, scored, num_top=self.body.top_logprobs or 0, as_ids=as_ids)


@router.post("/chat/completions", response_class=Response, responses=STREAMED)
async def create_chat_completion(body: ChatBody, request: Request, service: ServiceDep) -> Response:
    """With `stream`, server-sent events: a chunk per token as it is drawn, `[DONE]` at the end."""
    check_extras(body, dict(ChatBody.INSTEAD))
    if body.top_logprobs and not body.logprobs:
        raise BadField("top_logprobs", "top_logprobs needs logprobs to be true")
    job = await _understand(body, request, service)
    headers = {"x-request-id": job.visit.request_id}
    if body.stream:
        events = _events(job, service)
        first = await unless_gone(request, anext(events))
        return EventStream(with_first(first, events), headers)
    response = await unless_gone(request, service.chat.draw(job.target, job.ask, job.visit))
    return json_response(await _whole(job, response, service), headers=headers)


async def _understand(body: ChatBody, request: Request, service: Service) -> _Job:
    visit = new_visit(request, "openai.chat", "chatcmpl-")
    target = await service.chat.target(body.model)
    messages = template_messages(body.messages)
    tools = template_tools(body.tools or ()) if body.tool_choice != "none" else []
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        raise BadField("continue_final_message", "continue_final_message and add_generation_prompt exclude each other")

    def work() -> tuple[list[int], bool]:
        prompt = target.text.render(
            messages,
            tools or None,
            options=body.chat_template_kwargs,
            continue_final=goes_on,
            add_prompt=not goes_on and body.add_generation_prompt is not False,
        )
        return prompt, target.text.takes_tool_calls(tools)

    size = int(request.headers.get("content-length") or 0)
    prompt, has_tool_calls = await service.codecs.run(size, work)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = room_for(target, len(prompt), asked, prompt_field="messages", field=field)
    num_top = (body.top_logprobs or 0) if body.logprobs else 0
    return _Job(
        body=body,
        target=target,
        ask=ask_of(body, target, prompt, max_tokens, target.text.chat_stop_tokens, num_top=num_top),
        has_tool_calls=has_tool_calls,
        visit=visit,
        created=int(time.time()),
    )


def _called(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments_json},
    }


# ---- the whole answer ----


async def _whole(job: _Job, response: SampleResponse, service: Service) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        choices = [_choice(job, index, sequence) for index, sequence in enumerate(response.sequences)]
        answer = job.frame("chat.completion", choices) | {"usage": usage_of([job.ask], [response])}
        return answer | ({"prompt_token_ids": list(job.ask.prompt)} if job.body.return_token_ids else {})

    num_tokens = sum(len(sequence.tokens) for sequence in response.sequences)
    return await service.codecs.run(num_tokens * _BYTES_PER_TOKEN, work)


def _choice(job: _Job, index: int, sequence: SampledSequence) -> dict[str, Any]:
    writer = sequence_text(job.body, job.target, job.ask)
    text = writer.whole(sequence.tokens, stopped=sequence.stop_reason == "stop")
    reader = ToolCallText() if job.has_tool_calls else None
    parts: list[Part] = [text] if reader is None else [*reader.add(text), *reader.end()]
    content = "".join(part for part in parts if isinstance(part, str))
    calls = [_called(part) for part in parts if isinstance(part, ToolCall)]
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    choice = {
        "index": index,
        "message": message,
        "logprobs": job.logprobs(scored_sequence(sequence)),
        "finish_reason": _finish_reason(sequence.stop_reason, len(calls)),
        "stop_reason": writer.matched_stop,
    }
    return choice | ({"token_ids": sequence.tokens} if job.body.return_token_ids else {})


def _finish_reason(reason: str, num_calls: int) -> str:
    return "tool_calls" if num_calls and reason == "stop" else reason


# ---- the answer in pieces ----


@dataclass(slots=True)
class _Choice:
    """One choice on its way."""

    writer: SequenceText
    calls: ToolCallText | None

    def add(self, drawn: DrawnToken) -> list[Part]:
        is_last = drawn.stop_reason is not None
        if is_last:
            text = self.writer.add_last(drawn.token, stopped=drawn.stop_reason == "stop")
        else:
            text = self.writer.add(drawn.token)
        if self.calls is None:
            return [text] if text else []
        return [*self.calls.add(text), *(self.calls.end() if is_last else [])]

    @property
    def num_calls(self) -> int:
        return 0 if self.calls is None else self.calls.num_calls


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
        yield event(error_body(as_tinsmith_error(error, "POST", "/v1/chat/completions")))
    finally:
        await close(chunks)


async def _chunks(job: _Job, service: Service) -> AsyncIterator[dict[str, Any]]:
    body = job.body
    choices: dict[int, _Choice] = {}
    response: SampleResponse | None = None
    drawn = service.chat.stream(job.target, [job.ask], job.visit)
    try:
        async for _, item in drawn:
            if isinstance(item, SampleResponse):
                response = item
                continue
            if item.index not in choices:
                calls = ToolCallText() if job.has_tool_calls else None
                yield _opening(job, item.index, is_first=not choices)
                choices[item.index] = _Choice(sequence_text(body, job.target, job.ask), calls)
            for chunk in _pieces(job, choices[item.index], item):
                yield chunk
    finally:
        await close(drawn)
    assert response is not None
    if body.stream_options is not None and body.stream_options.include_usage:
        yield job.frame("chat.completion.chunk", []) | {"usage": usage_of([job.ask], [response])}


def _opening(job: _Job, index: int, *, is_first: bool) -> dict[str, Any]:
    chunk = _chunk(job, index, {"role": "assistant", "content": ""})
    return chunk | ({"prompt_token_ids": list(job.ask.prompt)} if is_first and job.body.return_token_ids else {})


def _chunk(job: _Job, index: int, delta: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | fields
    return job.frame("chat.completion.chunk", [choice])


def _pieces(job: _Job, choice: _Choice, drawn: DrawnToken) -> list[dict[str, Any]]:
    """What one token adds; its log-probability and id come with the first chunk of it."""
    num_before = choice.num_calls
    deltas: list[dict[str, Any]] = []
    for part in choice.add(drawn):
        if isinstance(part, ToolCall):
            deltas.append({"tool_calls": [{"index": num_before, **_called(part)}]})
            num_before += 1
        else:
            deltas.append({"content": part})
    facts: dict[str, Any] = {}
    if job.body.logprobs:
        facts["logprobs"] = job.logprobs([scored_token(drawn)])
    if job.body.return_token_ids:
        facts["token_ids"] = [drawn.token]
    if facts and not deltas:
        deltas.append({"content": ""})
    chunks = [_chunk(job, drawn.index, delta, **(facts if i == 0 else {})) for i, delta in enumerate(deltas)]
    if drawn.stop_reason is not None:
        reason = _finish_reason(drawn.stop_reason, choice.num_calls)
        chunks.append(_chunk(job, drawn.index, {}, finish_reason=reason, stop_reason=choice.writer.matched_stop))
    return chunks
