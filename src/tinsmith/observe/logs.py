"""The program's own log: one line per record, with the ids of what is being worked on, as text or as JSON.

    with noting():
        note(model_id="sess-1:train:0")      # from anywhere below, also in tasks that were started there
        logger.info("saved")                 # 12:03:04.120 INFO    control: saved  model_id=sess-1:train:0

A record never holds a header or a body; what is noted are ids.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Literal, TextIO, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
FIELDS: Final = ("http_id", "request_id", "model_id", "session_id", "user_id", "sampler_id")
"""What a line may be about."""
FORMAT_VARIABLE: Final = "TINSMITH_LOG_FORMAT"
"""Tells the engines' processes how the server writes its log."""
LEVEL_VARIABLE: Final = "TINSMITH_ENGINE_LOG_LEVEL"
"""From which level on engines write; `info` unless it is set."""

_CONTROL: Final = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
"""Paths and ids are a caller's words: none of them begins another line, or speaks to the terminal."""

_context: ContextVar[dict[str, str] | None] = ContextVar("tinsmith_log_context", default=None)


@contextmanager
def noting() -> Iterator[dict[str, str]]:
    """A place for the ids of one piece of work; it is gone afterwards."""
    fields: dict[str, str] = {}
    token = _context.set(fields)
    try:
        yield fields
    finally:
        _context.reset(token)


def note(**ids: str | None) -> None:
    """Name what the present work is about, by `FIELDS`; outside of any work it does nothing."""
    fields = _context.get()
    if fields is not None:
        fields.update({name: value for name, value in ids.items() if value is not None})


def log_context() -> Mapping[str, str]:
    return _context.get() or {}


class AddContext(logging.Filter):
    """Puts what was noted into every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.context = dict(log_context())
        return True


class TextLines(logging.Formatter):
    """`12:03:04.120 INFO    server.requests: POST /api/v1/asample 200 3.1 ms  request_id=…`"""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("tinsmith.")
        line = f"{clock}.{record.msecs:03.0f} {record.levelname:<7} {name}: {record.getMessage()}"
        if context := getattr(record, "context", None):
            line += "  " + " ".join(f"{key}={value}" for key, value in context.items())
        return line.translate(_CONTROL) + _traceback(self, record)


class JsonLines(logging.Formatter):
    """One object per line: `time` (UTC), `level`, `logger`, `message`, the ids, `error` with the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if text := _traceback(self, record):
            line["error"] = text.strip()
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was noted, and what the call itself gave as `extra={"fields": …}`."""
    fields: dict[str, Any] = dict(getattr(record, "context", {}))
    fields.update(getattr(record, "fields", {}))
    return fields


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info and record.exc_info[0] is not None:
        return "\n" + formatter.formatException(record.exc_info)
    return ""


def configure_logging(
    log_format: LogFormat = "text", level: LogLevel = "warning", *, stream: TextIO | None = None
) -> None:
    """Send the log of this process to stderr; stdout is for what the command was asked to print.

    `level` holds for our own lines; of other libraries, warnings and errors are shown.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    handler.addFilter(AddContext())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("tinsmith").setLevel(level.upper())
