"""Where a client's events go: what the caller says, else what `TINSMITH_TELEMETRY` says, else nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from tinsmith.client.errors import ConfigurationError
from tinsmith.types.events import EventSink

SWITCH = "TINSMITH_TELEMETRY"
_OFF = ("0", "off", "no", "false")


def chosen_sinks(
    telemetry: str | Sequence[EventSink], environ: Mapping[str, str] | None = None
) -> tuple[EventSink, ...]:
    """`TINSMITH_TELEMETRY=off` silences every client, whatever it was given.

    Raises `ConfigurationError` if a text names a kind of sink that does not exist or a file that cannot be written, or
    if it is neither text nor several sinks.
    """
    if telemetry and not isinstance(telemetry, Iterable):
        raise ConfigurationError(f"telemetry must be a text or a list of sinks, not {telemetry!r}")
    env = os.environ if environ is None else environ
    switch = env.get(SWITCH, "").strip()
    if switch.lower() in _OFF:
        return ()
    if not isinstance(telemetry, str) and telemetry:
        return tuple(telemetry)
    wanted = telemetry if isinstance(telemetry, str) and telemetry else switch
    if not wanted:
        return ()
    from tinsmith.observe.event_sinks import open_sinks  # rich and SQLite, only where they are wanted

    try:
        return open_sinks(wanted)
    except ValueError as error:
        raise ConfigurationError(f"telemetry {wanted!r}: {error}") from error
