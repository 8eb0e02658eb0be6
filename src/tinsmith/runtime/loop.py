"""The engine's main loop, the same in a thread and in a process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tinsmith.types.operations import Operation

if TYPE_CHECKING:
    from tinsmith.engine.engine import Engine

Message: TypeAlias = Sequence[tuple[int, Operation]] | None
"""Operations handed over together, each with its ticket; or `STOP`."""
STOP = None
"""Put into the inbox, it ends the loop."""


def run_engine(
    engine: Engine,
    inbox: queue.SimpleQueue[Message],
    send: Callable[[list[tuple[int, Any]]], None],
) -> None:
    """Serve operations until `STOP`: take in all that waits, do one slice of work, send what is finished."""
    while True:
        try:
            while True:
                message = _next(engine, inbox)
                if message is STOP:
                    return
                for ticket, operation in message:
                    engine.accept(ticket, operation)
        except queue.Empty:
            pass
        if finished := engine.work():
            send(finished)


def _next(engine: Engine, inbox: queue.SimpleQueue[Message]) -> Message:
    """Waits only if the engine has nothing to do. Raises `queue.Empty`."""
    if engine.has_work:
        return inbox.get(block=False)
    with engine.figures.phase("idle"):
        return inbox.get()
