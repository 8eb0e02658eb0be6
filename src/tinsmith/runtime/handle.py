"""The one interface between control and an engine, wherever the engine lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tinsmith.types.operations import BaseModelCard, Operation
from tinsmith.types.pulse import Pulse
from tinsmith.types.results import DrawnToken


@dataclass(slots=True, eq=False)
class EngineCall:
    """One submitted operation."""

    ticket: int
    """Names the call, for `CancelSample`."""
    answer: asyncio.Future[Any]
    """Resolves in the event loop that called `submit`, with the operation's answer or an error of `types.errors`."""
    on_token: Callable[[DrawnToken], None] | None = None
    """Called in that loop with every token of a streamed `Sample`. Set it before the next await, or miss the first."""


class EngineHandle(Protocol):
    """One engine with one base model.

    Nothing an engine holds survives its end: adapters, gradients, optimizer state and snapshots are gone, and every
    open call fails with `EngineDied`. Checkpoint folders it answered for are on disk.
    """

    @property
    def card(self) -> BaseModelCard:
        """The loaded base model. Raises `RuntimeError` before `start` has returned."""
        ...

    @property
    def is_alive(self) -> bool: ...

    @property
    def pulse(self) -> Pulse | None:
        """The newest; `None` before the first, and of engines that give none."""
        ...

    def kill(self) -> None:
        """End it at once, whatever it does, if that can be done: `is_alive` soon is false, and open calls fail."""
        ...

    async def start(self) -> BaseModelCard:
        """Load the base model; may be called again once the engine has died, for one with empty hands.

        Raises `UserError` if it cannot be found or is not supported, `ServerError` if it dies meanwhile."""
        ...

    def submit(self, operation: Operation) -> EngineCall:
        """Hand over one operation; never blocks. Raises `EngineDied` if the engine is gone."""
        ...

    def submit_all(self, operations: Sequence[Operation]) -> list[EngineCall]:
        """Hand over several at once: the engine has them all before it begins the first, and may join them."""
        ...

    async def close(self) -> None:
        """Finish what is running, fail what waits, release the model. Idempotent."""
        ...


class Pulseless:
    """The part of an `EngineHandle` that cannot hang by itself, so that nobody need watch it."""

    pulse: Pulse | None = None

    def kill(self) -> None:
        """There is nothing to kill."""
