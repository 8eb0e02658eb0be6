"""What the first signal to stop does, and what the second."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

FINISHING = "Stopping: what runs is finished, what waits is kept. Once more (Ctrl-C) stops at once."
FINISHING_UNKEPT = "Stopping: what runs is finished, what waits is given up. Once more (Ctrl-C) stops at once."
AT_ONCE = "Stopping at once."


class StopSignals:
    """SIGINT or SIGTERM: `finish` on the first, `end` on every other. Both are called in the event loop."""

    def __init__(self, *, finish: Callable[[], None], end: Callable[[], None]) -> None:
        self._finish = finish
        self._end = end
        self._count = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Signals are ours within; only the main thread can have them, in others nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def obey(number: int, frame: object) -> None:
            self._count += 1
            loop.call_soon_threadsafe(self._finish if self._count == 1 else self._end)

        previous = {number: signal.signal(number, obey) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def last_words(num_kept: int) -> str:
    """Once everything is closed."""
    if num_kept == 0:
        return "Stopped."
    return f"Stopped; {num_kept} request{'s go' if num_kept > 1 else ' goes'} on at the next start."
