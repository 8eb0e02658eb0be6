"""The engine's main loop, the same in a thread and in a process."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinsmith.types.operations import Operation

if TYPE_CHECKING:
    from tinsmith.engine.engine import Engine

STOP = None
"""Put into the inbox, it ends the loop."""


def run_engine(
    engine: Engine,
    inbox: queue.SimpleQueue[tuple[int, Operation] | None],
    send: Callable[[list[tuple[int, Any]]], None],
) -> None:
    """Serve operations until `STOP`: take in all that waits, do one slice of work, send what is finished."""
    while True:
        try:
            while True:
                message = inbox.get(block=not engine.has_work)
                if message is STOP:
                    return
                engine.accept(*message)
        except queue.Empty:
            pass
        if finished := engine.work():
            send(finished)
