"""Conversations: what a person writes down before a chat template makes tokens of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. Raises `ValueError` for an unknown role, or for content that is no Unicode text (a lone surrogate)."""

    role: Role
    content: str
    train: bool | None = None
    """Whether to train on this turn; read only under `train_on="customized"`."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is none of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise ValueError(f"content must be a string, not {self.content!r}")
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"content is not valid Unicode at character {error.start}: {self.content!r}") from error

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    messages: tuple[Message, ...]
    source: str = "a conversation"
    """Where it came from, as errors name it: `FILE:LINE`."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError(f"{self.source} has no messages")

    @classmethod
    def of(cls, *turns: tuple[Role, str]) -> Conversation:
        """`Conversation.of(("user", "Hello"), ("assistant", "Hi"))`."""
        return cls(messages=tuple(Message(role=role, content=content) for role, content in turns))
