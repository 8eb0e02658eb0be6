"""OpenAI messages and tools as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tinsmith.server.chat.fields import BadField, refuse_unsupported
from tinsmith.server.errors import brief
from tinsmith.server.openai.bodies import ContentPart, MessageBody, ToolBody, ToolCallBody

_ROLES = {"developer": "system"}


def template_messages(messages: Sequence[MessageBody]) -> list[dict[str, Any]]:
    """Raises `BadField`."""
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: MessageBody, place: str) -> dict[str, Any]:
    extra = message.model_extra or {}
    refuse_unsupported(
        {f"{place}.{k}": v for k, v in extra.items()}, dict.fromkeys((f"{place}.{k}" for k in extra), ())
    )
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise BadField(f"{place}.content", f"{place}.content is missing")
    result: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": _content(message.content, f"{place}.content"),
    }
    if message.tool_calls:
        if message.role != "assistant":
            raise BadField(f"{place}.tool_calls", f"{place}.tool_calls: only an assistant calls tools")
        calls = enumerate(message.tool_calls)
        result["tool_calls"] = [_call(call, f"{place}.tool_calls[{index}]") for index, call in calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            result[name] = value
    return result


def _content(content: str | list[ContentPart] | None, place: str) -> str:
    """Parts of text are joined by line breaks."""
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise BadField(
                f"{place}[{index}].type", f"{place}[{index}].type {brief(part.type)}: this server reads text only"
            )
    return "\n".join(part.text or "" for part in content)


def _call(call: ToolCallBody, place: str) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves, so they get the object."""
    where = f"{place}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        raise BadField(where, f"{where} is no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise BadField(where, f"{where} must be a JSON object, not {brief(call.function.arguments)}")
    function = {"name": call.function.name, "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})


def template_tools(tools: Sequence[ToolBody]) -> list[dict[str, Any]]:
    """Raises `BadField`."""
    for index, tool in enumerate(tools):
        if tool.function.strict:
            where = f"tools[{index}].function.strict"
            raise BadField(where, f"{where} true is not supported: nothing keeps the model to the schema")
    return [
        {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}
        for tool in tools
    ]
