"""Where a server is put together: engines in their homes, control over them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.handle import EngineHandle
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import InvalidInput

if TYPE_CHECKING:
    from tinsmith.server.tracing import Tracing

logger = logging.getLogger(__name__)

EngineHome: TypeAlias = Literal["process", "thread"]

DATA_DIR_VARIABLE = "TINSMITH_DATA_DIR"
DATABASE_VARIABLE = "TINSMITH_DATABASE"
OTEL_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def open_control(
    sources: Sequence[ModelSource],
    options: EngineOptions,
    data_dir: Path,
    home: EngineHome = "process",
    **settings: Any,
) -> Control:
    """A `Control` with one engine per base model, nothing started yet; `settings` are of `ControlSettings`.

    Raises `InvalidInput` if a name comes twice.
    """
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(f"base model {name!r} is given twice; give one of them another name with NAME=FOLDER")
    engines = [_engine(source, options, home) for source in sources]
    return Control(ControlSettings(data_dir=data_dir, **settings), engines)


def _engine(source: ModelSource, options: EngineOptions, home: EngineHome) -> EngineHandle:
    if home == "thread":
        from tinsmith.runtime.thread import ThreadEngine

        return ThreadEngine(source, options)
    from tinsmith.runtime.process import ProcessEngine

    return ProcessEngine(source, options)


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Traces to an OTLP/HTTP collector: at `endpoint`, or where OpenTelemetry's own variables say; `None` without.

    Raises `InvalidInput` if they are asked for and OpenTelemetry is not installed, or `endpoint` is no address.
    """
    if endpoint is None and not any(os.environ.get(name) for name in OTEL_VARIABLES):
        return None
    try:
        from tinsmith.observe.otel import open_provider
        from tinsmith.server.tracing import Tracing
    except ImportError as error:
        if endpoint is None:
            logger.warning("%s is set, but there is no OpenTelemetry: pip install 'tinsmith[otel]'", OTEL_VARIABLES[0])
            return None
        raise InvalidInput("--otel-endpoint needs OpenTelemetry: pip install 'tinsmith[otel]'") from error
    try:
        return Tracing(open_provider("tinsmith", endpoint=endpoint))
    except ValueError as error:
        raise InvalidInput(f"--otel-endpoint: {error}") from error


def default_data_dir() -> Path:
    """`$TINSMITH_DATA_DIR`, or `tinsmith` where this user's programs keep data."""
    if folder := os.environ.get(DATA_DIR_VARIABLE):
        return Path(folder).expanduser()
    share = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(share).expanduser() / "tinsmith"
