"""Anthropic messages and tools as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinsmith.server.anthropic.bodies import BlockBody, MessageBody, PromptBody, ToolBody
from tinsmith.server.chat.fields import BadField, refuse_unsupported
from tinsmith.server.errors import brief


def template_messages(body: PromptBody) -> list[dict[str, Any]]:
    """Raises `BadField`."""
    result: list[dict[str, Any]] = []
    if body.system:
        result.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        result += _messages(message, f"messages[{index}]")
    return result


def goes_on(body: PromptBody) -> bool:
    """Whether the answer continues the last message."""
    return body.messages[-1].role == "assistant"


def _messages(message: MessageBody, place: str) -> list[dict[str, Any]]:
    """Results of tools come as messages of their own, before what the user says."""
    refuse_unsupported({f"{place}.{k}": v for k, v in (message.model_extra or {}).items()}, {})
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        where = f"{place}.content[{index}]"
        if block.type == "tool_result" and message.role == "user":
            results.append(_tool_result(block, where))
        elif block.type == "tool_use" and message.role == "assistant":
            calls.append(_tool_use(block, where))
        else:
            texts.append(_block_text(block, where))
    if message.role == "assistant":
        said = {"role": "assistant", "content": "\n".join(texts)}
        return [said | {"tool_calls": calls}] if calls else [said]
    return results + ([{"role": "user", "content": "\n".join(texts)}] if texts or not results else [])


def _text(content: str | Sequence[BlockBody], place: str) -> str:
    """Blocks of text are joined by line breaks."""
    if isinstance(content, str):
        return content
    return "\n".join(_block_text(block, f"{place}[{index}]") for index, block in enumerate(content))


def _block_text(block: BlockBody, where: str) -> str:
    _check_extras(block, where)
    if block.type != "text" or block.text is None:
        raise BadField(f"{where}.type", f"{where}.type {brief(block.type)}: this server reads text only")
    return block.text


def _tool_use(block: BlockBody, where: str) -> dict[str, Any]:
    _check_extras(block, where)
    if not block.name or block.input is None:
        raise BadField(f"{where}.name", f"{where}: tool_use needs a name and an input")
    function = {"name": block.name, "arguments": block.input}
    return {"type": "function", "function": function} | ({"id": block.id} if block.id else {})


def _tool_result(block: BlockBody, where: str) -> dict[str, Any]:
    """An error is told in words: templates know no other way."""
    _check_extras(block, where)
    if not block.tool_use_id:
        raise BadField(f"{where}.tool_use_id", f"{where}.tool_use_id is missing")
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(_inner(c, where) for c in content)
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": f"Error: {text}" if block.is_error else text,
    }


def _inner(block: Mapping[str, Any], where: str) -> str:
    text = block.get("text")
    if block.get("type") != "text" or not isinstance(text, str):
        raise BadField(f"{where}.content", f"{where}.content {brief(block.get('type'))}: this server reads text only")
    return text


def _check_extras(block: BlockBody, where: str) -> None:
    extra = {f"{where}.{k}": v for k, v in (block.model_extra or {}).items()}
    refuse_unsupported(extra, {f"{where}.{k}": v for k, v in block.NEUTRAL.items()})


def template_tools(body: PromptBody) -> list[dict[str, Any]]:
    """Raises `BadField`."""
    if body.tool_choice is not None and body.tool_choice.type == "none":
        return []
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]


def _tool(tool: ToolBody, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise BadField(
            f"{where}.type", f"{where}.type {brief(tool.type)}: this server runs no tools; give yours with input_schema"
        )
    extra = {f"{where}.{k}": v for k, v in (tool.model_extra or {}).items()}
    refuse_unsupported(extra, {f"{where}.{k}": v for k, v in tool.NEUTRAL.items()})
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}
