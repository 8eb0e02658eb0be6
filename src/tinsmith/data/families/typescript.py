"""Descriptions of tools as TypeScript types, which GPT-OSS reads in place of JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tinsmith.data.conversations import Tool
from tinsmith.data.errors import RenderError

_PLAIN_TYPES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def tool_namespace(name: str, tools: Sequence[Tool], source: str) -> str:
    """All tools as one namespace. Raises `RenderError` for a schema with parts that have no written form here."""
    lines = [f"## {name}\n\nnamespace {name} {{\n\n"]
    for tool in tools:
        where = f"{source}: tool {tool.name!r}"
        lines.append(f"// {tool.function.get('description', '')}\n")
        lines.append(f"type {tool.name} = ")
        parameters = tool.function.get("parameters") or {}
        properties = parameters.get("properties") or {}
        if not properties:
            lines.append("() => any;\n\n")
            continue
        lines.append("(_: {\n")
        required = parameters.get("required") or []
        for key, schema in properties.items():
            lines.append(_property(key, schema, is_required=key in required, where=f"{where}, parameter {key!r}"))
        lines.append("}) => any;\n\n")
    return "".join([*lines, f"}} // namespace {name}"])


def _property(key: str, schema: Mapping[str, Any], *, is_required: bool, where: str) -> str:
    comment = f"// {schema['description']}\n" if schema.get("description") else ""
    text = f"{comment}{key}{'' if is_required else '?'}: {_type(schema, where)}"
    if "default" in schema:
        default = schema["default"]
        if not isinstance(default, str):
            written = json.dumps(default, ensure_ascii=False)
        elif "enum" in schema:
            written = default
        else:
            written = f'"{default}"'
        return f"{text}, // default: {written}\n"
    return f"{text},\n"


def _type(schema: Mapping[str, Any], where: str) -> str:
    kind = schema.get("type")
    if schema.get("nullable") or "oneOf" in schema or "anyOf" in schema or isinstance(kind, list):
        raise RenderError(f"{where}: a union of types has no written form here: {dict(schema)!r}")
    if kind == "string" and schema.get("enum"):
        return " | ".join(f'"{value}"' for value in schema["enum"])
    if kind in _PLAIN_TYPES:
        return _PLAIN_TYPES[kind]
    if kind == "array":
        inner = (schema.get("items") or {}).get("type")
        if inner in _PLAIN_TYPES:
            return f"{_PLAIN_TYPES[inner]}[]"
        raise RenderError(f"{where}: an array of {inner!r} has no written form here")
    raise RenderError(f"{where}: type {kind!r} has no written form here")
