"""How often, and after which waits, a whole sample is tried again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import httpx2

from tinsmith.client.errors import APIConnectionError, APIStatusError, PromiseExpiredError


@dataclass(frozen=True, slots=True)
class RetryConfig:
    """How a whole `sample` is tried again after its submit or its polls have failed. Times in seconds."""

    max_connections: int | None = 1000
    """How many samples of one client may be under way; `None` for as many as the server allows."""
    progress_timeout: float = 7200.0
    """Give up when no sample of this client has succeeded for so long."""
    retry_delay_base: float = 0.5
    retry_delay_max: float = 10.0
    jitter_factor: float = 0.25
    enable_retry_logic: bool = True
    enable_stuck_detection: bool = True
    """If false, `progress_timeout` does not apply."""
    retryable_exceptions: tuple[type[Exception], ...] = (
        asyncio.TimeoutError,
        APIConnectionError,
        httpx2.TimeoutException,
        PromiseExpiredError,
    )
    """Tried again, beside HTTP statuses that are worth it."""

    def __post_init__(self) -> None:
        if self.max_connections is not None and self.max_connections <= 0:
            raise ValueError(f"max_connections must be positive, not {self.max_connections!r}")
        if not 0 <= self.jitter_factor <= 1:
            raise ValueError(f"jitter_factor must lie between 0 and 1, not {self.jitter_factor!r}")

    def delay(self, attempt: int) -> float:
        """Seconds to wait after failed attempt `attempt`, counted from 0."""
        delay = min(self.retry_delay_base * 2.0 ** min(attempt, 32), self.retry_delay_max)
        return delay * (1 + self.jitter_factor * random.uniform(-1, 1))

    def is_retryable(self, error: Exception) -> bool:
        if isinstance(error, APIStatusError) and error.retryable:
            return True
        return isinstance(error, self.retryable_exceptions)
