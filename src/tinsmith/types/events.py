"""What happens, told as it happens: a client's requests, retries, operations and recoveries."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    name: str
    """Dotted, stable: `operation.finished`, `recovery.detected`."""
    time: float
    """Seconds since 1970."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Flat values that JSON can hold. No credentials, ever."""

    def as_row(self) -> dict[str, Any]:
        return {"event": self.name, "time": self.time, **self.fields}


class EventSink(Protocol):
    """Takes events in their order, from any thread, one at a time. What it raises is logged and stops nothing."""

    def write(self, event: Event) -> None: ...

    def close(self) -> None:
        """Everything written is safe when this returns. Idempotent."""


@runtime_checkable
class TracingSink(EventSink, Protocol):
    """A sink that follows operations over the wire."""

    def operation(self, name: str, fields: Mapping[str, Any], age_s: float) -> AbstractContextManager[None]:
        """Around all that one operation does; it was called `age_s` ago."""
        ...

    def headers(self) -> Mapping[str, str]:
        """What requests of the present operation carry, so that a server's trace joins it."""
        ...
