"""`POST /v1/messages`, whole or as a stream of events, and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.server.anthropic.bodies import MessagesBody, PromptBody
from tinsmith.server.anthropic.errors import AnthropicRoute, error_body
from tinsmith.server.anthropic.prompts import goes_on, template_messages, template_tools
from tinsmith.server.chat.asks import Ask, Target, check_stops, check_top_k, room_for
from tinsmith.server.chat.fields import refuse_unsupported
from tinsmith.server.chat.recorder import Visit
from tinsmith.server.chat.replies import EventStream, close, event, unless_gone, with_first
from tinsmith.server.chat.routing import ERRORS, STREAMED, as_tinsmith_error, new_visit
from tinsmith.server.chat.text import SequenceText
from tinsmith.server.chat.tool_calls import Part, ToolCall, ToolCallText
from tinsmith.server.errors import json_response
from tinsmith.server.service import Service, ServiceDep
from tinsmith.types.results import DrawnToken, SampledSequence, SampleResponse

router = APIRouter(tags=["anthropic"], route_class=AnthropicRoute, responses=ERRORS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    target: Target
    tokens: list[int]
    has_tool_calls: bool
    """Whether the answer may hold calls of tools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One request, understood."""

    body: MessagesBody
    prompt: _Prompt
    ask: Ask
    visit: Visit

    @property
    def writer(self) -> SequenceText:
        ask = self.ask
        return SequenceText(
            self.prompt.target.text.decode, before=ask.prompt, stops=ask.stops, stop_tokens=ask.stop_tokens
        )

    def message(self, **fields: Any) -> dict[str, Any]:
        return {
            "id": self.visit.request_id,
            "type": "message",
            "role": "assistant",
            "model": self.prompt.target.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": len(self.ask.prompt), "output_tokens": 0},
            **fields,
        }


@router.post("/messages", response_class=Response, responses=STREAMED)
async def create_message(body: MessagesBody, request: Request, service: ServiceDep) -> Response:
    """With `stream`, server-sent events: a delta per token as it is drawn."""
    job = await _understand(body, request, service)
    headers = {"request-id": job.visit.request_id}
    if body.stream:
        events = _events(job, service)
        first = await unless_gone(request, anext(events))
        return EventStream(with_first(first, events), headers)
    response = await unless_gone(request, service.chat.draw(job.prompt.target, job.ask, job.visit))
    return json_response(_whole(job, response.sequences[0]), headers=headers)


@router.post("/messages/count_tokens")
async def count_tokens(body: PromptBody, request: Request, service: ServiceDep) -> dict[str, int]:
    """Tokens of the prompt as the model would read it."""
    return {"input_tokens": len((await _prompt(body, request, service)).tokens)}


async def _prompt(body: PromptBody, request: Request, service: Service) -> _Prompt:
    refuse_unsupported(body.model_extra or {}, body.NEUTRAL, body.INSTEAD)
    target = await service.chat.target(body.model)
    messages, tools = template_messages(body), template_tools(body)

    def work() -> _Prompt:
        tokens = target.text.render(
            messages,
            tools or None,
            options=body.chat_template_kwargs,
            continue_final=goes_on(body),
            add_prompt=not goes_on(body),
        )
        return _Prompt(target=target, tokens=tokens, has_tool_calls=target.text.takes_tool_calls(tools))

    return await service.codecs.run(int(request.headers.get("content-length") or 0), work)


async def _understand(body: MessagesBody, request: Request, service: Service) -> _Job:
    visit = new_visit(request, "anthropic.messages", "msg_")
    prompt = await _prompt(body, request, service)
    target = prompt.target
    ask = Ask(
        prompt=tuple(prompt.tokens),
        max_tokens=room_for(target, len(prompt.tokens), body.max_tokens, prompt_field="messages", field="max_tokens"),
        seed=body.seed,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=check_top_k(target.card, body.top_k),
        stops=check_stops(body.stop_sequences or [], "stop_sequences"),
        stop_tokens=target.text.chat_stop_tokens,
    )
    return _Job(body=body, prompt=prompt, ask=ask, visit=visit)


def _tool_use(call: ToolCall, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call.name, "input": arguments}


def _stop_reason(drawn: str, matched: str | None, num_calls: int) -> str:
    if drawn == "length":
        return "max_tokens"
    if matched is not None:
        return "stop_sequence"
    return "tool_use" if num_calls else "end_turn"


# ---- the whole answer ----


def _whole(job: _Job, sequence: SampledSequence) -> dict[str, Any]:
    writer = job.writer
    text = writer.whole(sequence.tokens, stopped=sequence.stop_reason == "stop")
    reader = ToolCallText() if job.prompt.has_tool_calls else None
    parts: list[Part] = [text] if reader is None else [*reader.add(text), *reader.end()]
    num_calls = sum(isinstance(part, ToolCall) for part in parts)
    content = [
        _tool_use(part, dict(part.arguments)) if isinstance(part, ToolCall) else {"type": "text", "text": part}
        for part in parts
        if part
    ]
    message = job.message(
        content=content,
        stop_reason=_stop_reason(sequence.stop_reason, writer.matched_stop, num_calls),
        stop_sequence=writer.matched_stop,
        usage={"input_tokens": len(job.ask.prompt), "output_tokens": len(sequence.tokens)},
    )
    return message | (_tokens(job, sequence) if job.body.return_token_ids else {})


def _tokens(job: _Job, sequence: SampledSequence) -> dict[str, Any]:
    return {
        "prompt_token_ids": list(job.ask.prompt),
        "token_ids": sequence.tokens,
        "logprobs": sequence.logprobs,
    }


# ---- the answer in pieces ----


@dataclass(slots=True)
class _Blocks:
    """The content blocks of a streamed message: at most the last one is open, and it is text."""

    num_begun: int = 0
    is_open: bool = False
    num_calls: int = field(default=0)

    def add(self, part: Part) -> list[dict[str, Any]]:
        if isinstance(part, str):
            events = [] if self.is_open else [self._begin({"type": "text", "text": ""})]
            self.is_open = True
            return [*events, self._delta({"type": "text_delta", "text": part})]
        self.num_calls += 1
        begin = [*self.end(), self._begin(_tool_use(part, {}))]
        self.is_open = True
        return [*begin, self._delta({"type": "input_json_delta", "partial_json": part.arguments_json}), *self.end()]

    def end(self) -> list[dict[str, Any]]:
        if not self.is_open:
            return []
        self.is_open = False
        return [{"type": "content_block_stop", "index": self.num_begun - 1}]

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self.num_begun += 1
        return {"type": "content_block_start", "index": self.num_begun - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self.num_begun - 1, "delta": delta}


async def _events(job: _Job, service: Service) -> AsyncIterator[bytes]:
    """Raises what goes wrong before the first event; later errors are events."""
    messages = _messages(job, service)
    told_any = False
    try:
        async for message in messages:
            told_any = True
            yield event(message, message["type"])
    except Exception as error:
        if not told_any:
            raise
        yield event(error_body(as_tinsmith_error(error, "POST", "/v1/messages")), "error")
    finally:
        await close(messages)


async def _messages(job: _Job, service: Service) -> AsyncIterator[dict[str, Any]]:
    writer, blocks = job.writer, _Blocks()
    reader = ToolCallText() if job.prompt.has_tool_calls else None
    response: SampleResponse | None = None
    drawn = service.chat.stream(job.prompt.target, [job.ask], job.visit)
    is_begun = False
    try:
        async for _, item in drawn:
            if isinstance(item, SampleResponse):
                response = item
                continue
            if not is_begun:
                is_begun = True
                yield {"type": "message_start", "message": job.message()}
            for part in _parts(item, writer, reader):
                for message in blocks.add(part):
                    yield message
    finally:
        await close(drawn)
    assert response is not None
    for message in blocks.end():
        yield message
    sequence = response.sequences[0]
    reason = _stop_reason(sequence.stop_reason, writer.matched_stop, blocks.num_calls)
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": writer.matched_stop},
        "usage": {"input_tokens": len(job.ask.prompt), "output_tokens": len(sequence.tokens)},
    } | (_tokens(job, sequence) if job.body.return_token_ids else {})
    yield {"type": "message_stop"}


def _parts(drawn: DrawnToken, writer: SequenceText, reader: ToolCallText | None) -> list[Part]:
    is_last = drawn.stop_reason is not None
    if is_last:
        text = writer.add_last(drawn.token, stopped=drawn.stop_reason == "stop")
    else:
        text = writer.add(drawn.token)
    if reader is None:
        return [text] if text else []
    return [*reader.add(text), *(reader.end() if is_last else [])]
