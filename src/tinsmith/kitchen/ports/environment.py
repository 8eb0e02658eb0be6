"""Environments: where episodes come from and what an answer is worth."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinsmith.data import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an environment says to an answer."""

    reward: float
    done: bool
    messages: tuple[Message, ...] = ()
    """What it says next; empty when it is done."""


class Environment(Protocol):
    """One episode. Another one, made from the same index, goes the same way if it is given the same answers.

    Both methods may be coroutines.
    """

    def start(self) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """The messages before the first answer."""

    def step(self, answer: str) -> Outcome | Awaitable[Outcome]: ...


class EnvironmentSource(Protocol):
    """Episodes by number. The same number is the same task, on every machine; negative numbers are held out."""

    def episode(self, index: int) -> Environment: ...
