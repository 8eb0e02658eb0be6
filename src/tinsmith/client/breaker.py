"""A circuit breaker: an endpoint whose calls keep failing is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Circuit:
    failures: int = 0
    open_until: float = 0.0
    probing: bool = False


class Breaker:
    """Counts calls that failed after all their retries, per endpoint, for what is the server's fault.

    After `threshold` of them in a row the endpoint is open: calls are refused for `reset_s` seconds. Then one call may
    probe it; its success closes the circuit, its failure opens it again. A threshold of 0 never opens.
    """

    def __init__(self, threshold: int, reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = threshold
        self._reset_s = reset_s
        self._clock = clock
        self._circuits: dict[str, _Circuit] = {}

    def seconds_closed_for(self, endpoint: str) -> float:
        """0 if a call may go now (it then counts as the probe, if one is due), else how long to stay away."""
        circuit = self._circuits.get(endpoint)
        if circuit is None or circuit.failures < self._threshold or not self._threshold:
            return 0.0
        left = circuit.open_until - self._clock()
        if left > 0:
            return left
        if circuit.probing:
            return self._reset_s
        circuit.probing = True
        return 0.0

    def succeeded(self, endpoint: str) -> None:
        self._circuits.pop(endpoint, None)

    def failed(self, endpoint: str) -> None:
        circuit = self._circuits.setdefault(endpoint, _Circuit())
        circuit.failures += 1
        circuit.probing = False
        circuit.open_until = self._clock() + self._reset_s

    def abandoned(self, endpoint: str) -> None:
        """The call ended without telling anything about the endpoint: cancelled, or the caller's own mistake."""
        circuit = self._circuits.get(endpoint)
        if circuit is not None:
            circuit.probing = False
