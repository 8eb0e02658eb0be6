"""The child of `ProcessEngine`: `python -m tinsmith.runtime.worker FD SOURCE OPTIONS`."""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from tinsmith.observe.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, LogFormat, configure_logging
from tinsmith.runtime.loop import STOP, Message, run_engine
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import TinsmithError
from tinsmith.types.pulse import PULSE_S, Pulse

if TYPE_CHECKING:
    from tinsmith.engine.engine import Engine


def main(arguments: list[str]) -> int:
    """Exits when told to, and when the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Connection(int(arguments[0]))
    _log_to_stderr()
    with ExitStack() as settings:
        try:
            from tinsmith.engine.engine import Engine
            from tinsmith.engine.process_settings import process_settings

            source = ModelSource.model_validate_json(arguments[1])
            options = EngineOptions.model_validate_json(arguments[2])
            settings.enter_context(process_settings(options))
            engine = Engine(source, options)
        except TinsmithError as error:
            channel.send(error)
            return 0
        engine.own_process()
        return _serve(engine, channel)


def _serve(engine: Engine, channel: Connection) -> int:
    channel.send(engine.card)
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, inbox), daemon=True).start()

    one_at_a_time = threading.Lock()

    def send(message: list[tuple[int, Any]] | Pulse) -> None:
        with one_at_a_time:
            channel.send(message)

    threading.Thread(target=_beat, args=(engine.pulse, send), daemon=True).start()

    try:
        run_engine(engine, inbox, send)
    except BrokenPipeError:
        return 1  # the parent is gone, and with it everybody who waits
    return 0


def _log_to_stderr() -> None:
    """Warnings, and what our own engine says of itself, as the server writes its log; stdout belongs to the command
    that started us."""
    log_format: LogFormat = "json" if os.environ.get(FORMAT_VARIABLE) == "json" else "text"
    configure_logging(log_format, "warning" if os.environ.get(LEVEL_VARIABLE) == "warning" else "info")


def _beat(pulse: Callable[[], Pulse], send: Callable[[Pulse], None]) -> None:
    """From a thread beside the engine's, so that a long pass is no silence."""
    try:
        while True:
            send(pulse())
            time.sleep(PULSE_S)
    except OSError:
        return  # the parent is gone
    except Exception:
        logging.getLogger(__name__).exception("the engine gives no pulse any more")


def _receive(channel: Connection, inbox: queue.SimpleQueue[Message]) -> None:
    try:
        while (message := channel.recv()) is not None:
            inbox.put(message)
    except (EOFError, OSError):
        pass  # the parent is gone: stop as if told to
    inbox.put(STOP)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    # not `sys.exit`: a compiler may be at work in the background, and nothing here waits to be written
    os._exit(status)
