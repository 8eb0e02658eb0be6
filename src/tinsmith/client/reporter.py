"""Telemetry of the Tinker protocol: what a client tells the server's owner about itself.

Off unless `TINKER_TELEMETRY` is 1, true, yes or on. Carries event names, error types and durations; no prompts, no
data, no request headers.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import uuid
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any

from tinsmith.client.config import PROTOCOL_VERSION
from tinsmith.client.errors import TinkerError
from tinsmith.client.http import Http, Retry, post
from tinsmith.types.events import Event

logger = logging.getLogger("tinsmith.client")

FLUSH_EVERY_S = 10.0
_BATCH_MAX = 100
_QUEUE_MAX = 10_000
_TIMEOUT_S = 5.0
_REPORTED = ("operation.failed", "http.retry", "queue.state", "recovery.")
_KEPT = ("operation", "error_type", "status", "category", "retryable", "wall_s", "attempt", "path", "state")
_PROCESS = str(uuid.uuid4())


class ServerReporter:
    """An `EventSink` that sends batches to `telemetry`. Built on the client's event loop and flushed there."""

    def __init__(self, http: Http, session_id: str | None) -> None:
        self._http = http
        self._session_id = session_id or f"sessionless-{uuid.uuid4()}"
        self._has_session = session_id is not None
        self._queue: deque[dict[str, Any]] = deque(maxlen=_QUEUE_MAX)
        self._index = 0
        self._started = datetime.now(UTC)
        self._flushing: asyncio.Task[None] | None = None
        if self._has_session:
            self._put("SESSION_START", self._started)

    def write(self, event: Event) -> None:
        if not event.name.startswith(_REPORTED):
            return
        data = {key: event.fields[key] for key in _KEPT if key in event.fields}
        severity = "ERROR" if "failed" in event.name else "INFO"
        when = datetime.fromtimestamp(event.time, UTC)
        self._put("GENERIC_EVENT", when, severity=severity, event_name=event.name, event_data=data)

    def close(self) -> None:
        """Nothing is kept outside memory; `finish` sends what is left."""

    def start(self) -> None:
        self._flushing = asyncio.create_task(self._flush_regularly())

    async def finish(self) -> None:
        """Send the last batch. Best effort."""
        if self._flushing is not None:
            self._flushing.cancel()
        if self._has_session:
            now = datetime.now(UTC)
            self._put("SESSION_END", now, duration=str(now - self._started or timedelta(0)))
        await self.flush()

    async def flush(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(_BATCH_MAX, len(self._queue)))]
            body = {
                "events": batch,
                "platform": platform.system(),
                "sdk_version": PROTOCOL_VERSION,
                "session_id": self._session_id,
                "process_uuid": _PROCESS,
            }
            try:
                await self._http.send(post("telemetry", body, timeout=_TIMEOUT_S), Retry(give_up_after=_TIMEOUT_S))
            except TinkerError as error:
                logger.warning("telemetry of %d events was not accepted and is dropped: %s", len(batch), error)

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            await self.flush()

    def _put(self, kind: str, when: datetime, *, severity: str = "INFO", **fields: Any) -> None:
        self._queue.append(
            {
                "event": kind,
                "event_id": str(uuid.uuid4()),
                "event_session_index": self._index,
                "severity": severity,
                "timestamp": when.isoformat(),
                **fields,
            }
        )
        self._index += 1
