"""Conversations: what a person writes down before a chat template makes tokens of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that an assistant asks for. Raises `ValueError` if `arguments` cannot be written as JSON."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a tool call needs a name, not {self.name!r}")
        if not isinstance(self.arguments, Mapping):
            raise ValueError(f"arguments of {self.name!r} must be a JSON object, not {self.arguments!r}")
        try:
            _check_text(f"{self.name} {self.arguments_json} {self.id}", f"the call of {self.name!r}")
        except TypeError as error:
            raise ValueError(f"arguments of {self.name!r} cannot be written as JSON: {error}") from error

    @property
    def arguments_json(self) -> str:
        """As chat templates write them: one line, `", "` and `": "` between, no escapes for letters."""
        return json.dumps(self.arguments, ensure_ascii=False)

    def as_dict(self, *, json_arguments: bool = False) -> dict[str, Any]:
        """`json_arguments`: as text, which some templates need."""
        arguments = self.arguments_json if json_arguments else dict(self.arguments)
        identity = {} if self.id is None else {"id": self.id}
        return {"type": "function", **identity, "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the assistant may call, as its JSON schema describes it."""

    function: Mapping[str, Any]
    """`name`, and usually `description` and `parameters`: written into the prompt as it is, key order included."""

    def __post_init__(self) -> None:
        if not isinstance(self.function.get("name"), str) or not self.function["name"]:
            raise ValueError(f"a tool needs a name: {dict(self.function)!r}")
        try:
            _check_text(json.dumps(dict(self.function), ensure_ascii=False), f"the description of tool {self.name!r}")
        except TypeError as error:
            raise ValueError(f"tool {self.name!r} cannot be written as JSON: {error}") from error

    @classmethod
    def of(cls, name: str, description: str, parameters: Mapping[str, Any]) -> Tool:
        """`parameters` is a JSON schema of type object."""
        return cls(function={"name": name, "description": description, "parameters": parameters})

    @property
    def name(self) -> str:
        return str(self.function["name"])

    def as_dict(self) -> dict[str, Any]:
        return {"type": "function", "function": dict(self.function)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A picture within a message."""

    data: bytes
    """The encoded file."""
    format: Literal["png", "jpeg"]
    at: int = 0
    """Where in the message's content it stands, in characters."""
    expected_tokens: int | None = None
    """What the model makes of it; needed to train on the message, not to sample after it."""

    def __post_init__(self) -> None:
        if self.format not in ("png", "jpeg"):
            raise ValueError(f"image format {self.format!r} is neither png nor jpeg")
        if not self.data:
            raise ValueError("an image without bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. Raises `ValueError` for an unknown role, for text that is no Unicode (a lone surrogate), or for a part
    that the role cannot have."""

    role: Role
    content: str
    train: bool | None = None
    """Whether to train on this turn; read only under `train_on="customized"`."""
    weight: float | None = None
    """In place of `train`: how much each token of this turn counts."""
    thinking: str | None = None
    """What an assistant thought before the content."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's message: the call that it answers."""
    name: str | None = None
    """Of the speaker or the tool; only some formats write it."""
    images: tuple[Image, ...] = ()
    """In the order of their places."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is none of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise ValueError(f"content must be a string, not {self.content!r}")
        _check_text(self.content, "content")
        _check_text(self.thinking or "", "thinking")
        if self.role != "assistant" and (self.thinking is not None or self.tool_calls):
            raise ValueError(f"only an assistant's message has thinking or tool calls, not one of role {self.role!r}")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError(f"only a tool's message has a tool_call_id, not one of role {self.role!r}")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight must be a number of at least 0, not {self.weight!r}")
        if self.weight is not None and self.train is not None:
            raise ValueError("a message has train or weight, not both")
        places = [image.at for image in self.images]
        if places != sorted(places) or any(not 0 <= at <= len(self.content) for at in places):
            raise ValueError(f"images at {places} are not in order within a content of {len(self.content)} characters")

    def as_dict(self, *, json_arguments: bool = False) -> dict[str, Any]:
        """The form that chat templates read."""
        value: dict[str, Any] = {"role": self.role, "content": self._content_parts() if self.images else self.content}
        if self.thinking is not None:
            value["reasoning_content"] = value["thinking"] = self.thinking
        if self.tool_calls:
            value["tool_calls"] = [call.as_dict(json_arguments=json_arguments) for call in self.tool_calls]
        if self.tool_call_id is not None:
            value["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            value["name"] = self.name
        return value

    def _content_parts(self) -> list[dict[str, str]]:
        parts, start = [], 0
        for image in self.images:
            parts += [{"type": "text", "text": self.content[start : image.at]}, {"type": "image"}]
            start = image.at
        parts.append({"type": "text", "text": self.content[start:]})
        return [part for part in parts if part.get("text") != ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    messages: tuple[Message, ...]
    source: str = "a conversation"
    """Where it came from, as errors name it: `FILE:LINE`."""
    tools: tuple[Tool, ...] = ()
    """What the assistant may call."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError(f"{self.source} has no messages")

    @classmethod
    def of(cls, *turns: tuple[Role, str], tools: Sequence[Tool] = ()) -> Conversation:
        """`Conversation.of(("user", "Hello"), ("assistant", "Hi"))`."""
        return cls(messages=tuple(Message(role=role, content=content) for role, content in turns), tools=tuple(tools))


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode at character {error.start}: {text!r}") from error
